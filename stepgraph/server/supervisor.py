"""Owns the engines: their processes' lives, how they are brought to rest, their weights and adapters, and what they count."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from stepgraph.errors import EngineDeadError, StepgraphError
from stepgraph.server.administrator import ACTIONS, Administrator, Fronts
from stepgraph.server.counts import EngineCounts, FrontCounts
from stepgraph.server.engine_life import EngineLife, Launch
from stepgraph.server.engine_observer import EngineStatus, RestartCause
from stepgraph.server.messages import AskGraphs, AskRanks, FromEngine, Load, Progress, RankInfo, Seen
from stepgraph.server.metrics import Metrics
from stepgraph.server.replicas import Replicas
from stepgraph.server.rest import Rest
from stepgraph.server.socket_folder import remove_abandoned
from stepgraph.server.watched import Watched

_LOOK_S = 0.5
"""What it may take where a scraper waits."""
_RANKS_S = 2.0
"""They are not asked again for so long, however many scrapers come."""
_ANSWER_S = 30.0
"""How long an engine may take to answer a question: longer than most steps."""


class FrontSide(Fronts, Protocol):
    """All fronts, as the supervisor tells and asks them."""

    def on_message(self, replica: int, message: FromEngine) -> None:
        """See `EngineListener`."""

    def on_status(self, replica: int, status: EngineStatus) -> None:
        """See `EngineListener`."""

    def on_end(self, replica: int, reason: str) -> None:
        """See `EngineListener`."""

    async def counts(self) -> FrontCounts:
        """The sum of what they have counted, those that are gone included."""


class Supervisor:
    """A `Control`. Belongs to one event loop.

    Args:
        launches: how each engine is started.
        model_name: in metrics.
        adapters: folders of the LoRA adapters that requests can name at first.
    """

    def __init__(self, launches: Sequence[Launch], model_name: str, adapters: dict[str, str]):
        self.rest = Rest()
        self.adapters = adapters
        self.engines = [EngineLife(number, launch, self.rest, self) for number, launch in enumerate(launches)]
        self._counts = [EngineCounts() for _ in launches]
        self._looked_at = [-_RANKS_S for _ in launches]
        self._metrics = Metrics(model_name, self._counts, self.rest, adapters)
        self._watched = Watched(self.engines, self._counts, model_name)
        self._fronts: FrontSide | None = None
        self._administrator: Administrator | None = None

    def attach(self, fronts: FrontSide) -> None:
        """Tell these of all that happens. Once, before `start`."""
        self._fronts = fronts
        self._administrator = Administrator(self.engines, fronts, self.rest, self.adapters)

    async def start(self) -> None:
        """Start the engines' processes; `wait_ready` waits for them to load."""
        await asyncio.to_thread(remove_abandoned)
        for engine in self.engines:
            engine.start()

    async def wait_ready(self) -> None:
        """Wait until all engines take requests.

        Raises:
            ConfigError: the settings or the model are unusable.
            EngineDeadError: one cannot start for another reason.
        """
        waits = [asyncio.create_task(engine.wait_ready()) for engine in self.engines]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()

    async def stop(self) -> None:
        """End the processes; what runs fails with EngineDeadError."""
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    # See `Control`

    async def administer(self, action: str, **arguments: Any) -> Any:
        """See `Control`."""
        assert action in ACTIONS, action
        return await getattr(self._administrator, action)(**arguments)

    async def metrics(self, accept: str | None) -> tuple[bytes, str]:
        """See `Control`."""
        assert self._fronts is not None
        looks = asyncio.gather(*map(self._look_at_ranks, self.engines))
        fronts = await self._fronts.counts()
        await looks
        return self._metrics.render(accept, fronts)

    async def load(self) -> list[int]:
        """See `Control`."""
        assert self._fronts is not None
        return (await self._fronts.counts()).num_unfinished

    def loads(self) -> list[Load]:
        """How full each engine is."""
        return [counts.load for counts in self._counts]

    async def graphs(self) -> list[dict[str, Any]]:
        """See `Control`."""
        found = await asyncio.gather(*map(_graphs_of, self.engines))
        if all(isinstance(each, EngineDeadError) for each in found):
            raise found[0]
        return [{"error": str(each)} if isinstance(each, EngineDeadError) else each for each in found]

    async def look(self, cursor: Sequence[int] | None) -> dict[str, Any]:
        """See `Control`."""
        return self._watched.look(cursor)

    async def trace(self, seconds: float) -> bytes:
        """See `Control`."""
        return await self._watched.trace(seconds)

    async def _look_at_ranks(self, engine: EngineLife) -> None:
        """Ask for its ranks' reports, which a step waits for. An engine that does something else, or is not there, leaves those
        from before, and so do scrapers that come more often than is of use."""
        now = time.monotonic()
        if now - self._looked_at[engine.replica] < _RANKS_S:
            return
        self._looked_at[engine.replica] = now
        with contextlib.suppress(StepgraphError):
            reports = await engine.ask(AskRanks, _LOOK_S)
            self._counts[engine.replica].ranks = [RankInfo(*report) for report in reports]

    # See `EngineListener`

    def on_message(self, replica: int, message: FromEngine) -> None:
        """See `EngineListener`."""
        assert self._fronts is not None
        if isinstance(message, Seen):
            self._watched.take(replica, message)
            return
        if isinstance(message, Progress):
            self._counts[replica].on_progress(message)
        self._fronts.on_message(replica, message)

    def on_status(self, replica: int, status: EngineStatus) -> None:
        """See `EngineListener`."""
        assert self._fronts is not None
        self._counts[replica].on_status(status)
        self._fronts.on_status(replica, status)

    def on_restart(self, replica: int, cause: RestartCause) -> None:
        """See `EngineListener`."""
        self._counts[replica].on_restart(cause)

    def on_end(self, replica: int, reason: str) -> None:
        """See `EngineListener`."""
        assert self._fronts is not None
        self._watched.lose(replica)
        self._fronts.on_end(replica, reason)


async def _graphs_of(engine: EngineLife) -> Any:
    try:
        return await engine.ask(AskGraphs, _ANSWER_S)
    except EngineDeadError as error:
        return error


class OneFront:
    """The one front, in the supervisor's own process: it reads what the supervisor writes."""

    def __init__(self, replicas: Replicas, counts: Callable[[], FrontCounts]):
        self._replicas = replicas
        self._counts = counts
        self.on_message = replicas.on_message
        self.on_status = replicas.on_status
        self.on_end = replicas.on_end
        self.forget_prefixes = replicas.forget_prefixes

    async def share(self) -> None:
        """See `Fronts`."""

    async def num_unfinished(self) -> int:
        """See `Fronts`."""
        return self._replicas.num_unfinished

    async def counts(self) -> FrontCounts:
        """See `FrontSide`."""
        return self._counts()
