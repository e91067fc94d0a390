"""Endpoints that change what is served: they bring the engine to rest and wake it, and load weights and LoRA adapters."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Query, Request
from starlette.responses import Response

from stepgraph.errors import EngineDeadError, RequestError
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.errors import APIError
from stepgraph.server.messages import (
    AbortAll,
    ForgetAdapter,
    LoadAdapter,
    Pause,
    ResetPrefixCache,
    Resume,
    Sleep,
    UpdateWeights,
    WakeUp,
)
from stepgraph.server.protocol import LoadAdapterRequest, UnloadAdapterRequest, UpdateWeightsRequest
from stepgraph.server.replies import ignored_fields, json_response
from stepgraph.server.service import Service, shortened

logger = logging.getLogger(__name__)

ADMINISTRATION = "administration"
"""Tag of these endpoints."""
_MODES = ("keep", "wait", "abort")
_MODE = Query("keep", description="of requests under way: keep them for later, wait until they end, or abort them")
_SWITCHES = {"true": True, "1": True, "false": False, "0": False}
_POLL_S = 0.05
_READING_S = 600
"""What reading an adapter may take."""
_MAX_ADAPTERS = 1000
"""Names that requests can give, beside the model's."""
_MAX_NAME = 256


class Administration:
    """Does what administrators ask. Calls about the engine's rest go one after the other, in the order in which they came; a
    repeated one changes nothing.
    """

    def __init__(self, service: Service):
        self.service = service
        self._client, self.rest = service.client, service.client.rest
        self._turn = asyncio.Lock()
        self._loading: set[str] = set()

    async def pause(self, mode: str) -> None:
        """Let the engine launch no more steps. Requests that come wait.

        Raises:
            APIError: 409 if the mode is to wait for what cannot end.
        """
        self._hasten(mode)
        async with self._turn:
            if not self.rest.paused:
                with self._coming("is about to be paused" if mode == "wait" else None):
                    await self._clear(mode)
                logger.warning("administration: the engine is paused (mode %s)", mode)
            elif mode != "keep":
                await self._clear(mode)
            self.rest.paused = True  # from here on for the next process, too
            await self._settle(Pause)

    async def resume(self) -> None:
        """Let the engine go on."""
        async with self._turn:
            if self.rest.paused:
                logger.warning("administration: the engine goes on")
            self.rest.paused = False
            await self._settle(Resume)

    async def sleep(self, level: int, mode: str) -> None:
        """Have the engine give its memory back, see `Engine.sleep`; requests that come are refused.

        Raises:
            APIError: 409 if the mode is to wait for what cannot end.
            RequestError: the settings do not allow it.
            EngineDeadError: the engine is not there.
        """
        self._hasten(mode)
        async with self._turn:
            if self.rest.sleep_level < level:
                with self._coming("is about to sleep"):
                    await self._clear(mode)
                    if not self._client.is_dormant:
                        await self._client.ask(partial(Sleep, level=level))
                    self.rest.sleep_level = level
                logger.warning("administration: the engine sleeps (level %d, mode %s)", level, mode)
            elif mode != "keep":
                await self._clear(mode)

    async def wake_up(self) -> None:
        """Have the engine take its memory again, and read its weights if it dropped them.

        Raises:
            APIError: 503 if that cannot be done now; the engine sleeps on.
        """
        async with self._turn:
            if not self.rest.sleep_level:
                return
            try:
                if not self._client.is_dormant:
                    await self._client.ask(WakeUp)
                else:
                    await self._client.start_dormant()
            except (RequestError, EngineDeadError) as error:
                raise APIError(503, f"the engine sleeps on: {error}", headers={"Retry-After": "5"}) from error
            self.rest.sleep_level = 0
            logger.warning("administration: the engine is awake")

    async def update_weights(self, path: str) -> None:
        """Replace the model's weights, see `Engine.update_weights`; for all processes to come, too.

        Raises:
            APIError: 400 for what are no weights of the model, 409 while the engine sleeps.
            EngineDeadError: the engine is not there.
        """
        _check_path("model_path", path)
        async with self._turn:
            if self.rest.sleep_level:
                raise APIError(409, "the engine sleeps, and takes no weights; POST /wake_up first", code="conflict")
            if not await asyncio.to_thread(os.path.exists, path):  # or it would be looked for elsewhere
                raise APIError(400, f"model_path={path!r:.200} is not on the server's machine", param="model_path")
            try:
                await self._client.ask(partial(UpdateWeights, folder=path))
            except RequestError as error:
                raise APIError(400, str(error), param="model_path") from error
            self._client.weights = path
            logger.warning("administration: the weights are those of %s", path)

    async def reset_prefix_cache(self, *, preempt: bool) -> int:
        """Forget cached prefixes; how many blocks of running requests can still be found, see `Engine.reset_prefix_cache`.

        Raises:
            EngineDeadError: the engine is not there.
        """
        async with self._turn:
            if self._client.is_dormant:
                return 0
            kept: int = await self._client.ask(partial(ResetPrefixCache, preempt=preempt))
            return kept

    async def load_adapter(self, name: str, folder: str, *, inplace: bool) -> str:
        """Let requests name a LoRA adapter as their model. Returns what was done, in a sentence.

        Raises:
            APIError: 400 for an adapter that the model cannot run, or too many; 409 for a name that is taken.
            EngineDeadError: the engine is not there, or the folder cannot be read in time.
        """
        adapters = self.service.adapters
        if not (name.isprintable() and 0 < len(name) <= _MAX_NAME):
            raise APIError(
                400, f"lora_name must have 1 to {_MAX_NAME} printable characters; give another", param="lora_name"
            )
        _check_path("lora_path", folder)
        if name in self.service.model_names:
            raise _taken(f"lora_name {name!r} is the name of the model; give the adapter another")
        if name in self._loading:
            raise _taken(f"an adapter {name!r} is being loaded; try again when it is")
        before = adapters.get(name)
        if before == folder and not inplace:
            return f"{name} was loaded already, and is as it was then; load_inplace reads it again"
        if before is not None and not inplace:
            raise _taken(
                f"lora_name {name!r} is the name of the adapter in {before}; unload that, or replace it with load_inplace"
            )
        if before is None and len(adapters) + len(self._loading) >= _MAX_ADAPTERS:
            raise APIError(400, f"{_MAX_ADAPTERS} adapters are loaded, as many as can be; unload one")
        self._loading.add(name)
        try:
            await self._client.ask(partial(LoadAdapter, folder=folder, anew=inplace), _READING_S)
        except RequestError as error:
            raise APIError(400, str(error), param="lora_path") from error
        finally:
            self._loading.discard(name)
        adapters[name] = folder
        if before is not None:
            self._forget(before)
        logger.warning("administration: LoRA adapter %s is loaded from %s", name, folder)
        return f"{name} is loaded" if before is None else f"{name} is replaced"

    def unload_adapter(self, name: str) -> str:
        """Let no more requests name an adapter; those under way keep it. Returns what was done, in a sentence.

        Raises:
            APIError: 404 if there is none of that name.
        """
        adapters = self.service.adapters
        if name not in adapters:
            raise APIError(
                404,
                f"no adapter {name!r:.200} is loaded; these are: {shortened(tuple(adapters)) or 'none'}",
                param="lora_name",
                code="model_not_found",
            )
        self._forget(adapters.pop(name))
        logger.warning("administration: LoRA adapter %s is unloaded", name)
        return f"{name} is unloaded"

    def _forget(self, folder: str) -> None:
        """No name is that of the adapter in `folder` any more; unless another one is, it is read again if it is loaded again."""
        if folder not in self.service.adapters.values():
            self._client.tell(ForgetAdapter(folder))

    @contextmanager
    def _coming(self, what: str | None) -> Iterator[None]:
        self.rest.coming = None if what is None else f"the engine {what}"
        try:
            yield
        finally:
            self.rest.coming = None

    def _hasten(self, mode: str) -> None:
        """Let a call that has its turn wait no longer for requests that the next one aborts."""
        if mode == "abort" and self._turn.locked():
            self._client.tell(AbortAll())

    async def _clear(self, mode: str) -> None:
        """Do with requests under way as the mode says."""
        if mode == "abort":
            self._client.tell(AbortAll())
        elif mode == "wait":
            if self._client.num_unfinished and (self.rest.paused or self.rest.sleep_level):
                raise APIError(
                    409,
                    f"{self._client.num_unfinished} requests wait for the engine, which rests: they cannot end; let it go on, or "
                    "choose mode=keep or mode=abort",
                    code="conflict",
                )
            while self._client.num_unfinished:
                await asyncio.sleep(_POLL_S)

    async def _settle(self, question: type[Pause] | type[Resume]) -> None:
        """Bring the running process to the state that is set; the next one comes to it by itself."""
        if self._client.state is EngineState.READY:
            with suppress(EngineDeadError):
                await self._client.ask(question)


