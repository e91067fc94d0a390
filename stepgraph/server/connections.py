"""Connections of clients: how many there may be, and how long each may keep the server waiting.

uvicorn's protocol waits for ever, for a request's headers and body and for a client that reads nothing; and connections need no
key. So each has a limit for all that it does, and those that keep the server waiting make way for new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import struct
import termios
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stepgraph.config.server import ServerConfig

logger = logging.getLogger(__name__)

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_PROBE_S = (0.05, 1.0)
"""After the first probe, and after each later one."""
_TOO_LATE = b"the request did not come in time; send it without pauses"
_NO_ROOM = b"there are too many connections; try again in a second"


class End(StrEnum):
    """Why the server ended a connection."""

    IDLE = "idle"
    HEADERS_LATE = "headers_late"
    HEADERS_TOO_LARGE = "headers_too_large"
    BODY_LATE = "body_late"
    STALLED = "stalled"
    MADE_WAY = "made_way"
    """It kept the server waiting when there were too many."""
    REFUSED = "refused"
    """There were too many, and all of them were being answered."""


@dataclass(frozen=True)
class Limits:
    """Of each connection."""

    max_head_bytes: int
    header_s: float
    body_s: float
    idle_s: float
    stall_s: float

    @classmethod
    def of(cls, config: ServerConfig) -> Limits:
        """Those that a server is set to."""
        return cls(
            max_head_bytes=int(config.max_header_kib * 1024),
            header_s=config.header_timeout,
            body_s=config.body_timeout,
            idle_s=config.keep_alive_timeout,
            stall_s=config.stall_timeout,
        )


class Connections:
    """Those of one port. Belongs to one event loop.

    Args:
        limits: of each.
        max_open: how many there may be.
    """

    def __init__(self, limits: Limits, max_open: int):
        self.limits = limits
        self.ended: Counter[End] = Counter(dict.fromkeys(End, 0))
        self._max_open = max_open
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # for their clients, the longest first

    @property
    def num_open(self) -> int:
        """How many there are."""
        return len(self._open)

    def admit(self, connection: Connection) -> bool:
        """Whether there is room for a new one. The one that has kept the server waiting longest makes way for it."""
        if len(self._open) >= self._max_open:
            if not self._waiting:
                self.ended[End.REFUSED] += 1
                return False
            next(iter(self._waiting)).end(End.MADE_WAY)
        self._open.add(connection)
        return True

    def waits(self, connection: Connection, *, begins: bool) -> None:
        """The server begins or ceases to wait for the client."""
        self._waiting.pop(connection, None)
        if begins and connection in self._open:
            self._waiting[connection] = None

    def forget(self, connection: Connection) -> None:
        """It is over, as good as."""
        self._waiting.pop(connection, None)
        self._open.discard(connection)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with limits; and it answers clients that end their side of the connection after the request."""

    def __init__(self, *args: Any, shared: Connections, **others: Any):
        super().__init__(*args, **others)
        self._shared = shared
        self._limits = shared.limits
        self._num_head_bytes = 0  # since a request began or a part of its body came
        self._in_head = False  # a request has begun, and its headers have not ended
        self._deadline: asyncio.TimerHandle | None = None  # for what the client is to send
        self._looking: asyncio.TimerHandle | None = None  # for the next look at what waits, while writes have to
        self._probing: asyncio.TimerHandle | None = None
        self._half_closed = False

    def end(self, reason: End) -> None:
        """End it. A request that came half is told so."""
        self._shared.ended[reason] += 1
        self._shared.forget(self)
        logger.info("the connection of %s was ended: %s", self.client, reason)
        if reason in (End.HEADERS_LATE, End.BODY_LATE) and not (self.cycle and self.cycle.response_started):
            self._say(408, _TOO_LATE)
        if self._looking is None:
            self.transport.close()
        else:  # what was written would never leave
            self.transport.abort()

    # What the client is waited for

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `HttpToolsProtocol`."""
        super().connection_made(transport)  # type: ignore[arg-type]  # as its callers do
        if self._shared.admit(self):
            self._await(self._limits.idle_s, End.IDLE)
        else:
            self._say(503, _NO_ROOM)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `HttpToolsProtocol`."""
        super().connection_lost(exc)
        self._shared.forget(self)
        for timer in (self._deadline, self._looking, self._probing):
            if timer is not None:
                timer.cancel()

    def on_message_begin(self) -> None:
        """See `HttpToolsProtocol`."""
        self._num_head_bytes = 0
        super().on_message_begin()
        self._in_head = True
        if self.cycle is None or self.cycle.response_complete:
            self._await(self._limits.header_s, End.HEADERS_LATE)

    def on_headers_complete(self) -> None:
        """See `HttpToolsProtocol`."""
        self._in_head = False
        super().on_headers_complete()
        if not self.pipeline:
            self._await(self._limits.body_s, End.BODY_LATE)

    def on_body(self, body: bytes) -> None:
        """See `HttpToolsProtocol`."""
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See `HttpToolsProtocol`."""
        super().on_message_complete()
        if self.cycle.response_complete:  # an answer that did not wait for the whole request
            self._await(self._limits.idle_s, End.IDLE)
        elif not self.pipeline:
            self._await_nothing()

    def on_response_complete(self) -> None:
        """See `HttpToolsProtocol`."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # which is not there for connections that have asked nothing yet
        if self.cycle.more_body:
            self._await(self._limits.body_s, End.BODY_LATE)
        elif self._in_head:
            self._await(self._limits.header_s, End.HEADERS_LATE)
        elif self.cycle.response_complete:
            self._await(self._limits.idle_s, End.IDLE)
            if self._half_closed:
                self.transport.close()

    def data_received(self, data: bytes) -> None:
        """See `HttpToolsProtocol`."""
        if self.transport.is_closing():
            return
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > self._limits.max_head_bytes and not self.transport.is_closing():
            self._shared.ended[End.HEADERS_TOO_LARGE] += 1
            self.send_400_response(f"The headers of a request can have {self._limits.max_head_bytes} bytes.")

    def _await(self, seconds: float, otherwise: End) -> None:
        """Give the client so long for what is to come."""
        self._await_nothing()
        self._deadline = self.loop.call_later(seconds, self._late, seconds, otherwise)
        self._shared.waits(self, begins=True)

    def _await_nothing(self) -> None:
        """It is for the server to go on."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        self._shared.waits(self, begins=False)

    def _late(self, seconds: float, reason: End) -> None:
        if self.flow.read_paused:  # it is the server that does not read
            self._deadline = self.loop.call_later(seconds, self._late, seconds, reason)
        else:
            self.end(reason)

    # What the client takes

    def pause_writing(self) -> None:
        """See `HttpToolsProtocol`."""
        super().pause_writing()
        self._look_later()
        self._shared.waits(self, begins=True)

    def resume_writing(self) -> None:
        """See `HttpToolsProtocol`."""
        super().resume_writing()
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        self._shared.waits(self, begins=self._deadline is not None)

    def _look_later(self) -> None:
        self._looking = self.loop.call_later(self._limits.stall_s, self._look, self._num_unread_bytes())

    def _look(self, num_bytes: int) -> None:
        """Break off, unless fewer bytes wait than before."""
        if self._num_unread_bytes() < num_bytes:
            self._look_later()
        else:
            self._shared.ended[End.STALLED] += 1
            logger.warning("the client at %s reads nothing and is cut off", self.client)
            self.transport.abort()

    def _num_unread_bytes(self) -> int:
        """Of what was written, as much as the client's system has not taken. The transport alone sees a slow reader's progress in
        steps of megabytes, as the socket's buffer comes to hold them."""
        num_bytes = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):  # not every system tells
            num_bytes += struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return num_bytes

    # Clients that say early that they will send no more

    def eof_received(self) -> bool | None:  # type: ignore[override]  # as asyncio has it
        """Keep the other side open for a request that came whole and is not answered.

        Whether the client has gone altogether shows only when it is sent something; what it may be sent before the answer is that
        it go on, which it must ignore (RFC 9110, 15.2).
        """
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_started or self.pipeline:
            return None
        self._half_closed = True
        if self.scope["http_version"] == "1.1":
            self._probe(_PROBE_S[0])
        return True

    def _probe(self, next_s: float) -> None:
        if not self.cycle.response_started and not self.transport.is_closing():
            self.transport.write(_CONTINUE)
            self._probing = self.loop.call_later(next_s, self._probe, _PROBE_S[1])

    def _say(self, status: int, message: bytes) -> None:
        """A reply that no application gave. `message`: ASCII."""
        phrase = {408: b"Request Timeout", 503: b"Service Unavailable"}[status]
        head = (
            b"HTTP/1.1 %d %s" % (status, phrase),
            b"content-type: text/plain; charset=utf-8",
            b"content-length: %d" % len(message),
            b"retry-after: 1",
            b"connection: close",
        )
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + message)
