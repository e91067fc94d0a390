"""StepGraphs: the graph of each step, by the policy, from the store, noted in the log."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Generic, NamedTuple

from stepgraph.config import GraphConfig
from stepgraph.graph import Graph
from stepgraph.graph.base import Output
from stepgraph.graph.store import GraphStore
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.log import GraphRecord, GraphUse, StepLog, StepRecord
from stepgraph.step.plan import StepPlan
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy

logger = logging.getLogger(__name__)


class _Last(NamedTuple, Generic[Output]):
    """The last step of a graph, for plans of the same epoch."""

    epoch: int | None
    record: StepRecord
    graph: Graph[Output]
    use: GraphUse


class StepGraphs(Generic[Output]):
    """Serves every step with a graph of the smallest captured shape that holds it.

    Args:
        config: when to capture; it has been put into `policy` and `store` otherwise.
        policy: which shape serves a step.
        store: the graphs.
        lazy: capture at first use rather than all at once.
    """

    def __init__(
        self,
        config: GraphConfig,
        policy: ShapePolicy,
        store: GraphStore[StepShape, Output],
        *,
        lazy: bool,
    ):
        self.policy, self.store = policy, store
        self.lazy = lazy
        self.log = StepLog()
        levels = policy.draft_levels
        self._ahead = policy.shapes_ahead(levels if config.capture == "all" else levels[-1:])
        self._spare = policy.shapes_ahead(levels)
        self._last: _Last[Output] | None = None  # a step of the epoch of the one before it skips the search
        if eager_steps := config.eager_steps():
            logger.warning("steps that run without a graph, and so more slowly: %s", eager_steps)

    def graph_for(self, plan: StepPlan) -> tuple[StepRecord, Graph[Output]]:
        """The graph that runs `plan`, captured now if need be, and the record of this use."""
        last = self._last
        if last is not None and plan.epoch is not None and plan.epoch == last.epoch:
            self.log.add(last.record, last.use)
            return last.record, last.graph
        shape, reason = self.policy.shape_of(plan), self.policy.eager_reason(plan)
        seconds = self.store.capture_seconds
        found = self.store.serving(shape) if reason is None else None
        captured = self.store.capture_seconds > seconds
        if found is not None:
            shape = found.key
        elif reason is None:
            over_budget = self.store.is_over_budget(shape)
            reason = EagerReason.MEMORY_BUDGET if over_budget else EagerReason.CAPTURE_FAILED
        record = StepRecord(plan.kind, shape, plan.num_tokens, len(plan.rows), reason, captured, plan.num_ranks)
        if found is None:
            self.log.add(record)
            return record, self.store.eager_twin(shape)
        use = self.log.uses[shape]
        self.log.add(record, use)
        self._last = _Last(plan.epoch, replace(record, captured=False) if captured else record, found.graph, use)
        return record, found.graph

    def records(self) -> list[GraphRecord]:
        """The captured graphs and their uses, smallest first."""
        records = []
        for found in self.store.captured:
            use = self.log.uses.get(found.key, GraphUse())
            records.append(
                GraphRecord(found.key, found.capture_ms, found.bytes, use.uses, use.real_tokens, use.padding_tokens)
            )
        return records

    def capture_all(self, *, progress: bool) -> None:
        """Capture the plain shapes, largest first, until the memory budget is used up: with as many proposals as there may be,
        and with fewer if all graphs were asked for by name; `capture_spare` adds those. Others wait for their first use."""
        if not self.policy.graphs_off:
            self.store.capture_all(self._ahead, progress=progress)

    def capture_spare(self) -> bool:
        """Capture one plain graph that is missing, of any number of proposals; False if there is none to be captured ahead."""
        if self.lazy or self.policy.graphs_off:
            return False
        while self._spare:
            shape = self._spare.pop()
            if shape not in self.store:
                self.store.try_to_capture(shape)
                return True
        return False

    def close(self) -> None:
        """Let go of all graphs. No step can run after it."""
        self._last = None
        self.store.close()
