"""What every HTTP request passes: its name, its key, the measure of its body, and the last word on what went wrong."""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepgraph.server.anthropic_errors import error_reply, is_anthropics
from stepgraph.server.bodies import Bodies, Body
from stepgraph.server.errors import APIError, report

OPEN_PATHS = frozenset({"/", "/health", "/ping", "/ready", "/version", "/load", "/metrics"})
"""What load balancers, orchestrators and Prometheus ask for: without a key, and while the server shuts down."""
_CLIENT_LEFT = 499
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestMiddleware:
    """ASGI middleware around the whole application.

    Args:
        app: what is behind it.
        api_keys: each opens it; none: it is open.
        bodies: those of all requests; one that is too much is refused while it arrives.
        on_response: counts replies, by path as the routes spell it ("other" for what no route takes) and status.
        open_paths: that need no key, beside `OPEN_PATHS`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[str, ...],
        bodies: Bodies,
        on_response: Callable[[str, int], None],
        open_paths: frozenset[str] = frozenset(),
    ):
        self._app = app
        self._api_keys = tuple(key.encode() for key in api_keys)
        self._bodies = bodies
        self._open_paths = OPEN_PATHS | open_paths
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["arrived_at"] = request_id, time.monotonic()
        at_end = state["at_end"] = ExitStack()
        body = state["body"] = Body(self._bodies)
        at_end.callback(body.release)
        status, is_whole = 0, False

        async def send_on(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                reply_headers = MutableHeaders(scope=message)
                reply_headers["X-Request-Id"] = request_id
                if is_anthropics(scope["path"]):
                    reply_headers["Request-Id"] = request_id
            else:
                is_whole = not message.get("more_body", False)
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            body.announce(headers.get("content-length", ""))
            await self._app(scope, _measured(receive, body), send_on)
        except ClientDisconnect:
            pass
        except Exception as error:
            failure = report(error, request_id)
            if not status:
                await error_reply(failure, scope)(scope, receive, send_on)
            elif not is_whole:  # all that is left is to break it off
                raise
        finally:
            at_end.close()
            route = scope.get("route")
            self._on_response(getattr(route, "path", "other"), status or _CLIENT_LEFT)

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._api_keys or path in self._open_paths:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = [key if kind.lower() == "bearer" else "", headers.get("x-api-key", "")]
        matches = [
            hmac.compare_digest(one.strip().encode(), known) for one in given for known in self._api_keys
        ]  # all of them, in constant time
        if not any(matches):
            raise APIError(
                401,
                "the API key is missing or wrong; send a header 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _measured(receive: Receive, body: Body) -> Receive:
    async def receive_measured() -> Message:
        message = await receive()
        if content := message.get("body"):
            await body.receive(content)
        return message

    return receive_measured
