"""GraphPool: the captured graphs, which one serves a step, and the record of every use."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import inf
from typing import Generic, NamedTuple

import torch
from tqdm import tqdm

from stepgraph.config import GraphConfig
from stepgraph.errors import DeviceMemoryError
from stepgraph.graph.base import Graph, GraphBackend, Output
from stepgraph.graph.eager import EagerBackend
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.plan import StepKind, StepPlan
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0
"""After memory did not suffice for a graph, it is not tried again for so long."""


@dataclass(frozen=True)
class StepRecord:
    """What one step ran."""

    kind: StepKind
    shape: StepShape
    num_tokens: int
    num_rows: int
    eager_reason: EagerReason | None
    captured: bool = False
    """Its graph was captured for it, which took longer than the step."""


@dataclass
class GraphRecord:
    """One captured graph and its use."""

    shape: StepShape
    capture_ms: float
    bytes: int
    uses: int = 0
    real_tokens: int = 0

    @property
    def padding_tokens(self) -> int:
        """Tokens computed for nothing over all uses."""
        return self.uses * self.shape.num_tokens - self.real_tokens


@dataclass
class PoolStatistics:
    """Counts over the life of the pool."""

    steps: Counter[tuple[StepKind, EagerReason | None]] = field(default_factory=Counter)
    failed_captures: int = 0
    """Captures that failed while steps were served; these ran otherwise."""
    real_tokens: int = 0
    padding_tokens: int = 0
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=1024))

    def add(self, record: StepRecord) -> None:
        self.steps[record.kind, record.eager_reason] += 1
        self.real_tokens += record.num_tokens
        self.padding_tokens += record.shape.num_tokens - record.num_tokens
        self.recent.append(record)

    @property
    def num_steps(self) -> int:
        return self.steps.total()

    @property
    def num_eager_steps(self) -> int:
        return sum(count for (_, reason), count in self.steps.items() if reason is not None)


@dataclass(frozen=True)
class _Entry(Generic[Output]):
    graph: Graph[Output]
    record: GraphRecord


class _Use(NamedTuple, Generic[Output]):
    """A step that ran in a captured graph."""

    epoch: int | None
    record: StepRecord
    entry: _Entry[Output]

    def fits(self, plan: StepPlan) -> bool:
        """Whether `plan` is sure to run in the same graph."""
        return plan.epoch is not None and plan.epoch == self.epoch


class GraphPool(Generic[Output]):
    """Serves every step with a graph of the smallest captured shape that holds it.

    Args:
        config: what to capture, when, in how much memory.
        backend: how to capture.
        create_program: makes the program of a shape.
        capture_context: entered around each capture, so that it leaves no trace.
        trial: launches a graph at the largest context, leaving no trace; for the first of those captured all at once. Before a
            step that waits for its graph it would be a delay, and no test of a start.
        graph_bytes: what the driver holds for a graph, beside the memory that the backend knows of.
        policy: which shape serves a step.
        lazy: capture at first use rather than all at once.
    """

    def __init__(
        self,
        config: GraphConfig,
        backend: GraphBackend,
        create_program: Callable[[StepShape], Callable[[], Output]],
        capture_context: Callable[[], AbstractContextManager[None]],
        trial: Callable[[Graph[Output]], None],
        graph_bytes: Callable[[], int],
        policy: ShapePolicy,
        *,
        lazy: bool,
    ):
        self.backend_name = backend.name
        self.lazy = lazy
        self.statistics = PoolStatistics()
        self.before_capture: Callable[[], None] = lambda: None
        """Called when a graph is about to be captured, which may take long; whoever waits for the engine sets it."""
        self._config = config
        self._backend = backend
        self._create_program = create_program
        self._capture_context = capture_context
        self._trial = trial
        self._graph_bytes = graph_bytes
        self.policy = policy
        if eager_steps := config.eager_steps():
            logger.warning("steps that run without a graph, and so more slowly: %s", eager_steps)
        self._spare = policy.shapes_ahead(policy.draft_levels)
        self.capture_seconds = 0.0
        """Time all captures took, those of graphs over the budget included."""
        self._entries: dict[StepShape, _Entry[Output]] = {}
        self._backend_bytes = 0  # by the backend, which takes long to count; only a capture changes it
        self._eager: dict[StepShape, Graph[Output]] = {}
        self._over_budget: set[StepShape] = set()
        self._left_behind = 0  # bytes that graphs over the budget added to the memory that all share
        self._failed: dict[StepShape, float] = {}  # when each may be tried again
        self._last: _Use[Output] | None = None  # a step with the rows of the one before it skips the search

    @property
    def num_graphs(self) -> int:
        """Captured graphs."""
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Memory that all captured graphs take."""
        return self._backend_bytes + len(self._entries) * self._graph_bytes()

    def records(self) -> list[GraphRecord]:
        """Captured graphs, smallest first."""
        return [entry.record for _, entry in sorted(self._entries.items())]

    def graph_for(self, plan: StepPlan) -> tuple[StepRecord, Graph[Output]]:
        """The graph that runs `plan`, captured now if need be, and the record of this use."""
        last = self._last
        if last is not None and last.fits(plan):
            last.entry.record.uses += 1
            last.entry.record.real_tokens += last.record.num_tokens
            self.statistics.add(last.record)
            return last.record, last.entry.graph
        shape = self.policy.shape_of(plan)
        reason = self.policy.eager_reason(plan)
        entry: _Entry[Output] | None = None
        capture_seconds = self.capture_seconds
        if reason is None:
            entry = self._entries.get(shape) or self._try_to_capture(shape) or self._covering(shape)
            if entry is None:
                reason = EagerReason.MEMORY_BUDGET if shape in self._over_budget else EagerReason.CAPTURE_FAILED
        if entry is not None:
            shape = entry.record.shape
            entry.record.uses += 1
            entry.record.real_tokens += plan.num_tokens
        captured = self.capture_seconds > capture_seconds
        record = StepRecord(plan.kind, shape, plan.num_tokens, len(plan.rows), reason, captured)
        self.statistics.add(record)
        if entry is None:
            return record, self.eager_twin(shape)
        self._last = _Use(plan.epoch, replace(record, captured=False) if captured else record, entry)
        return record, entry.graph

    def graph(self, shape: StepShape) -> Graph[Output] | None:
        """The captured graph of exactly this shape, captured now if need be; None if the budget forbids it.

        Raises:
            CaptureError: its program cannot be captured.
            DeviceMemoryError: there is no memory for it.
        """
        entry = self._entries.get(shape) or self._capture(shape)
        return entry.graph if entry else None

    def eager_twin(self, shape: StepShape) -> Graph[Output]:
        """The same program at the same shape, run without a graph."""
        if shape not in self._eager:
            self._eager[shape] = EagerBackend().capture(self._create_program(shape), 0)
        return self._eager[shape]

    def capture_all(self, *, progress: bool) -> None:
        """Capture the plain shapes, largest first, until the memory budget is used up: with as many proposals as there may be,
        and with fewer if all graphs were asked for by name; `capture_spare` adds those. Others wait for their first use."""
        if self.policy.graphs_off:
            return
        levels = self.policy.draft_levels
        wanted = self.policy.shapes_ahead(levels if self._config.capture == "all" else levels[-1:])
        shapes = tqdm(
            wanted,
            desc="capturing graphs",
            unit="graph",
            disable=not progress,
            leave=False,
            file=sys.stderr,
        )
        started, tried = time.perf_counter(), False
        for shape in shapes:
            shapes.set_postfix_str(str(shape))
            graph = self.graph(shape)
            if graph is not None and not tried:
                self._trial(graph)
                tried = True
        captured, asked = len(self._entries), len(wanted)
        logger.info(
            "captured %d of %d graphs in %.2f s, %.1f MiB",
            captured,
            asked,
            time.perf_counter() - started,
            self.bytes / 2**20,
        )
        if captured < asked:
            logger.warning(
                "graph_memory_mib=%s holds %d of %d graphs; other shapes run in a larger graph, or eagerly if none fits",
                self._config.graph_memory_mib,
                captured,
                asked,
            )

    def capture_spare(self) -> bool:
        """Capture one plain graph that is missing, of any number of proposals; False if there is none to be captured ahead."""
        if self.lazy or self.policy.graphs_off:
            return False
        while self._spare:
            shape = self._spare.pop()
            if shape not in self._entries:
                self._try_to_capture(shape)
                return True
        return False

    def _try_to_capture(self, shape: StepShape) -> _Entry[Output] | None:
        """Capture a graph while requests are served, who must not suffer if that fails: None then, and the log says why."""
        if time.monotonic() < self._failed.get(shape, 0.0):
            return None
        try:
            return self._capture(shape)
        except Exception as error:
            for_good = not isinstance(error, DeviceMemoryError | torch.OutOfMemoryError)
            self._failed[shape] = inf if for_good else time.monotonic() + _RETRY_SECONDS
            self.statistics.failed_captures += 1
            logger.warning(
                "the graph %s could not be captured, so its steps run in a larger graph or, if there is none, eagerly%s: %s",
                shape,
                "" if for_good else f"; it is tried again after {_RETRY_SECONDS:.0f} s",
                str(error) or repr(error),
            )
            return None

    def _capture(self, shape: StepShape) -> _Entry[Output] | None:
        budget = self._config.graph_memory_mib
        if shape in self._over_budget:
            return None
        self.before_capture()
        before, started = self.bytes, time.perf_counter()
        try:
            with self._capture_context():
                graph = self._backend.capture(self._create_program(shape), self._config.capture_warmups)
        finally:
            elapsed_ms = (time.perf_counter() - started) * 1e3
            self.capture_seconds += elapsed_ms / 1e3
            self._backend_bytes = self._backend.memory_bytes()
        num_bytes = self.bytes + self._graph_bytes() - before
        if budget is not None and before + num_bytes - self._left_behind > budget * 2**20:
            self._over_budget.add(shape)
            del graph
            self._backend_bytes = self._backend.memory_bytes()
            self._left_behind += self.bytes - before
            return None
        entry = self._entries[shape] = _Entry(graph, GraphRecord(shape, elapsed_ms, num_bytes))
        logger.debug("captured %s in %.1f ms, %d bytes", shape, elapsed_ms, num_bytes)
        return entry

    def _covering(self, shape: StepShape) -> _Entry[Output] | None:
        """The smallest captured graph that holds `shape`."""
        fitting = [
            s
            for s in self._entries
            if s.num_tokens >= shape.num_tokens
            and s.num_rows >= shape.num_rows
            and s.variant >= shape.variant
            and s.num_drafts == shape.num_drafts
        ]
        return self._entries[min(fitting)] if fitting else None
