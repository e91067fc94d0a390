"""LocalExecutor: one device, driven by this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepgraph.errors import DeviceMemoryError
from stepgraph.executor.base import Executor, ExecutorSpecs, GraphCounts
from stepgraph.models.adapters import AdapterFile, AdapterStore
from stepgraph.models.source import ModelSource
from stepgraph.models.update import Update, plan_update, write
from stepgraph.platforms import DeviceMemory
from stepgraph.spec.drafter import Drafter
from stepgraph.step.admission import Admission
from stepgraph.step.log import GraphRecord, StepLog
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.runner import StepRunner


class LocalExecutor:
    """See `stepgraph.executor.base.Executor`.

    Args:
        runner: launches the steps.
        specs: of all the parts.
        weights: memory of the model's parameters, and of the drafter's.
        adapters: buffers of LoRA adapters, if there are any.
        drafter: proposes tokens, if anything does.
    """

    def __init__(
        self,
        runner: StepRunner,
        specs: ExecutorSpecs,
        weights: DeviceMemory,
        adapters: AdapterStore | None,
        drafter: Drafter | None,
    ):
        self.specs = specs
        self.runner = runner
        self._weights = weights
        self._adapters, self._drafter = adapters, drafter
        self._update: Update = ()  # checked weights

    @property
    def statistics(self) -> StepLog:
        """See `Executor.statistics`."""
        return self.runner.graphs.log

    def admit(self, admission: Admission) -> None:
        """See `Executor.admit`."""
        self.runner.state.admit(admission)

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """See `Executor.set_masks`."""
        self.runner.state.set_masks(slot, masks)

    def launch(self, plan: StepPlan) -> Ticket:
        """See `Executor.launch`."""
        try:
            return self.runner.launch(plan)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(str(error)) from error

    def wait(self, ticket: Ticket) -> None:
        """See `Executor.wait`."""
        self.runner.wait(ticket)

    def collect(self, ticket: Ticket) -> StepResults:
        """See `Executor.collect`."""
        return self.runner.collect(ticket)

    def recover(self) -> None:
        """See `Executor.recover`."""
        self.runner.recover()

    def read_adapter(self, folder: str) -> AdapterFile:
        """See `Executor.read_adapter`."""
        assert self._adapters is not None
        return self._adapters.read(folder)

    def write_adapter(self, number: int, file: AdapterFile) -> None:
        """See `Executor.write_adapter`."""
        assert self._adapters is not None
        self._adapters.write(number, file)

    def sleep(self, *, keep_weights: bool) -> None:
        """See `Executor.sleep`."""
        self._weights.release(keep_content=keep_weights)
        self.runner.kv_memory.release(keep_content=False)
        self.runner.platform.release_cached_memory()

    def wake(self) -> None:
        """See `Executor.wake`."""
        self._weights.restore()
        self.runner.kv_memory.restore()

    def check_weights(self, weights: ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """See `Executor.check_weights`."""
        self._update = plan_update(self.runner.model, weights)

    def write_weights(self) -> None:
        """See `Executor.write_weights`. Draft modules keep theirs, which are read again from where they came from."""
        update, self._update = self._update, ()
        write(update)
        if self._drafter is not None:
            self._drafter.reload()

    def close(self) -> None:
        """See `Executor.close`. Nothing else can be called after it."""
        platform, memories = self.runner.platform, (self._weights, self.runner.kv_memory)
        platform.synchronize()
        self.runner.graphs.close()
        del self.runner, self._adapters, self._drafter, self._update
        gc.collect()  # the buffers are parts of cycles
        for memory in memories:
            memory.free()
        platform.release_cached_memory()

    def watch_cache(self, lost: Callable[[], None]) -> None:
        """See `Executor.watch_cache`: `StepRunner.workbench` loses it."""
        self.runner.cache_lost = lost

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        return self.runner.graphs.capture_spare()

    def graph_counts(self) -> GraphCounts:
        """See `Executor.graph_counts`."""
        store = self.runner.graphs.store
        return GraphCounts(store.num_graphs, store.bytes, store.capture_seconds, store.failed_captures)

    def graph_records(self) -> list[GraphRecord]:
        """See `Executor.graph_records`."""
        return self.runner.graphs.records()

    def watch_captures(self, about_to: Callable[[], None]) -> None:
        """See `Executor.watch_captures`."""
        self.runner.graphs.store.before_capture = about_to


def runner_of(executor: Executor) -> StepRunner:
    """The device of an executor of this process, for those who check or time its steps: an engine has no use for it."""
    assert isinstance(executor, LocalExecutor), executor
    return executor.runner
