"""Engines that do what administrators ask, or not, without a process."""

from collections.abc import Callable, Sequence
from typing import Any

from observed import READY

from stepgraph.server.engine_observer import EngineState, EngineStatus
from stepgraph.server.messages import AbortAll


class FakeEngine:
    """An `EngineLife` that notes what it is asked and told."""

    def __init__(self, replica: int, state: EngineState = EngineState.READY):
        self.replica = replica
        self.status = EngineStatus(state, READY)
        self.weights: str | None = None
        self.num_unfinished = 0
        self.heard: list[Any] = []
        self.failures: dict[type, Exception] = {}
        """What it answers to questions of a kind."""
        self.answers: dict[type, Any] = {}
        self.num_replaced = 0

    @property
    def is_ready(self) -> bool:
        return self.status.state is EngineState.READY

    def tell(self, message) -> None:
        self.heard.append(message)
        if isinstance(message, AbortAll):
            self.num_unfinished = 0

    async def ask(self, question: Callable[[int], Any], timeout_s: float | None = None) -> Any:
        asked = question(0)
        self.heard.append(asked)
        if (failure := self.failures.get(type(asked))) is not None:
            raise failure
        return self.answers.get(type(asked))

    def replace(self) -> None:
        self.num_replaced += 1


class FakeFronts:
    """`Fronts` of such engines."""

    def __init__(self, engines: Sequence[FakeEngine]):
        self._engines = engines
        self.forgotten: list[int] = []

    async def share(self) -> None:
        pass

    async def num_unfinished(self) -> int:
        return sum(engine.num_unfinished for engine in self._engines)

    def forget_prefixes(self, replica: int) -> None:
        self.forgotten.append(replica)
