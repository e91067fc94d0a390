"""The page to look at: its files, and what they show of the engines' steps while they are open. See docs/page.md."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from stepgraph.server.errors import APIError
from stepgraph.server.replies import encode_json
from stepgraph.server.service import Service
from stepgraph.server.sse import EventStream, event

MAX_READERS = 16
"""Of one front process at a time."""
MAX_TRACE_S = 50
"""Requests that are not for answers may take 60 s."""
_LOOK_S = 0.1
_INDEX = "index.html"
_FOLDER = Path(__file__).parent / "ui"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class _File(NamedTuple):
    content: bytes
    headers: dict[str, str]


class Page:
    """The page's files, which need no key: all that they show, they ask for with it."""

    def __init__(self) -> None:
        self._files = {path.name: _read(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
        self.paths = frozenset(f"/ui/{name}" for name in self._files)
        """Where they are."""

    def index(self, http: Request) -> Response:
        """The page itself."""
        return self.file(_INDEX, http)

    def file(self, name: str, http: Request) -> Response:
        """One of its files; a 404 if it has none of this name."""
        if name not in self._files:
            raise APIError(404, f"the page has no file {name!r:.200}", code="not_found")
        content, headers = self._files[name]
        if http.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)


def _read(path: Path) -> _File:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:16]
    return _File(content, {**_HEADERS, "Content-Type": _TYPES[path.suffix], "ETag": f'"{tag}"'})


def add_page(app: FastAPI, service: Service, page: Page) -> None:
    """Add what the page is made of, and what it shows."""
    num_readers = 0

    @app.get("/ui/events", include_in_schema=False)
    async def events(http: Request) -> Response:
        if num_readers >= MAX_READERS:
            raise APIError(429, f"{MAX_READERS} others look already; close one", headers={"Retry-After": "5"})
        looked = await service.control.look(None)

        async def counted() -> AsyncGenerator[bytes]:
            nonlocal num_readers
            num_readers += 1
            try:
                async for content in _events(service, looked):
                    yield content
            finally:
                num_readers -= 1

        return EventStream(counted(), failed=_failed, request_id=http.scope["state"]["request_id"])

    @app.get("/ui/trace", summary="Steps and requests as a trace for Perfetto or Chrome", tags=["operations"])
    async def trace(
        seconds: str = Query("0", description=f"what comes in so many, at most {MAX_TRACE_S}; 0: what is kept"),
    ) -> Response:
        return Response(await service.control.trace(_seconds(seconds)), media_type="application/json")

    @app.get("/ui/{name}", include_in_schema=False)
    async def file(name: str, http: Request) -> Response:
        return page.file(name, http)


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_TRACE_S:
        raise APIError(400, f"seconds={given!r:.50} must be a number from 0 to {MAX_TRACE_S}", param="seconds")
    return seconds


async def _events(service: Service, looked: dict[str, Any]) -> AsyncGenerator[bytes]:
    """What there is to see, until the server shuts down. It is looked for when the last was taken: a client that takes nothing
    holds up nobody, and misses what makes way meanwhile."""
    while not service.draining:
        content = b"".join(map(event, looked["messages"]))
        if content:
            yield content
        if not looked["more"]:
            await asyncio.sleep(_LOOK_S)
        looked = await service.control.look(looked["cursor"])


def _failed(failure: APIError) -> bytes:
    return event(encode_json({"type": "error", "error": {"message": failure.message, "code": failure.code}}))
