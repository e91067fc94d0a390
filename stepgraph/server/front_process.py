"""A front in a process of its own: one of several that share a port. Started by `front_life`."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.asyncio

from stepgraph.config import EngineConfig
from stepgraph.config.server import ServerConfig
from stepgraph.errors import USER_ERRORS
from stepgraph.lifeline import end_with_parent
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.front import Front, HttpFront, run_in_loop
from stepgraph.server.front_messages import (
    AskCounts,
    Call,
    CallAnswer,
    CallFailed,
    Counts,
    Drain,
    EngineEnded,
    EngineNews,
    FromFront,
    FrontAnswer,
    FrontFailed,
    FrontUp,
    Loaded,
    PrefixesForgotten,
    Share,
    StartFront,
    decode_start,
    decode_to_front,
    encode,
)
from stepgraph.server.messages import Hello, decode_from_engine
from stepgraph.server.messages import encode as encode_to_engine
from stepgraph.server.ports import bind
from stepgraph.server.questions import Questions
from stepgraph.server.rest import Rest
from stepgraph.server.sockets import drain, receive, send_now

logger = logging.getLogger(__name__)

_USER_ERROR, _FAILURE = 2, 1
_LAST_WORD_MS = 5000
"""How long the last message may take to leave."""
_ANSWER_S = 40.0
"""What the supervisor may take to answer, but for administration: an engine that it asks may take 30 s."""


class Line:
    """A front's connection to one engine, whose processes come and go.

    Args:
        context: of the socket.
        name: the front's.
    """

    def __init__(self, context: zmq.asyncio.Context, name: str):
        self._context = context
        self._name = name
        self._address: str | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._client: EngineClient | None = None

    def serve(self, client: EngineClient) -> None:
        """Give what comes to this one."""
        self._client = client

    def connect(self, address: str) -> None:
        """Talk to the process that listens there."""
        if address == self._address:
            return
        self.close()
        self._address = address
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.IDENTITY, self._name.encode())
        self._socket.connect(address)
        self.send(encode_to_engine(Hello()))
        self._receiving = asyncio.create_task(receive(self._socket, self._take))

    def send(self, content: bytes) -> None:
        """Never waits; to an engine that is not there, nothing is sent."""
        if self._socket is not None:
            send_now(self._socket, content)

    def close(self) -> None:
        """The process is gone: take in what it said last."""
        if self._socket is not None and self._receiving is not None:
            self._receiving.cancel()
            drain(self._socket, self._take)
            self._socket.close(linger=0)
        self._socket = self._address = None

    def _take(self, content: bytes) -> None:
        assert self._client is not None
        self._client.take(decode_from_engine(content))


class SupervisorLink:
    """The supervisor as a front has it: a `Control`. Belongs to one event loop."""

    def __init__(self, context: zmq.asyncio.Context, start: StartFront):
        self.rest = Rest()
        self.adapters: dict[str, str] = {}
        self.draining, self.hurry = asyncio.Event(), asyncio.Event()
        self.lines = [Line(context, start.name) for _ in range(start.num_engines)]
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.connect(start.address)
        self._questions: Questions[Call] = Questions(self.tell, "the supervisor")

    async def serve(self, http: HttpFront) -> None:
        """Take in what the supervisor says, for ever."""
        self._http = http
        for line, client in zip(self.lines, http.replicas.clients, strict=True):
            line.serve(client)
        await receive(self._socket, self._take)

    def tell(self, message: FromFront) -> None:
        """Never waits."""
        send_now(self._socket, encode(message))

    def close(self) -> None:
        """Send what is left."""
        for line in self.lines:
            line.close()
        self._socket.close(linger=_LAST_WORD_MS)

    async def administer(self, action: str, **arguments: Any) -> Any:
        """See `Control`."""
        return await self._call("administer", None, action=action, **arguments)

    async def metrics(self, accept: str | None) -> tuple[bytes, str]:
        """See `Control`."""
        content, media_type = await self._call("metrics", _ANSWER_S, accept=accept)
        return content, media_type

    async def load(self) -> list[int]:
        """See `Control`."""
        loads: list[int] = await self._call("load", _ANSWER_S)
        return loads

    async def graphs(self) -> list[dict[str, Any]]:
        """See `Control`."""
        graphs: list[dict[str, Any]] = await self._call("graphs", _ANSWER_S)
        return graphs

    async def look(self, cursor: Sequence[int] | None) -> dict[str, Any]:
        """See `Control`."""
        looked: dict[str, Any] = await self._call("look", _ANSWER_S, cursor=cursor)
        return looked

    async def trace(self, seconds: float) -> bytes:
        """See `Control`."""
        content: bytes = await self._call("trace", seconds + _ANSWER_S, seconds=seconds)
        return content

    async def _call(self, method: str, timeout_s: float | None, **arguments: Any) -> Any:
        return await self._questions.ask(lambda number: Call(number, method, arguments), timeout_s)

    def _take(self, content: bytes) -> None:
        message = decode_to_front(content)
        replicas = self._http.replicas
        if isinstance(message, EngineNews):
            replicas.on_status(message.replica, message.status)
            if replicas.clients[message.replica].is_ready and message.status.address is not None:
                self.lines[message.replica].connect(message.status.address)
        elif isinstance(message, EngineEnded):
            self.lines[message.replica].close()
            replicas.on_end(message.replica, message.reason)
        elif isinstance(message, PrefixesForgotten):
            replicas.forget_prefixes(message.replica)
        elif isinstance(message, Share):
            self.rest.sleep_level, self.rest.paused = message.sleep_level, message.paused
            self.rest.coming = message.coming
            self.adapters.clear()
            self.adapters.update(message.adapters)
            self.tell(FrontAnswer(message.number))
        elif isinstance(message, AskCounts):
            self.tell(Counts(message.number, self._http.counts()))
        elif isinstance(message, Drain):
            self.draining.set()
            if message.hurry:
                self.hurry.set()
        elif isinstance(message, CallAnswer):
            self._questions.answer(message.number, message.content)
        elif isinstance(message, CallFailed):
            self._questions.decline(message.number, message.error())


async def _serve(start: StartFront) -> int:
    server_settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in start.server_settings.items()
    }
    config = ServerConfig(**server_settings)
    front = Front(
        EngineConfig.from_settings(**start.settings),
        config,
        tuple(start.api_keys),
        start.chat_template,
        *_sockets(start, config),
        start.max_connections,
        time.monotonic(),
    )
    context = zmq.asyncio.Context()
    link = SupervisorLink(context, start)
    try:
        http = HttpFront(front, [line.send for line in link.lines], link, link.rest, link.adapters, shared=True)
        listening = asyncio.create_task(link.serve(http))
        link.tell(FrontUp())
        if start.listening:
            http.start()
        try:
            await http.load()
        except Exception as error:
            logger.exception("the front cannot start")
            is_users = isinstance(error, USER_ERRORS)
            link.tell(FrontFailed(str(error) or repr(error), is_users=is_users))
            await http.close()
            return _USER_ERROR if is_users else _FAILURE
        if not start.listening:
            http.start()
        link.tell(Loaded())
        draining = asyncio.create_task(link.draining.wait())
        await asyncio.wait((draining, listening, *http.tasks), return_when=asyncio.FIRST_COMPLETED)
        if listening.done():
            listening.result()
        await http.drain(link.hurry)
        for client in http.replicas.clients:
            client.fail("the engine stopped: the server is shutting down")
        await http.close()
        return 0
    finally:
        link.close()
        context.term()


def _sockets(start: StartFront, config: ServerConfig) -> tuple[socket.socket, socket.socket | None]:
    """Those of the API and of metrics."""
    given = [socket.socket(fileno=descriptor) for descriptor in start.listening]
    if not given:
        given.append(bind(config.host, config.port, "port", shared=True))
        if config.metrics_port is not None:
            given.append(bind(config.host, config.metrics_port, "metrics_port", shared=True))
    return given[0], given[1] if len(given) > 1 else None


def main() -> int:
    """Entry point of the process; returns its exit code."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    first_line = sys.stdin.buffer.readline()
    if not first_line:  # whoever started it is gone already
        return 0
    end_with_parent()
    return run_in_loop(_serve(decode_start(first_line)))


if __name__ == "__main__":
    sys.exit(main())
