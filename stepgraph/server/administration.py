"""Endpoints that change what is served: they bring the engines to rest and wake them, and load weights and LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Query, Request
from starlette.responses import Response

from stepgraph.server.administrator import taken
from stepgraph.server.errors import APIError
from stepgraph.server.protocol import LoadAdapterRequest, UnloadAdapterRequest, UpdateWeightsRequest
from stepgraph.server.replies import ignored_fields, json_response
from stepgraph.server.service import Service

ADMINISTRATION = "administration"
"""Tag of these endpoints."""
_MODES = ("keep", "wait", "abort")
_MODE = Query("keep", description="of requests under way: keep them for later, wait until they end, or abort them")
_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def add_administration(app: FastAPI, service: Service) -> None:
    """The routes."""
    rest, administer = service.client.rest, service.control.administer
    origins = service.config.cors_allow_origins or ()

    async def own_origin(http: Request) -> None:
        """A page of another site could send what has no body, without being let in by CORS."""
        origin = http.headers.get("origin")
        if origin is None or "*" in origins or origin in origins or origin.endswith(f"://{http.headers.get('host')}"):
            return
        raise APIError(
            403, f"pages of {origin[:100]} may not administer this server; see cors_allow_origins", code="forbidden"
        )

    post = partial(app.post, tags=[ADMINISTRATION], dependencies=[Depends(own_origin)])

    @post("/sleep", summary="Give the engine's memory back")
    async def sleep(
        http: Request,
        level: str = Query("1", description="1 keeps the weights in host memory, 2 drops them"),
        mode: str = _MODE,
    ) -> Response:
        if level not in ("1", "2"):
            raise APIError(400, f"level={level[:20]!r} must be 1 or 2", param="level")
        await administer("sleep", level=int(level), mode=_choice(mode))
        return _done(http, {"status": "asleep", "level": rest.sleep_level}, "level", "mode")

    @post("/wake_up", summary="Take the memory again, and serve")
    async def wake_up(http: Request) -> Response:
        tags = set(http.query_params.getlist("tags"))
        if tags and tags != {"weights", "kv_cache"}:
            raise APIError(400, "the engine wakes up as a whole; leave tags out", param="tags")
        await administer("wake_up")
        return _done(http, {"status": "awake"}, "tags")

    @app.get("/is_sleeping", summary="Whether the engine sleeps", tags=[ADMINISTRATION])
    async def is_sleeping(http: Request) -> Response:
        return _done(http, {"is_sleeping": rest.sleep_level > 0, "level": rest.sleep_level})

    @post("/pause", summary="Launch no more steps; requests wait")
    async def pause(http: Request, mode: str = _MODE) -> Response:
        await administer("pause", mode=_choice(mode))
        return _done(http, {"status": "paused"}, "mode")

    @post("/resume", summary="Launch steps again")
    async def resume(http: Request) -> Response:
        await administer("resume")
        return _done(http, {"status": "resumed"})

    @app.get("/is_paused", summary="Whether the engine is paused", tags=[ADMINISTRATION])
    async def is_paused(http: Request) -> Response:
        return _done(http, {"is_paused": rest.paused})

    @post("/reset_prefix_cache", summary="Forget the prefixes of earlier requests")
    async def reset_prefix_cache(
        http: Request,
        reset_running_requests: str = Query(
            "false", description="forget those of running requests too, which are computed again"
        ),
    ) -> Response:
        preempt = _SWITCHES.get(reset_running_requests.lower())
        if preempt is None:
            raise APIError(
                400,
                f"reset_running_requests={reset_running_requests[:20]!r} must be true or false",
                param="reset_running_requests",
            )
        kept = await administer("reset_prefix_cache", preempt=preempt)
        return _done(http, {"success": kept == 0, "kept_blocks": kept}, "reset_running_requests")

    @post("/update_weights_from_disk", summary="Replace the model's weights")
    async def update_weights_from_disk(body: UpdateWeightsRequest, http: Request) -> Response:
        await administer("update_weights", path=body.model_path)
        return _done(http, {"success": True})

    @post("/v1/load_lora_adapter", summary="Let requests name a LoRA adapter")
    async def load_lora_adapter(body: LoadAdapterRequest, http: Request) -> Response:
        if body.lora_name in service.model_names:
            raise taken(f"lora_name {body.lora_name!r} is the name of the model; give the adapter another")
        done = await administer("load_adapter", name=body.lora_name, folder=body.lora_path, inplace=body.load_inplace)
        return _done(http, {"status": "ok", "message": done})

    @post("/v1/unload_lora_adapter", summary="Let requests name it no more")
    async def unload_lora_adapter(body: UnloadAdapterRequest, http: Request) -> Response:
        done = await administer("unload_adapter", name=body.lora_name)
        return _done(http, {"status": "ok", "message": done})


def _choice(mode: str) -> str:
    if mode not in _MODES:
        raise APIError(400, f"mode={mode[:20]!r} is not known; choose one of: {', '.join(_MODES)}", param="mode")
    return mode


def _done(http: Request, content: Mapping[str, Any], *known: str) -> Response:
    """The reply, which names what of the request's URL was ignored: all but the `known` parameters."""
    return json_response(content, ignored_fields(sorted(http.query_params.keys() - set(known))))
