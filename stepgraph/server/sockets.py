"""Sending and receiving on ZeroMQ's sockets in an event loop, without waits that nobody needs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import zmq
import zmq.asyncio


async def receive(socket: zmq.asyncio.Socket, take: Callable[[bytes], None]) -> None:
    """Take in messages for ever, always all that are there: if the requests' readers are behind, each then finds several tokens
    at once, and is behind no longer."""
    while True:
        take(await socket.recv())
        drain(socket, take)


def drain(socket: zmq.asyncio.Socket, take: Callable[[bytes], None]) -> None:
    """Take in what is there."""
    with contextlib.suppress(zmq.Again):
        while True:
            take(zmq.Socket.recv(socket, zmq.NOBLOCK))


def send_now(socket: zmq.asyncio.Socket, content: bytes) -> None:
    """Send without waiting: the queue has no limit. If the other end is just going away, nothing is sent."""
    # zmq.Socket.send would be quicker, but may take in the signal that there is something to receive: nobody would hear of it
    sent = asyncio.ensure_future(socket.send(content, zmq.NOBLOCK))
    error = sent.exception()  # it is done already
    if error is not None and not isinstance(error, zmq.Again):
        raise error
