"""The ingress: takes HTTP requests from Ray Serve's proxies and has replicas answer them.

It knows nothing of the APIs: a request goes to a replica as it came, and the reply comes back as the replica's application made
it. Its own are only what concerns all replicas, and what to say when one dies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from grpc import RpcError
from msgspec.json import encode
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepgraph.ray.http import MAX_PIECE_BYTES, Head, HttpRequest
from stepgraph.ray.metrics import merged
from stepgraph.server.anthropic_errors import error_content, error_reply, is_anthropics
from stepgraph.server.errors import APIError
from stepgraph.server.replies import json_response
from stepgraph.server.sse import event

if TYPE_CHECKING:
    from stepgraph.ray.replica import EngineReplica

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
"""A request whose replica died before it answered anything is sent to another one: once, for it may be what kills them."""
_LOOK_S = 10.0
"""What all replicas together get to say what they count."""
_RETRY_AFTER = {"Retry-After": "5"}
_FAILURES = (RayError, RayServeException, RpcError)
"""Of what a call of a replica raises: its process is gone, or Serve has no replica, or the way to it is broken."""
_GONE = "the replica that had the request ended"


class Ingress:
    """What Ray Serve runs in front of the replicas, under `serve.ingress()`.

    Args:
        engines: the deployment of `EngineReplica`.
        max_body_mib: replicas refuse a larger body, of which no more is brought to them.
    """

    def __init__(self, engines: DeploymentHandle[EngineReplica], max_body_mib: float):
        self._app = ForwardingApp(engines, max_body_mib)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """See `serve.ingress`."""
        return self._app


class ForwardingApp:
    """An ASGI application that has replicas answer. Arguments: see `Ingress`."""

    def __init__(self, engines: DeploymentHandle[EngineReplica], max_body_mib: float):
        self._engines = engines
        self._answer_large = engines.options(method_name="answer", stream=True)
        self._answer = self._answer_large.options(
            _by_reference=False,  # each piece of a stream would be an object of Ray's own, which costs several times as much
            request_serialization="pickle",
            response_serialization="pickle",
        )
        # which one replica would answer for itself only
        self._of_all = {"/metrics": self._metrics, "/load": self._load}
        self._name = uuid.uuid4().hex
        self._most_bytes = int(max_body_mib * 2**20) + 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # there is none, as with `stepgraph serve`
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        scope = {**scope, "path": path, "state": {"request_id": _header(scope, b"x-request-id")}}
        if path in self._of_all and scope["method"] in ("GET", "HEAD"):
            await (await _unless_failing(self._of_all[path], scope))(scope, receive, send)
            return
        body = await self._read(receive)
        if body is None:
            return
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        request = HttpRequest(scope["method"], path, scope["query_string"], headers, body, self._name)
        engines = self._answer if len(body) <= MAX_PIECE_BYTES else self._answer_large
        forwarding = asyncio.create_task(_Forwarding(engines, request, scope, receive, send).run())
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((forwarding, leaving), return_when=asyncio.FIRST_COMPLETED)
            if forwarding.done():
                forwarding.result()
        finally:
            leaving.cancel()
            forwarding.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await forwarding

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or a little more of it than is allowed; None if the client leaves."""
        pieces, size = [], 0
        while size < self._most_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if not message.get("more_body", False):
                break
        return b"".join(pieces)

    async def _metrics(self, scope: Scope) -> Response:
        accept = _header(scope, b"accept")
        found = [one for one in await self._ask_all("metrics", accept) if not isinstance(one, BaseException)]
        if not found:
            raise TimeoutError("no replica told its metrics")
        texts = {replica: content.decode() for replica, content, _ in found}
        return Response(merged(texts).encode(), media_type=found[0][2])

    async def _load(self, scope: Scope) -> Response:
        found = [one for one in await self._ask_all("load") if not isinstance(one, BaseException)]
        each = {"engines": found} if len(found) > 1 else {}
        return json_response({"server_load": sum(found)} | each)

    async def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        answers = self._engines.broadcast(method, *arguments)
        return await answers.results_async(timeout_s=_LOOK_S, return_exceptions=True)


class _Forwarding:
    """One request on its way. Its parts are what was sent of the reply."""

    def __init__(
        self, engines: DeploymentHandle[EngineReplica], request: HttpRequest, scope: Scope, receive: Receive, send: Send
    ):
        self._engines = engines
        self._request = request
        self._scope = scope
        self._receive = receive
        self._send = send
        self._head: Head | None = None
        self._num_bytes = self._num_events = 0

    async def run(self) -> None:
        """Send the reply, whole, or with an error at its end."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._forward()
                break
            except BackPressureError as error:
                await self._refuse(_overload(error))
                return
            except _FAILURES as error:
                if self._num_bytes or attempt == _ATTEMPTS:
                    logger.error("request %s: %s", self._scope["state"]["request_id"], str(error).partition("\n")[0])
                    await self._fail()
                    return
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _forward(self) -> None:
        reply = self._engines.remote(self._request)
        assert isinstance(reply, DeploymentResponseGenerator)
        try:
            async for piece in reply:
                if isinstance(piece, Head):
                    await self._begin(piece)
                    piece = piece.content
                if piece:
                    self._num_bytes += len(piece)
                    self._num_events += piece.count(b"\n\n")
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            reply.cancel()

    async def _begin(self, head: Head) -> None:
        if self._head is None:
            self._head = head
            headers = [(name, value) for name, value in head.headers if name.lower() != b"x-request-id"]
            await self._send({"type": "http.response.start", "status": head.status, "headers": headers})
        elif head.status != self._head.status or head.is_stream != self._head.is_stream:
            raise RayServeException(f"another replica answers with status {head.status}")

    async def _fail(self) -> None:
        if self._head is None:
            await self._refuse(APIError(503, f"{_GONE} before it answered; send it again", headers=_RETRY_AFTER))
        elif self._head.is_stream:
            await self._send({"type": "http.response.body", "body": self._last_event(), "more_body": False})
        else:  # all that is left is to break it off
            raise ConnectionResetError(_GONE)

    async def _refuse(self, error: APIError) -> None:
        await error_reply(error, self._scope)(self._scope, self._receive, self._send)

    def _last_event(self) -> bytes:
        """As the application ends a stream that breaks off, in the form of the path's API."""
        error, path = APIError(503, f"{_GONE} before the answer did"), self._request.path
        if is_anthropics(path):
            return event(error_content(error, self._scope["state"]["request_id"]), "error")
        if path == "/v1/responses":
            fields = {"type": "error", "code": error.code, "message": error.message, "param": None}
            return event(encode({"sequence_number": self._num_events, **fields}), "error")
        return event(error.body())


def _overload(error: BackPressureError) -> APIError:
    """What Serve refuses, which no replica had: by `max_queued_requests`, in the words of its `backpressure_config`."""
    wait_s = error.retry_after_s
    return APIError(
        error.status_code,
        "as many requests wait for a replica as max_queued_requests allows; send it again later",
        code="queue_full",
        headers=_RETRY_AFTER if wait_s is None else {"Retry-After": str(math.ceil(wait_s))},
    )


async def _unless_failing(ask: Callable[[Scope], Awaitable[Response]], scope: Scope) -> Response:
    try:
        return await ask(scope)
    except (*_FAILURES, TimeoutError) as error:
        logger.error("replicas do not tell: %s", error)
        return error_reply(APIError(503, "the replicas cannot be asked now", headers=_RETRY_AFTER), scope)


async def _live(receive: Receive, send: Send) -> None:
    """ASGI's lifespan, in which there is nothing to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _left(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
