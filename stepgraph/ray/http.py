"""An HTTP request on its way from the ingress to a replica, and its reply on the way back.

A reply is a stream: first its status and headers, then pieces of its body.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import NamedTuple, TypeAlias

from starlette.types import ASGIApp, Message, Scope

Headers: TypeAlias = list[tuple[bytes, bytes]]

MAX_PIECE_BYTES = 2**20
"""Ray's gRPC takes messages of 4 MiB, if nobody has changed that."""
_PIECES_PER_S = 1000
"""That a replica sends, of all streams: what one costs Ray on its way has little to do with its size."""
_SHORT_S = 0.004
"""A wait that would save little."""
_LEAVE_S = 5.0
"""What an application gets to end a request that nobody waits for."""


class HttpRequest(NamedTuple):
    """One request, with its whole body."""

    method: str
    path: str
    """Decoded, without the prefix of the application's route."""
    query: bytes
    headers: Headers
    body: bytes
    sender: str = ""
    """Names the process that sends it, as routers count what others have sent."""

    def scope(self) -> Scope:
        """As ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": None,
            "server": None,
            "state": {},
        }


class Head(NamedTuple):
    """The beginning of a reply."""

    status: int
    headers: Headers
    content: bytes = b""
    """Of the body, as far as it came with it."""

    @property
    def is_stream(self) -> bool:
        """Whether it is one of events."""
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)


class Answering:
    """Has an ASGI application of this process answer requests. Belongs to one event loop."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._num_streams = 0
        self._senders: Counter[str] = Counter()

    @property
    def num_by_sender(self) -> dict[str, int]:
        """Requests that are being answered."""
        return dict(self._senders)

    async def answer(self, request: HttpRequest) -> AsyncGenerator[Head | bytes]:
        """A reply. Whoever closes the stream leaves, and ends the request.

        The first piece goes at once. When there are many streams, those after it wait for each other, such that Ray, which is
        asked to bring each of them, keeps up.
        """
        outbox, left = _Outbox(), asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        working = asyncio.ensure_future(self._app(request.scope(), receive, outbox.send))
        working.add_done_callback(outbox.end)
        self._num_streams += 1
        self._senders[request.sender] += 1
        try:
            head = await outbox.head()
            yield head._replace(content=outbox.take())
            while content := await outbox.content():
                yield content
                if (wait_s := self._num_streams / _PIECES_PER_S) > _SHORT_S:
                    await outbox.wait_for_end(wait_s)
            working.result()
        finally:
            self._num_streams -= 1
            self._senders[request.sender] -= 1
            self._senders = +self._senders  # without those that have none left
            left.set()
            if not working.done():
                await asyncio.wait((working,), timeout=_LEAVE_S)
                working.cancel()


class _Outbox:
    """What an application has sent, until it is taken."""

    def __init__(self) -> None:
        self._head: Head | None = None
        self._pieces: list[bytes] = []
        self._work: asyncio.Future[None] | None = None
        self._news, self._ended = asyncio.Event(), asyncio.Event()

    async def send(self, message: Message) -> None:
        """See ASGI. Never waits: an answer has its length."""
        if message["type"] == "http.response.start":
            self._head = Head(message["status"], [(bytes(name), bytes(value)) for name, value in message["headers"]])
        elif content := message.get("body", b""):
            self._pieces.append(content)
        self._news.set()

    def end(self, work: asyncio.Future[None]) -> None:
        """There is no more to come."""
        self._work = work
        self._news.set()
        self._ended.set()

    async def head(self) -> Head:
        """The beginning, once it is there; what went wrong if it does not come."""
        while self._head is None:
            if self._work is not None:
                self._work.result()
                raise RuntimeError("the application sent no reply")
            await self._wait()
        return self._head

    async def content(self) -> bytes:
        """What was sent since the last call; waits if that is nothing. Empty at the end."""
        while not self._pieces and self._work is None:
            await self._wait()
        return self.take()

    def take(self) -> bytes:
        """What was sent since the last call, or as much of it as makes a piece."""
        content = b"".join(self._pieces)
        self._pieces = [content[MAX_PIECE_BYTES:]] if len(content) > MAX_PIECE_BYTES else []
        return content[:MAX_PIECE_BYTES]

    async def wait_for_end(self, seconds: float) -> None:
        """Wait, but not beyond the end."""
        if not self._ended.is_set():
            await asyncio.wait((ended := asyncio.ensure_future(self._ended.wait()),), timeout=seconds)
            ended.cancel()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()
