"""The HTTP application: which path does what."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias, get_type_hints

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive

import stepgraph
from stepgraph.engine.prompts import require_tokenizer
from stepgraph.errors import RequestError
from stepgraph.server.bodies import Body
from stepgraph.server.chat import ChatReply
from stepgraph.server.completions import CompletionCall
from stepgraph.server.conversation import plain_messages
from stepgraph.server.door import Door
from stepgraph.server.errors import APIError, api_error, error_response, report, timed_out
from stepgraph.server.metrics import Metrics
from stepgraph.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from stepgraph.server.replies import ModelCard, ModelList, Text, Tokens, encode_json
from stepgraph.server.responses import ResponsesReply, ResponsesRequest
from stepgraph.server.service import Context, Service
from stepgraph.server.sse import EventStream

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]

_GENERATION = "generation"
_QUICK_S = 60
"""What endpoints that generate nothing may take; for the others there is request_timeout."""


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

    def ignored(self) -> list[str]:
        """Names of the fields that nothing here knows."""

    def let_go(self) -> None:
        """Forget what only the prompt was made of."""


def create_app(service: Service, metrics: Metrics, *, api_keys: Sequence[str]) -> ASGIApp:
    """The application, ready for an ASGI server."""
    config = service.config
    app = FastAPI(
        title="stepgraph",
        version=stepgraph.__version__,
        description="An OpenAI-compatible service; every step of the model is one launch of one captured graph.",
        root_path=config.root_path or "",
    )
    app.router.route_class = _Route
    _add_error_handlers(app)
    _add_generation(app, service)
    _add_tokenizer(app, service)
    _add_models(app, service)
    _add_operations(app, service, metrics)
    door = Door(
        app,
        api_keys=tuple(api_keys),
        bodies=service.bodies,
        on_response=metrics.on_response,
    )
    if not config.cors_allow_origins:
        return door
    # around the door: web pages shall see why they are turned away, and browsers ask without a key whether they may send one
    return CORSMiddleware(door, allow_origins=config.cors_allow_origins, allow_methods=["*"], allow_headers=["*"])


def create_metrics_app(service: Service, metrics: Metrics) -> ASGIApp:
    """What --metrics-port serves: /metrics and /health."""
    app = FastAPI(title="stepgraph metrics", version=stepgraph.__version__, openapi_url=None)
    app.router.route_class = _Route
    _add_error_handlers(app)
    _add_health(app, service, metrics)
    return app


class _Route(APIRoute):
    """Reads a body in our own way, which FastAPI would do on the event loop, whatever its size; and has a time limit."""

    def get_route_handler(self) -> Handler:
        """See `APIRoute`."""
        answer = super().get_route_handler()
        if (kind := get_type_hints(self.endpoint).get("body")) is not None:
            answer = self._with_body(kind)
        return answer if _GENERATION in self.tags else _limited(answer)

    def _with_body(self, kind: Any) -> Handler:
        async def handle(http: Request) -> Response:
            body: Body = http.scope["state"]["body"]
            try:
                response: Response = await self.endpoint(await body.read(http, kind), http)
            finally:
                body.release()
            return response

        return handle


def _limited(answer: Handler) -> Handler:
    async def handle(http: Request) -> Response:
        try:
            async with asyncio.timeout(_QUICK_S):
                return await answer(http)
        except TimeoutError:
            return error_response(APIError(504, f"the request took longer than {_QUICK_S} s and was ended"))

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


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", summary="The tokens of a text or a conversation", tags=["tokenizer"])
    async def tokenize(body: TokenizeRequest, http: Request) -> Response:
        service.choose_model(body.model)
        tokenizer = require_tokenizer(service.face.tokenizer)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("/tokenize takes prompt or messages; give one of them")

        def tokens() -> Tokens:
            if body.prompt is not None:
                prompt = service.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
            else:
                messages = plain_messages(body.messages or ())
                service.check_turns(messages)
                tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
                text = service.chat_form.template.render(messages, tools, **body.rendering())
                prompt = service.encode(text, add_special_tokens=body.add_special_tokens is True)
            ids = prompt.token_ids
            texts = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
            return Tokens(ids, len(ids), service.max_model_len, texts)

        return _json(await service.in_thread(tokens))

    @app.post("/detokenize", summary="The text of tokens", tags=["tokenizer"])
    async def detokenize(body: DetokenizeRequest, http: Request) -> Response:
        service.choose_model(body.model)
        tokenizer = require_tokenizer(service.face.tokenizer)
        if wrong := next((token for token in body.tokens if not 0 <= token < 2**31), None):
            raise RequestError(f"tokens holds {wrong}, which is no token id; ids are whole numbers from 0 up")
        return _json(Text(await service.in_thread(lambda: tokenizer.decode(body.tokens))))


def _add_models(app: FastAPI, service: Service) -> None:
    def cards() -> list[ModelCard]:
        names, root = service.model_names, service.face.name
        length = None if service.client.ready is None else service.client.ready.max_model_len
        return [
            *(ModelCard(name, service.started_at, "stepgraph", root, None, length) for name in names),
            *(
                ModelCard(name, service.started_at, "stepgraph", folder, names[0], length)
                for name, folder in service.config.adapters().items()
            ),
        ]

    @app.get("/v1/models", summary="The models that requests can name", tags=["models"])
    async def models() -> Response:
        return _json(ModelList(cards()))

    @app.get("/v1/models/{name:path}", summary="One of them", tags=["models"])
    async def model(name: str) -> Response:
        service.choose_model(name)
        return _json(next(card for card in cards() if card.id == name))


def _add_operations(app: FastAPI, service: Service, metrics: Metrics) -> None:
    _add_health(app, service, metrics)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", summary="Whether a request sent now would be served", tags=["operations"])
    async def ready() -> Response:
        return _status(service.trouble or service.fullness)

    @app.get("/version", summary="The server's version", tags=["operations"])
    async def version() -> Response:
        return _json({"version": stepgraph.__version__})

    @app.get("/load", summary="Requests that run or wait", tags=["operations"])
    async def load() -> Response:
        return _json({"server_load": service.client.num_unfinished})

    @app.get("/graphs", summary="The captured graphs and their use", tags=["operations"])
    async def graphs() -> Response:
        return _json(await service.client.graphs())


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.head("/health", include_in_schema=False)  # as load balancers ask
    @app.get("/health", summary="Whether the model is loaded and the engine alive", tags=["operations"])
    async def health() -> Response:
        return _status(service.trouble if not service.draining else service.client.trouble)

    @app.get("/metrics", summary="Metrics for Prometheus", tags=["operations"])
    async def read_metrics(http: Request) -> Response:
        content, media_type = metrics.render(http.headers.get("accept"))
        return Response(content, media_type=media_type)


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
    headers = _ignored_fields(body, context.request_id)
    timeout_s = service.config.request_timeout

    async def whole() -> Response:
        call = await start(body, service, context)
        body.let_go()
        if body.stream:
            return EventStream(
                call.events(),
                failed=call.failed,
                request_id=context.request_id,
                headers=headers,
                timeout_s=_left(timeout_s, context),
            )
        return Response(await call.reply(), media_type="application/json", headers=headers)

    try:
        async with asyncio.timeout(timeout_s):
            return await _unless_left(http.receive, whole())
    except TimeoutError:
        assert timeout_s is not None
        return error_response(timed_out(timeout_s))
    except Exception as error:
        return error_response(report(error, context.request_id))


def _left(timeout_s: float | None, context: Context) -> float | None:
    """Seconds that a request has left."""
    return None if timeout_s is None else max(0.001, context.arrived_at + timeout_s - time.monotonic())


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


def _ignored_fields(body: Streamable, request_id: str) -> Mapping[str, str]:
    ignored = [name for name in body.ignored() if name.isascii() and name.isprintable()]
    if not ignored:
        return {}
    named = ", ".join(ignored)[:500]
    logger.warning("request %s: unknown fields were ignored: %s", request_id, named)
    return {"X-Ignored-Fields": named}


def _add_error_handlers(app: FastAPI) -> None:
    async def on_known(http: Request, error: Exception) -> Response:
        return error_response(api_error(error, request_id=http.scope["state"]["request_id"]))

    async def on_http(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {http.scope['path']}; /docs lists what there is"
        elif error.status_code == 405:
            message = f"{http.scope['path']} does not take {http.method}"
        return error_response(APIError(error.status_code, message, headers=error.headers))

    for kind in (APIError, stepgraph.errors.StepgraphError, Exception):
        app.add_exception_handler(kind, on_known)
    app.add_exception_handler(HTTPException, on_http)


def _status(trouble: str | None) -> Response:
    if trouble is None:
        return _json({"status": "ok"})
    return Response(encode_json({"status": trouble}), 503, media_type="application/json", headers={"Retry-After": "2"})


def _json(content: Any) -> Response:
    return Response(encode_json(content), media_type="application/json")
