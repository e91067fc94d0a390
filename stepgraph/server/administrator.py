"""Does what administrators ask, with all engines: it is done by all, or an error says which one could not."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol

from stepgraph.errors import EngineDeadError, RequestError, StepgraphError
from stepgraph.server.engine_life import EngineLife
from stepgraph.server.errors import APIError, shortened
from stepgraph.server.messages import (
    AbortAll,
    ForgetAdapter,
    LoadAdapter,
    Pause,
    Question,
    ResetPrefixCache,
    Resume,
    Sleep,
    ToEngine,
    UpdateWeights,
    WakeUp,
)
from stepgraph.server.rest import Rest

logger = logging.getLogger(__name__)

ACTIONS = frozenset(
    {"pause", "resume", "sleep", "wake_up", "update_weights", "reset_prefix_cache", "load_adapter", "unload_adapter"}
)
"""Names of what can be asked."""
_POLL_S = 0.05
_READING_S = 600
"""What reading an adapter may take."""
_MAX_ADAPTERS = 1000
"""Names that requests can give, beside the model's."""
_MAX_NAME = 256


class Fronts(Protocol):
    """Those that take requests for the engines."""

    async def share(self) -> None:
        """Returns once all know how the engines are at rest, and which adapters requests can name."""

    async def num_unfinished(self) -> int:
        """Requests in the engines, one for each answer."""

    def forget_prefixes(self, replica: int) -> None:
        """An engine's prefix cache was emptied."""