def add_administration(app: FastAPI, administration: Administration) -> None:
    """The routes."""
    rest = administration.rest
    origins = administration.service.config.cors_allow_origins or ()

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
        await administration.sleep(int(level), _choice(mode))
        return _done(http, {"status": "asleep", "level": rest.sleep_level}, "level", "mode")

    @post("/wake_up", summary="Take the memory again, and serve")
    async def wake_up(http: Request) -> Response:
        tags = set(http.query_params.getlist("tags"))
        if tags and tags != {"weights", "kv_cache"}:
            raise APIError(400, "the engine wakes up as a whole; leave tags out", param="tags")
        await administration.wake_up()
        return _done(http, {"status": "awake"}, "tags")

    @app.get("/is_sleeping", summary="Whether the engine sleeps", tags=[ADMINISTRATION])
    async def is_sleeping(http: Request) -> Response:
        return _done(http, {"is_sleeping": rest.sleep_level > 0, "level": rest.sleep_level})

    @post("/pause", summary="Launch no more steps; requests wait")
    async def pause(http: Request, mode: str = _MODE) -> Response:
        await administration.pause(_choice(mode))
        return _done(http, {"status": "paused"}, "mode")

    @post("/resume", summary="Launch steps again")
    async def resume(http: Request) -> Response:
        await administration.resume()
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
        kept = await administration.reset_prefix_cache(preempt=preempt)
        return _done(http, {"success": kept == 0, "kept_blocks": kept}, "reset_running_requests")

    @post("/update_weights_from_disk", summary="Replace the model's weights")
    async def update_weights_from_disk(body: UpdateWeightsRequest, http: Request) -> Response:
        await administration.update_weights(body.model_path)
        return _done(http, {"success": True})

    @post("/v1/load_lora_adapter", summary="Let requests name a LoRA adapter")
    async def load_lora_adapter(body: LoadAdapterRequest, http: Request) -> Response:
        done = await administration.load_adapter(body.lora_name, body.lora_path, inplace=body.load_inplace)
        return _done(http, {"status": "ok", "message": done})

    @post("/v1/unload_lora_adapter", summary="Let requests name it no more")
    async def unload_lora_adapter(body: UnloadAdapterRequest, http: Request) -> Response:
        done = administration.unload_adapter(body.lora_name)
        return _done(http, {"status": "ok", "message": done})


def _choice(mode: str) -> str:
    if mode not in _MODES:
        raise APIError(400, f"mode={mode[:20]!r} is not known; choose one of: {', '.join(_MODES)}", param="mode")
    return mode


def _done(http: Request, content: Mapping[str, Any], *known: str) -> Response:
    """The reply, which names what of the request's URL was ignored: all but the `known` parameters."""
    return json_response(content, ignored_fields(sorted(http.query_params.keys() - set(known))))


def _check_path(field: str, path: str) -> None:
    if not (path and path.isprintable()):
        raise APIError(400, f"{field} must be a path in printable characters", param=field)


def _taken(message: str) -> APIError:
    return APIError(409, message, param="lora_name", code="conflict")
