"""Server-sent events: a reply that is sent while it is made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepgraph.server.errors import APIError, report, timed_out

DONE = b"data: [DONE]\n\n"


def event(content: bytes, name: str | None = None) -> bytes:
    """One event. `content` has no line breaks."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + content + b"\n\n"


class EventStream(Response):
    """Sends events as they come; stops, and ends what makes them, when the client leaves.

    Args:
        events: whole events as bytes. When it raises something, or takes too long, `failed` has the last word.
        failed: the last events of a stream that fails, from what went wrong.
        request_id: named in the log then.
        spelled: see `api_error`.
        timeout_s: the request ends with an error after so long; None is no limit.
        arrived_at: from when on that counts, `time.monotonic()` seconds; default: from the first event.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        failed: Callable[[APIError], bytes],
        request_id: str,
        spelled: Callable[[str], str] | None = None,
        timeout_s: float | None = None,
        arrived_at: float | None = None,
    ):
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._events = events
        self._failed = failed
        self._request_id = request_id
        self._spelled = spelled
        self._timeout_s = timeout_s
        self._arrived_at = arrived_at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    async def _send_all(self, send: Send) -> None:
        async def write(content: bytes) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": True})

        try:
            try:
                async with asyncio.timeout(self._left_s()):
                    async for content in self._events:
                        await write(content)
            except TimeoutError:
                assert self._timeout_s is not None
                await write(self._failed(timed_out(self._timeout_s)))
            except Exception as error:
                await write(self._failed(report(error, self._request_id, self._spelled)))
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _left_s(self) -> float | None:
        """Seconds that the request has left."""
        if self._timeout_s is None or self._arrived_at is None:
            return self._timeout_s
        return max(0.001, self._arrived_at + self._timeout_s - time.monotonic())


async def _left(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
