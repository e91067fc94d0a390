"""Endpoints for those who run the server: what there is, how it is, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

import stepgraph
from stepgraph.server.directory import endpoints
from stepgraph.server.page import Page
from stepgraph.server.pages import index_page, reference_page
from stepgraph.server.replies import encode_json, json_response
from stepgraph.server.service import Service
from stepgraph.version import commit


def add_operations(app: FastAPI, service: Service, page: Page | None) -> None:
    """Those of the API's port. `page`: what a browser is shown at the server's address; None: a list of the endpoints."""
    add_health(app, service)
    _add_pages(app, service, page)

    @app.get("/ready", summary="Whether a request sent now would be served", tags=["operations"])
    async def ready() -> Response:
        return _status(service.trouble or service.client.rest.delay or service.fullness)

    @app.get("/version", summary="The server's version, and the commit that it was made of", tags=["operations"])
    async def version() -> Response:
        return json_response({"version": stepgraph.__version__, "commit": await service.in_thread(commit)})

    @app.get("/load", summary="Requests that run or wait", tags=["operations"])
    async def load() -> Response:
        loads = await service.control.load()
        each = {"engines": loads} if len(loads) > 1 else {}
        return json_response({"server_load": sum(loads)} | each)

    @app.get("/graphs", summary="The captured graphs and their use", tags=["operations"])
    async def graphs() -> Response:
        found = await service.control.graphs()
        return json_response(found[0] if len(found) == 1 else _summed(found))


def add_health(app: FastAPI, service: Service) -> None:
    """Those of the metrics' port, too."""

    @app.post("/ping", summary="The same as /health", tags=["operations"])  # as SageMaker asks
    @app.get("/ping", summary="The same as /health", tags=["operations"])
    @app.get("/health", summary="Whether the model is loaded and the engine alive", tags=["operations"])
    async def health() -> Response:
        return _status(service.ailment, service.client.rest.status, service.client.troubles)

    @app.get("/metrics", summary="Metrics for Prometheus", tags=["operations"])
    async def read_metrics(http: Request) -> Response:
        content, media_type = await service.control.metrics(http.headers.get("accept"))
        return Response(content, media_type=media_type)


def _add_pages(app: FastAPI, service: Service, page: Page | None) -> None:
    @app.get("/", summary="What there is; in a browser, a page to look at", tags=["operations"])
    async def index(http: Request) -> Response:
        found = endpoints(app.routes)
        if "text/html" in http.headers.get("accept", ""):
            return page.index(http) if page is not None else index_page(stepgraph.__version__, found, app.root_path)
        listed = [{"methods": each.methods, "path": each.path, "summary": each.summary} for each in found]
        return json_response({"name": "stepgraph", "version": stepgraph.__version__, "endpoints": listed})

    @app.get("/docs", summary="The fields of all requests, as a page", tags=["operations"])
    async def docs() -> Response:
        return await service.in_thread(lambda: reference_page(app.openapi()))


def _summed(engines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the engines say of their graphs: each, and the sums of what can be added."""
    told = [engine for engine in engines if "error" not in engine]
    sums = {name: sum(engine[name] for engine in told) for name, value in told[0].items() if isinstance(value, int)}
    reasons = {reason for engine in told for reason in engine["eager_reasons"]}
    eager = {reason: sum(engine["eager_reasons"].get(reason, 0) for engine in told) for reason in sorted(reasons)}
    return {**sums, "eager_reasons": eager, "engines": list(engines)}


def _status(trouble: str | None, well: str = "ok", of_engines: Sequence[str | None] = ()) -> Response:
    if trouble is None:
        each = {"engines": [one or "ok" for one in of_engines]} if len(of_engines) > 1 else {}
        return json_response({"status": well} | each)
    return Response(encode_json({"status": trouble}), 503, media_type="application/json", headers={"Retry-After": "2"})