class Administrator:
    """Calls about the engines' rest go one after the other, in the order in which they came; a repeated one changes nothing.

    Args:
        engines: all of them.
        fronts: told of what changes.
        rest: how the engines are brought to rest.
        adapters: folders of the LoRA adapters that requests can name.
    """

    def __init__(self, engines: Sequence[EngineLife], fronts: Fronts, rest: Rest, adapters: dict[str, str]):
        self.rest = rest
        self._engines = engines
        self._fronts = fronts
        self._adapters = adapters
        self._turn = asyncio.Lock()
        self._loading: set[str] = set()

    async def pause(self, mode: str) -> None:
        """Let the engines launch no more steps. Requests that come wait.

        Raises:
            APIError: 409 if the mode is to wait for what cannot end.
        """
        self._hasten(mode)
        async with self._turn:
            if not self.rest.paused:
                async with self._coming("is about to be paused" if mode == "wait" else None):
                    await self._clear(mode)
                logger.warning("administration: the engine is paused (mode %s)", mode)
            elif mode != "keep":
                await self._clear(mode)
            self.rest.paused = True  # from here on for the next process, too
            await self._settle(Pause)

    async def resume(self) -> None:
        """Let the engines go on."""
        async with self._turn:
            if self.rest.paused:
                logger.warning("administration: the engine goes on")
            self.rest.paused = False
            await self._settle(Resume)

    async def sleep(self, level: int, mode: str) -> None:
        """Have the engines give their memory back, see `Engine.sleep`; requests that come are refused.

        Raises:
            APIError: 409 if the mode is to wait for what cannot end.
            RequestError: the settings do not allow it.
            EngineDeadError: an engine is not there.
        """
        self._hasten(mode)
        async with self._turn:
            if self.rest.sleep_level < level:
                async with self._coming("is about to sleep"):
                    await self._clear(mode)
                    await self._sleep(level)
                    self.rest.sleep_level = level
                    self._forget_prefixes(self._engines)
                logger.warning("administration: the engine sleeps (level %d, mode %s)", level, mode)
            elif mode != "keep":
                await self._clear(mode)

    async def wake_up(self) -> None:
        """Have the engines take their memory again, and read their weights if they dropped them.

        Raises:
            APIError: 503 if that cannot be done now; the engines sleep on.
        """
        async with self._turn:
            level = self.rest.sleep_level
            if not level:
                return
            outcomes = await _of_each(self._engines, self._wake)
            error = self._first_error(self._engines, outcomes)
            if error is not None:
                awake = [each for each, outcome in zip(self._engines, outcomes, strict=True) if outcome is None]
                await _of_each(awake, lambda engine: engine.ask(partial(Sleep, level=level)))
                raise APIError(503, f"the engine sleeps on: {error}", headers={"Retry-After": "5"}) from error
            self.rest.sleep_level = 0
            await self._fronts.share()
            logger.warning("administration: the engine is awake")

    async def update_weights(self, path: str) -> None:
        """Replace the model's weights, see `Engine.update_weights`; for all processes to come, too. If some engines take them,
        the others are started again with them.

        Raises:
            APIError: 400 for what are no weights of the model, 409 while the engines sleep.
            EngineDeadError: an engine is not there.
        """
        _check_path("model_path", path)
        async with self._turn:
            if self.rest.sleep_level:
                raise APIError(409, "the engine sleeps, and takes no weights; POST /wake_up first", code="conflict")
            if not await asyncio.to_thread(os.path.exists, path):  # or it would be looked for elsewhere
                raise APIError(400, f"model_path={path!r:.200} is not on the server's machine", param="model_path")
            self._require(self._engines)
            outcomes = await _of_each(self._engines, lambda engine: engine.ask(partial(UpdateWeights, folder=path)))
            error = self._first_error(self._engines, outcomes)
            if error is not None and all(isinstance(outcome, Exception) for outcome in outcomes):
                if isinstance(error, RequestError):
                    raise APIError(400, str(error), param="model_path") from error
                raise error
            for engine, outcome in zip(self._engines, outcomes, strict=True):
                engine.weights = path
                if isinstance(outcome, Exception):
                    engine.replace()
            self._forget_prefixes(self._engines)
            if error is not None:
                raise EngineDeadError(f"{error}; it is started again with the weights that the others have") from error
            logger.warning("administration: the weights are those of %s", path)

    async def reset_prefix_cache(self, *, preempt: bool) -> int:
        """Forget cached prefixes; how many blocks of running requests can still be found, see `Engine.reset_prefix_cache`.

        Raises:
            EngineDeadError: an engine is not there.
        """
        async with self._turn:
            there = self._not_dormant()
            kept = await self._ask(there, partial(ResetPrefixCache, preempt=preempt))
            self._forget_prefixes(there)
            return sum(kept)

    async def load_adapter(self, name: str, folder: str, *, inplace: bool) -> str:
        """Let requests name a LoRA adapter as their model. Returns what was done, in a sentence.

        Raises:
            APIError: 400 for an adapter that the model cannot run, or too many; 409 for a name that is taken.
            EngineDeadError: no engine is there, or the folder cannot be read in time.
        """
        adapters = self._adapters
        if not (name.isprintable() and 0 < len(name) <= _MAX_NAME):
            raise APIError(
                400, f"lora_name must have 1 to {_MAX_NAME} printable characters; give another", param="lora_name"
            )
        _check_path("lora_path", folder)
        if name in self._loading:
            raise taken(f"an adapter {name!r} is being loaded; try again when it is")
        before = adapters.get(name)
        if before == folder and not inplace:
            return f"{name} was loaded already, and is as it was then; load_inplace reads it again"
        if before is not None and not inplace:
            raise taken(
                f"lora_name {name!r} is the name of the adapter in {before}; unload that, or replace it with load_inplace"
            )
        if before is None and len(adapters) + len(self._loading) >= _MAX_ADAPTERS:
            raise APIError(400, f"{_MAX_ADAPTERS} adapters are loaded, as many as can be; unload one")
        ready = [engine for engine in self._engines if engine.is_ready] or self._engines
        self._loading.add(name)
        try:  # one that is being started reads it when it is asked for
            await self._ask(ready, partial(LoadAdapter, folder=folder, anew=inplace), _READING_S)
        except RequestError as error:
            self._forget(folder)
            raise APIError(400, str(error), param="lora_path") from error
        finally:
            self._loading.discard(name)
        adapters[name] = folder
        await self._fronts.share()
        if before is not None:
            self._forget(before)
        logger.warning("administration: LoRA adapter %s is loaded from %s", name, folder)
        return f"{name} is loaded" if before is None else f"{name} is replaced"

    async def unload_adapter(self, name: str) -> str:
        """Let no more requests name an adapter; those under way keep it. Returns what was done, in a sentence.

        Raises:
            APIError: 404 if there is none of that name.
        """
        adapters = self._adapters
        if name not in adapters:
            raise APIError(
                404,
                f"no adapter {name!r:.200} is loaded; these are: {shortened(tuple(adapters)) or 'none'}",
                param="lora_name",
                code="model_not_found",
            )
        folder = adapters.pop(name)
        await self._fronts.share()
        self._forget(folder)
        logger.warning("administration: LoRA adapter %s is unloaded", name)
        return f"{name} is unloaded"

    def _forget(self, folder: str) -> None:
        """No name is that of the adapter in `folder` any more; unless another one is, it is read again if it is loaded again."""
        if folder not in self._adapters.values():
            self._tell(ForgetAdapter(folder))

    def _forget_prefixes(self, engines: Iterable[EngineLife]) -> None:
        for engine in engines:
            self._fronts.forget_prefixes(engine.replica)

    @asynccontextmanager
    async def _coming(self, what: str | None) -> AsyncIterator[None]:
        self.rest.coming = None if what is None else f"the engine {what}"
        try:
            await self._fronts.share()
            yield
        finally:
            self.rest.coming = None
            await self._fronts.share()

    def _hasten(self, mode: str) -> None:
        """Let a call that has its turn wait no longer for requests that the next one aborts."""
        if mode == "abort" and self._turn.locked():
            self._tell(AbortAll())

    async def _clear(self, mode: str) -> None:
        """Do with requests under way as the mode says."""
        if mode == "abort":
            self._tell(AbortAll())
        elif mode == "wait":
            num_unfinished = await self._fronts.num_unfinished()
            if num_unfinished and (self.rest.paused or self.rest.sleep_level):
                raise APIError(
                    409,
                    f"{num_unfinished} requests wait for the engine, which rests: they cannot end; let it go on, or "
                    "choose mode=keep or mode=abort",
                    code="conflict",
                )
            while await self._fronts.num_unfinished():
                await asyncio.sleep(_POLL_S)

    async def _settle(self, question: type[Pause] | type[Resume]) -> None:
        """Bring the running processes to the state that is set; the next ones come to it by themselves."""
        await self._fronts.share()
        for engine in self._engines:
            if engine.is_ready:
                with suppress(EngineDeadError):
                    await engine.ask(question)

    async def _sleep(self, level: int) -> None:
        """All engines sleep afterwards, or none more than before."""
        there = self._not_dormant()
        self._require(there)
        outcomes = await _of_each(there, lambda engine: engine.ask(partial(Sleep, level=level)))
        error = self._first_error(there, outcomes)
        if error is None:
            return
        if not self.rest.sleep_level:
            asleep = [engine for engine, outcome in zip(there, outcomes, strict=True) if outcome is None]
            await _of_each(asleep, lambda engine: engine.ask(WakeUp))
        raise error

    async def _wake(self, engine: EngineLife) -> None:
        if engine.status.is_dormant:
            await engine.start_dormant()
        else:
            await engine.ask(WakeUp)

    def _not_dormant(self) -> list[EngineLife]:
        return [engine for engine in self._engines if not engine.status.is_dormant]

    def _require(self, engines: Iterable[EngineLife]) -> None:
        """Raise EngineDeadError, before anything is done, if one of them is not there."""
        for engine in engines:
            if not engine.is_ready:
                error = EngineDeadError(engine.status.trouble or "the engine is not there")
                raise self._named(engine, error)

    async def _ask(
        self, engines: Sequence[EngineLife], question: Callable[[int], Question], timeout_s: float | None = None
    ) -> list[Any]:
        """The answers of all; raises what the first one raises that does not answer, once all are done."""
        outcomes = await _of_each(engines, lambda engine: engine.ask(question, timeout_s))
        if (error := self._first_error(engines, outcomes)) is not None:
            raise error
        return outcomes

    def _tell(self, message: ToEngine) -> None:
        for engine in self._engines:
            engine.tell(message)

    def _first_error(self, engines: Sequence[EngineLife], outcomes: Sequence[Any]) -> Exception | None:
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, Exception):
                return self._named(engine, outcome)
        return None

    def _named(self, engine: EngineLife, error: Exception) -> Exception:
        """The error, which says whose it is."""
        if len(self._engines) == 1 or not isinstance(error, StepgraphError):
            return error
        return type(error)(f"engine {engine.replica}: {error}", param=error.param, code=error.code)


async def _of_each(engines: Sequence[EngineLife], work: Callable[[EngineLife], Any]) -> list[Any]:
    """What the work gives of each, or its exception. StepgraphErrors only: others are raised."""
    outcomes = await asyncio.gather(*map(work, engines), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, StepgraphError):
            raise outcome
    return outcomes


def taken(message: str) -> APIError:
    """A 409 for a name that another adapter, or the model, has."""
    return APIError(409, message, param="lora_name", code="conflict")


def _check_path(field: str, path: str) -> None:
    if not (path and path.isprintable()):
        raise APIError(400, f"{field} must be a path in printable characters", param=field)
