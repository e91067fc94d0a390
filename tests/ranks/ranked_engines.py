"""Engines of several ranks, one after another on the same processes."""

import gc

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.errors import EngineDeadError
from stepgraph.executor.leading import LeadingExecutor
from stepgraph.executor.local import LocalExecutor
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.executor.workers import Workers
from stepgraph.models.source import ModelSource, resolve_configured


class EngineFactory:
    """Makes engines, of one rank or of several. Those of as many ranks have the same processes, one engine after another."""

    def __init__(self) -> None:
        _freeze()
        self._workers: dict[int, Workers] = {}
        self._made: list[Engine] = []

    def __call__(self, config: EngineConfig) -> Engine:
        """An engine with these settings."""
        source, executor = resolve_configured(config.model), None
        if config.parallel.num_ranks > 1:
            executor = self._build_ranked(config, source)
        self._made.append(build_engine(config, source=source, executor=executor))
        return self._made[-1]

    def _build_ranked(self, config: EngineConfig, source: ModelSource) -> LeadingExecutor:
        size = config.parallel.num_ranks
        workers = self._workers.get(size)
        if workers is not None and not _are_there(workers):  # an engine that failed has ended them
            del self._workers[size]
        if size in self._workers:
            return build_ranked_executor(config, source, workers=self._workers[size])
        self._workers[size] = Workers(size)
        executor = build_ranked_executor(config, source, workers=self._workers[size])
        executor.on_all(_freeze)
        return executor

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


def _are_there(workers: Workers) -> bool:
    try:
        workers.check()
    except EngineDeadError:
        return False
    return True


def _freeze(executor: LocalExecutor | None = None) -> None:
    """Have what there is by now not looked at whenever an engine ends, which takes longer than the rest of a small one's life."""
    gc.collect()
    gc.freeze()


def add_by_another_rule(executor) -> None:
    """Rank 1 rounds its sums otherwise, as if it added in another order, in graphs and without."""
    group = executor.group
    right = group.add_sum

    def wrong(part_TE, residual_TE, **options):
        result = right(part_TE, residual_TE, **options)
        return result.mul_(1 + 2**-20) if group.shard.rank == 1 else result

    group.add_sum = wrong
