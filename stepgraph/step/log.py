"""StepLog: what steps ran, in which graphs, and why some ran without one."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.plan import StepKind
from stepgraph.step.shape import StepShape


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
    num_ranks: int = 1
    """Ranks that ran rows of their own at this shape; tokens and rows are those of all."""

    @property
    def padding_tokens(self) -> int:
        """Tokens computed for nothing."""
        return self.num_ranks * self.shape.num_tokens - self.num_tokens


@dataclass
class GraphUse:
    """How often a graph ran, and on how much."""

    uses: int = 0
    real_tokens: int = 0
    padding_tokens: int = 0
    """Computed for nothing."""


@dataclass(frozen=True)
class GraphRecord:
    """One captured graph and its use so far."""

    shape: StepShape
    capture_ms: float
    bytes: int
    uses: int
    real_tokens: int
    padding_tokens: int
    """Computed for nothing over all uses."""


@dataclass
class StepLog:
    """Counts over the life of a runner."""

    steps: Counter[tuple[StepKind, EagerReason | None]] = field(default_factory=Counter)
    real_tokens: int = 0
    padding_tokens: int = 0
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=1024))
    uses: defaultdict[StepShape, GraphUse] = field(default_factory=lambda: defaultdict(GraphUse))
    """Of each graph."""

    def add(self, record: StepRecord, use: GraphUse | None = None) -> None:
        """Note a step, and that it was one of the uses of a graph unless it ran without."""
        self.steps[record.kind, record.eager_reason] += 1
        self.real_tokens += record.num_tokens
        self.padding_tokens += record.padding_tokens
        self.recent.append(record)
        if use is not None:
            use.uses += 1
            use.real_tokens += record.num_tokens
            use.padding_tokens += record.padding_tokens

    @property
    def num_steps(self) -> int:
        return self.steps.total()

    @property
    def num_eager_steps(self) -> int:
        return sum(count for (_, reason), count in self.steps.items() if reason is not None)
