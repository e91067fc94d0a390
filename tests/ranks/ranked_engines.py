"""Engines of several ranks, one after another on the same processes."""

import gc

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.errors import StepgraphError
from stepgraph.executor.local import LocalExecutor
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.executor.workers import Workers
from stepgraph.models.source import resolve_configured


class EngineFactory:
    """Makes engines, of one rank or of several. Those of as many ranks have the same processes, one engine after another."""

    def __init__(self) -> None:
        _freeze()
        self._workers: dict[int, Workers] = {}
        self._made: list[Engine] = []

    def __call__(self, config: EngineConfig) -> Engine:
        """An engine with these settings."""
        size, source, executor = config.parallel.tensor_parallel_size, resolve_configured(config.model), None
        if size > 1:
            is_first = size not in self._workers
            if is_first:
                self._workers[size] = Workers(size)
            try:
                executor = build_ranked_executor(config, source, workers=self._workers[size])
            except StepgraphError:
                del self._workers[size]  # which have ended
                raise
            if is_first:
                executor.on_all(_freeze)
        self._made.append(build_engine(config, source=source, executor=executor))
        return self._made[-1]

    def shut_engines_down(self) -> None:
        """All that were made."""
        for engine in self._made:
            engine.shutdown()
        self._made.clear()

    def close(self) -> None:
        """End the processes; later engines have new ones."""
        self.shut_engines_down()
        for workers in self._workers.values():
            workers.close()
        self._workers.clear()
        gc.unfreeze()


def _freeze(executor: LocalExecutor | None = None) -> None:
    """Have what there is by now not looked at whenever an engine ends, which takes longer than the rest of a small one's life."""
    gc.collect()
    gc.freeze()
