"""The HTTP application: which path does what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias, get_type_hints

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import stepgraph
from stepgraph.server.administration import ADMINISTRATION, add_administration
from stepgraph.server.anthropic import MessagesReply, count_tokens
from stepgraph.server.anthropic_errors import error_reply
from stepgraph.server.anthropic_requests import CountTokensRequest, MessagesRequest
from stepgraph.server.bodies import Body
from stepgraph.server.chat import ChatReply
from stepgraph.server.completions import CompletionCall
from stepgraph.server.directory import endpoints, methods_of, not_allowed, not_found
from stepgraph.server.errors import APIError, api_error, report, timed_out
from stepgraph.server.middleware import RequestMiddleware
from stepgraph.server.operations import add_health, add_operations
from stepgraph.server.page import Page, add_page
from stepgraph.server.protocol import ChatRequest, CompletionRequest
from stepgraph.server.replies import ModelCard, ModelList, ignored_fields, json_response
from stepgraph.server.responses import ResponsesReply, ResponsesRequest
from stepgraph.server.service import Context, Service
from stepgraph.server.sse import EventStream
from stepgraph.server.tokenizer import add_tokenizer

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]

_GENERATION = "generation"
_TAKES_LONG = frozenset({_GENERATION, ADMINISTRATION})
_QUICK_S = 60
"""What the other endpoints may take. For answers there is request_timeout. Nobody knows how long the engine takes for what
administrators ask, and one that hangs is ended."""


class Call(Protocol):
    """A request that the engine has accepted. One of the two is used, once."""

    async def reply(self) -> bytes:
        """The whole answer, as JSON."""

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""

    def failed(self, failure: APIError) -> bytes:
        """The last events if `events` breaks off."""


class Streamable(Protocol):
    """A request's body, as far as the way of the reply goes."""

    stream: bool

    def spelled(self, param: str) -> str:
        """How it spells what an error is about."""

    def let_go(self) -> None:
        """Forget what only the prompt was made of."""


def create_app(service: Service, *, api_keys: Sequence[str]) -> ASGIApp:
    """The application, ready for an ASGI server."""
    config = service.config
    app = FastAPI(
        title="stepgraph",
        version=stepgraph.__version__,
        description="The APIs of OpenAI and Anthropic; every step of the model is one launch of one captured graph.",
        docs_url=None,
        redoc_url=None,
    )
    # as a parameter, FastAPI warns of it and would have it set by what starts it
    app.root_path = config.root_path or ""
    app.router.route_class = _Route
    _add_error_handlers(app)
    _add_generation(app, service)
    add_tokenizer(app, service)
    _add_models(app, service)
    page = Page() if config.ui else None
    add_operations(app, service, page)
    if page is not None:
        add_page(app, service, page)
    if config.enable_admin_endpoints:
        add_administration(app, service)
    middleware = RequestMiddleware(
        _HeadAsGet(app),
        api_keys=tuple(api_keys),
        bodies=service.bodies,
        on_response=service.counts.on_response,
        open_paths=frozenset() if page is None else page.paths,
    )
    if not config.cors_allow_origins:
        return middleware
    # outermost: web pages shall see why they are turned away, and browsers ask without a key whether they may send one
    return CORSMiddleware(middleware, allow_origins=config.cors_allow_origins, allow_methods=["*"], allow_headers=["*"])


def create_metrics_app(service: Service) -> ASGIApp:
    """What --metrics-port serves: /metrics and /health."""
    app = FastAPI(title="stepgraph metrics", version=stepgraph.__version__, openapi_url=None)
    app.router.route_class = _Route
    _add_error_handlers(app)
    add_health(app, service)
    return RequestMiddleware(_HeadAsGet(app), api_keys=(), bodies=service.bodies, on_response=lambda path, status: None)


