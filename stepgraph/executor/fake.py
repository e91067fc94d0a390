"""FakeExecutor: a device in plain Python under an engine, and a clock that moves as its steps take time.

For simulations and tests of what the host does: the engine's loop, scheduler, life and requests are the real ones.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stepgraph.executor.base import ExecutorSpecs, GraphCounts, R, RankReport
from stepgraph.models.adapters import AdapterFile
from stepgraph.models.source import ModelSource
from stepgraph.step.admission import Admission
from stepgraph.step.log import GraphRecord, StepLog, StepRecord
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.shape_policy import ShapePolicy
from stepgraph.transfer.host_memory import HostCopies
from stepgraph.transfer.rank_cache import ExportedCache


class FakeDevice(Protocol):
    """What a `FakeExecutor` runs steps on: each is done when the call returns."""

    def admit(self, admission: Admission) -> None:
        """See `Executor.admit`."""

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """See `Executor.set_masks`."""

    def run(self, plan: StepPlan) -> StepResults:
        """Run a step."""

    def forget(self) -> None:
        """Lose the KV cache's content."""


class FakeClock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake_specs(
    policy: ShapePolicy, *, vocab_size: int, max_model_len: int, num_kv_blocks: int, block_size: int, run_ahead: int
) -> ExecutorSpecs:
    """Of a device that neither proposes tokens nor sleeps, with steps of the shapes of `policy`."""
    return ExecutorSpecs(
        platform="plain Python",
        device="cpu",
        dtype="int32",
        precision="whole numbers",
        graph_backend="none",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        max_tokens=policy.max_tokens,
        token_sizes=policy.token_sizes,
        run_ahead=run_ahead,
    )


class _Launched(NamedTuple):
    ticket: Ticket
    results: StepResults
    done_at: float


class FakeExecutor:
    """See `stepgraph.executor.base.Executor`. All that it promises is asserted of its caller too.

    Args:
        device: runs the steps, when they are launched; their results can be read when their time has passed.
        specs: what it says it can do.
        policy: the shapes of its steps.
        clock: moved on by waiting for steps.
        step_seconds: time of a step; they run one after another.
    """

    def __init__(
        self,
        device: FakeDevice,
        specs: ExecutorSpecs,
        policy: ShapePolicy,
        clock: FakeClock,
        step_seconds: Callable[[StepRecord], float] = lambda record: 0.0,
    ):
        self.specs = specs
        self.clock = clock
        self.statistics = StepLog()
        self.adapters: dict[int, AdapterFile] = {}
        """By their numbers."""
        self.weights: ModelSource | Iterable[tuple[str, Tensor]] | None = None
        """Those that were written last."""
        self._device = device
        self._policy = policy
        self._step_seconds = step_seconds
        self._in_flight: deque[_Launched] = deque()
        self._free_at = 0.0  # when the steps launched so far will be done
        self._launched = 0
        self._checked: ModelSource | Iterable[tuple[str, Tensor]] | None = None
        self._is_asleep = False
        self._is_closed = False

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not collected."""
        return len(self._in_flight)

    def admit(self, admission: Admission) -> None:
        """See `Executor.admit`."""
        self._check_awake()
        assert admission.computed < len(admission.tokens), admission
        num_blocks = self.specs.groups.size * admission.computed / self.specs.block_size
        assert len(admission.blocks) == num_blocks, admission
        self._device.admit(admission)

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """See `Executor.set_masks`."""
        self._check_awake()
        self._device.set_masks(slot, masks)

    def launch(self, plan: StepPlan) -> Ticket:
        """See `Executor.launch`."""
        self._check_awake()
        assert len(self._in_flight) <= self.specs.run_ahead, "an earlier step must be collected before"
        shape, reason = self._policy.shape_of(plan), self._policy.eager_reason(plan)
        record = StepRecord(plan.kind, shape, plan.num_tokens, len(plan.rows), reason, num_ranks=plan.num_ranks)
        ticket = Ticket(self._launched, plan, record)
        results = self._device.run(plan)
        self._launched += 1
        self.statistics.add(record)
        self._free_at = max(self.clock.now, self._free_at) + self._step_seconds(record)
        self._in_flight.append(_Launched(ticket, results, self._free_at))
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """See `Executor.wait`. Time passes until the step is done."""
        done_at = next(step.done_at for step in self._in_flight if step.ticket.step == ticket.step)
        self.clock.now = max(self.clock.now, done_at)

    def collect(self, ticket: Ticket) -> StepResults:
        """See `Executor.collect`."""
        step = self._in_flight.popleft()
        assert step.ticket.step == ticket.step, "steps are collected in their order"
        assert step.done_at <= self.clock.now, "it is not done"
        return step.results

    def recover(self) -> None:
        """See `Executor.recover`."""
        self._check_awake()

    def read_adapter(self, folder: str) -> AdapterFile:
        """See `Executor.read_adapter`."""
        assert self.specs.max_adapters
        return AdapterFile(folder, hashlib.sha256(folder.encode()).digest(), ())

    def write_adapter(self, number: int, file: AdapterFile) -> None:
        """See `Executor.write_adapter`."""
        assert 1 <= number <= self.specs.max_adapters, number
        self.adapters[number] = file

    def sleep(self, *, keep_weights: bool) -> None:
        """See `Executor.sleep`."""
        self._check_rests()
        assert self.specs.can_sleep
        self._is_asleep = True
        self._device.forget()
        if not keep_weights:
            self.weights = None

    def wake(self) -> None:
        """See `Executor.wake`."""
        self._is_asleep = False

    def check_weights(self, weights: ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """See `Executor.check_weights`: all fit."""
        self._checked = weights

    def write_weights(self) -> None:
        """See `Executor.write_weights`."""
        self._check_awake()
        self._check_rests()
        assert self._checked is not None, "they must be checked before"
        self.weights, self._checked = self._checked, None

    def close(self) -> None:
        """See `Executor.close`."""
        self._is_closed = True

    def watch_cache(self, lost: Callable[[], None]) -> None:
        """See `Executor.watch_cache`: nothing loses it."""

    def export_cache(self, backend: str) -> ExportedCache:
        """See `Executor.export_cache`."""
        raise AssertionError("it has no cache")

    def keep_on_host(self, num_bytes: int) -> HostCopies:
        """See `Executor.keep_on_host`."""
        raise AssertionError("it has no cache")

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        return False

    def graph_counts(self) -> GraphCounts:
        """See `Executor.graph_counts`."""
        return GraphCounts(0, 0, 0.0, 0)

    def graph_records(self) -> list[GraphRecord]:
        """See `Executor.graph_records`."""
        return []

    def watch_captures(self, about_to: Callable[[], None]) -> None:
        """See `Executor.watch_captures`: there are none."""

    def on_all(self, function: Callable[..., R], *args: Any) -> list[R]:
        """See `Executor.on_all`."""
        raise AssertionError("no rank of it has a device")

    def rank_reports(self) -> list[RankReport]:
        """See `Executor.rank_reports`."""
        return []

    def _check_awake(self) -> None:
        assert not self._is_closed, "it was closed"
        assert not self._is_asleep, "it sleeps"

    def _check_rests(self) -> None:
        assert not self._in_flight, "steps are under way"
