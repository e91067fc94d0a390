"""Whom an engine's process talks to: the supervisor, and front processes of their own if there are any."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import zmq

from stepgraph.server.messages import Hello, Load, Progress, StepInfo, ToEngine, TokenUpdate, decode_to_engine, encode

SUPERVISOR = b""
"""Its name among the peers; the fronts' are those of their sockets."""
_TELL_S = 0.1
"""What changes with each step is told so often to those that it brings no tokens."""


class Peers:
    """Their sockets. Sending never waits: the queues have no limit.

    Args:
        supervisor: connected to it.
        fronts: listens for them; None: there are none but what the supervisor speaks for.
    """

    def __init__(self, supervisor: zmq.Socket[bytes], fronts: zmq.Socket[bytes] | None = None):
        self.sent_at = 0.0
        """When the supervisor heard last; `time.monotonic()` seconds."""
        self._supervisor = supervisor
        self._fronts = fronts
        self._known: set[bytes] = set()
        self._gone: dict[bytes, bytes] = {}  # the last name of each front that is, by what its names begin with
        self._steps: list[StepInfo] = []
        self._load: Load | None = None  # as all know it
        self._told_at = 0.0
        if fronts is not None:
            self._poller = zmq.Poller()
            self._poller.register(supervisor, zmq.POLLIN)
            self._poller.register(fronts, zmq.POLLIN)

    def poll(self, timeout_s: float) -> bool:
        """Wait for a message so long; whether there is one."""
        timeout_ms = max(1, int(timeout_s * 1e3))
        if self._fronts is None:
            return bool(self._supervisor.poll(timeout_ms, zmq.POLLIN))
        return bool(self._poller.poll(timeout_ms))

    def receive(self) -> tuple[bytes, ToEngine] | None:
        """The next message and whose it is, if there is one. The fronts' come first: what they sent before they told the
        supervisor that they send no more is not to come after what it asks then."""
        received = None if self._fronts is None else self._receive_from(self._fronts)
        if received is not None:
            return received
        try:
            return SUPERVISOR, decode_to_engine(self._supervisor.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def _receive_from(self, fronts: zmq.Socket[bytes]) -> tuple[bytes, ToEngine] | None:
        while True:
            try:
                peer, content = fronts.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if self._gone.get(_place(peer)) == peer:
                continue
            self._known.add(peer)
            message: ToEngine = decode_to_engine(content)
            if not isinstance(message, Hello):
                return peer, message
            if self._load is not None:
                self.send(peer, Progress([], [], self._load))

    def forget(self, front: bytes) -> None:
        """A front is gone: what may still come of it counts for nothing."""
        self._gone[_place(front)] = front
        self._known.discard(front)

    def send(self, peer: bytes, message: Any) -> None:
        """Send a message; to a peer that is gone, nothing."""
        content = encode(message)
        if peer == SUPERVISOR:
            self._supervisor.send(content, zmq.NOBLOCK)
            self.sent_at = time.monotonic()
        elif self._fronts is not None:
            self._fronts.send_multipart((peer, content), zmq.NOBLOCK)

    def tell(
        self, updates: Mapping[bytes, Sequence[TokenUpdate]], steps: Sequence[StepInfo], load: Load, *, at_once: bool
    ) -> None:
        """What steps gave, to those whose it is; where that leaves the engine, to all, `at_once` or when it is time."""
        if self._fronts is None:
            if updates or steps or load != self._load:
                self._load = load
                self.send(SUPERVISOR, Progress(list(updates.get(SUPERVISOR, ())), list(steps), load))
            return
        for peer, its in updates.items():
            self.send(peer, Progress(list(its), [], load))
        self._steps += steps
        if not (at_once or time.monotonic() - self._told_at >= _TELL_S) or not (self._steps or load != self._load):
            return
        self._told_at, self._load = time.monotonic(), load
        self.send(SUPERVISOR, Progress([], self._steps, load))
        self._steps = []
        for peer in self._known - updates.keys():
            self.send(peer, Progress([], [], load))


def _place(front: bytes) -> bytes:
    """What the names of all processes that are the same front begin with."""
    return front.rpartition(b"-")[0]