class _HeadAsGet:
    """Answers HEAD wherever GET is answered: the HTTP server leaves the body out."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send)
        finally:
            scope["route"] = as_get.get("route")  # by which replies are counted


class _Route(APIRoute):
    """Reads a body in our own way, which FastAPI would do on the event loop, whatever its size; and has a time limit."""

    def get_route_handler(self) -> Handler:
        """See `APIRoute`."""
        answer = super().get_route_handler()
        if (kind := get_type_hints(self.endpoint).get("body")) is not None:
            answer = self._with_body(
                kind, [each.dependency for each in self.dependencies if each.dependency is not None]
            )
        return _limited(answer) if _TAKES_LONG.isdisjoint(self.tags) else answer

    def _with_body(self, kind: Any, checks: Sequence[Callable[[Request], Awaitable[Any]]]) -> Handler:
        async def handle(http: Request) -> Response:
            state = http.scope["state"]
            body: Body = state["body"]
            try:
                for check in checks:
                    await check(http)
                given = await body.read(http, kind)
                try:
                    names = ignored_fields(given.ignored())  # before the endpoint lets go of what it has read
                    response: Response = await self.endpoint(given, http)
                except stepgraph.errors.RequestError as error:
                    raise api_error(error, request_id=state["request_id"], spelled=given.spelled) from error
            finally:
                body.release()
            for header, named in names.items():
                logger.warning("request %s: unknown fields were ignored: %s", state["request_id"], named)
                response.headers.append(header, named)
            return response

        return handle


def _limited(answer: Handler) -> Handler:
    async def handle(http: Request) -> Response:
        try:
            async with asyncio.timeout(_QUICK_S):
                return await answer(http)
        except TimeoutError:
            return error_reply(APIError(504, f"the request took longer than {_QUICK_S} s and was ended"), http.scope)

    return handle


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", summary="Continue texts", tags=[_GENERATION])
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await _answer(CompletionCall.start, body, http, service)

    @app.post("/v1/chat/completions", summary="Answer a conversation", tags=[_GENERATION])
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return await _answer(ChatReply.start, body, http, service)

    @app.post("/v1/responses", summary="Answer a conversation; nothing is kept", tags=[_GENERATION])
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        return await _answer(ResponsesReply.start, body, http, service)

    @app.post("/v1/messages", summary="Answer a conversation, as Anthropic's API does", tags=[_GENERATION])
    async def messages(body: MessagesRequest, http: Request) -> Response:
        return await _answer(MessagesReply.start, body, http, service)

    @app.post("/v1/messages/count_tokens", summary="The number of tokens of a conversation", tags=["tokenizer"])
    async def count_message_tokens(body: CountTokensRequest, http: Request) -> Response:
        return Response(await count_tokens(body, service), media_type="application/json")


def _add_models(app: FastAPI, service: Service) -> None:
    def cards() -> list[ModelCard]:
        names, root = service.model_names, service.model.name
        length = None if service.client.ready is None else service.client.ready.max_model_len
        return [
            *(ModelCard(name, service.started_at, "stepgraph", root, None, length) for name in names),
            *(
                ModelCard(name, service.started_at, "stepgraph", folder, names[0], length)
                for name, folder in service.adapters.items()
            ),
        ]

    @app.get("/v1/models", summary="The models that requests can name", tags=["models"])
    async def models() -> Response:
        return json_response(ModelList(cards()))

    @app.get("/v1/models/{name:path}", summary="One of them", tags=["models"])
    async def model(name: str) -> Response:
        if not name:  # /v1/models/
            return json_response(ModelList(cards()))
        service.choose_model(name)
        return json_response(next(card for card in cards() if card.id == name))


async def _answer(
    start: Callable[[Any, Service, Context], Awaitable[Call]], body: Streamable, http: Request, service: Service
) -> Response:
    """Answer a request, whole or as a stream. A client that leaves ends its request."""
    state = http.scope["state"]
    context = Context(
        state["request_id"],
        state["arrived_at"],
        http.headers.get("traceparent"),
        state["at_end"],
        state["body"].release,
    )
    timeout_s = service.config.request_timeout

    async def whole() -> Response:
        call = await start(body, service, context)
        body.let_go()
        if body.stream:
            return EventStream(
                call.events(),
                failed=call.failed,
                request_id=context.request_id,
                spelled=body.spelled,
                timeout_s=timeout_s,
                arrived_at=context.arrived_at,
            )
        return Response(await call.reply(), media_type="application/json")

    try:
        async with asyncio.timeout(timeout_s):
            return await _unless_left(http.receive, whole())
    except TimeoutError:
        assert timeout_s is not None
        return error_reply(timed_out(timeout_s), http.scope)
    except Exception as error:
        return error_reply(report(error, context.request_id, body.spelled), http.scope)


async def _unless_left(receive: Receive, work: Any) -> Response:
    """The result of `work`, which is cancelled when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(receive())  # the body has been read: the next message says that the client is gone
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        return Response(status_code=499)  # nobody reads it, but metrics and logs do
    finally:
        leaving.cancel()
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working
        # an error knows this frame, which knows the task with the error: what was made of the body would wait for the collector
        del working, leaving


def _add_error_handlers(app: FastAPI) -> None:
    async def on_known(http: Request, error: Exception) -> Response:
        return error_reply(api_error(error, request_id=http.scope["state"]["request_id"]), http.scope)

    async def on_http(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, headers = str(error.detail), dict(error.headers or {})
        path = http.scope["path"].removeprefix(app.root_path)
        if error.status_code == 404:
            message = not_found(path, {each.path for each in endpoints(app.routes)})
        elif error.status_code == 405:
            headers["Allow"] = methods_of(app.routes, path)
            message = not_allowed(path, http.method, headers["Allow"])
        return error_reply(APIError(error.status_code, message, headers=headers), http.scope)

    for kind in (APIError, stepgraph.errors.StepgraphError, Exception):
        app.add_exception_handler(kind, on_known)
    app.add_exception_handler(HTTPException, on_http)
