"""LocalExecutor: one device, driven by this process."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepgraph.errors import DeviceMemoryError
from stepgraph.executor.base import Executor, ExecutorSpecs, GraphCounts, R, RankReport
from stepgraph.executor.rank_movers import MoverService
from stepgraph.models.adapters import AdapterFile, AdapterStore
from stepgraph.models.source import ModelSource
from stepgraph.models.tensor_stream import Announced, Arriving, Piece, announce, buckets
from stepgraph.models.update import Update, plan_update, write
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import WHOLE
from stepgraph.platforms import DeviceMemory
from stepgraph.spec.drafter import Drafter
from stepgraph.step.admission import Admission
from stepgraph.step.log import GraphRecord, StepLog
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.runner import StepRunner
from stepgraph.transfer.create import copy_for, export_cache
from stepgraph.transfer.host_memory import HostCopies
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.rank_cache import ExportedCache, RankCache

_NAP_S = 5e-5
"""Between two looks whether a step has been launched."""


class LocalExecutor:
    """See `stepgraph.executor.base.Executor`.

    Args:
        runner: launches the steps.
        specs: of all the parts.
        weights: memory of the model's parameters, and of the drafter's.
        adapters: buffers of LoRA adapters, if there are any.
        drafter: proposes tokens, if anything does.
        group: the ranks that share the model, of which this is one.
    """

    def __init__(
        self,
        runner: StepRunner,
        specs: ExecutorSpecs,
        weights: DeviceMemory,
        adapters: AdapterStore | None,
        drafter: Drafter | None,
        group: Group | None = None,
    ):
        self.specs = specs
        self.runner = runner
        self._weights = weights
        self.group = group
        self.waited_s: Callable[[], float] = lambda: 0.0
        """Seconds that were spent waiting for orders; who takes them says."""
        self._built_at, self._cpu_at_build = time.perf_counter(), time.process_time()
        self._adapters, self._drafter = adapters, drafter
        self.num_done = 0
        """Steps that were waited for."""
        self.mover_pipe: Connection | None = None
        """Of a worker: by which the leader drives its mover."""
        self._exported: ExportedCache | None = None
        self._host_copies: HostCopies | None = None
        self._update: Update = ()  # checked weights
        self._arriving: Arriving | None = None  # or those that come in pieces

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
        self.runner.completion(ticket.step).wait()
        self.num_done = ticket.step + 1

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
        self._update, self._arriving = plan_update(self.runner.model, weights), None

    def announced_weights(self) -> list[Announced]:
        """What was checked, for other ranks, which `expect_weights`."""
        return announce(self._update)

    def buckets(self, limit: int) -> Iterator[list[Piece]]:
        """The values of what was checked, for other ranks, which `take_weights`; see `stepgraph.models.tensor_stream.buckets`."""
        return buckets(self._update, limit)

    def expect_weights(self, announced: Sequence[Announced]) -> None:
        """`check_weights`, of tensors that another process has."""
        self._update, self._arriving = (), Arriving(self.runner.model, announced)

    def take_weights(self, bucket: Sequence[Piece]) -> None:
        """Write some of what is expected, before `write_weights`, with no step under way."""
        assert self._arriving is not None
        self._arriving.take(bucket)

    def write_weights(self) -> None:
        """See `Executor.write_weights`. Draft modules keep theirs, which are read again from where they came from."""
        update, arriving = self._update, self._arriving
        self._update, self._arriving = (), None
        write(update)
        if arriving is not None:
            arriving.finish()
        if self._drafter is not None:
            self._drafter.reload()

    def close(self) -> None:
        """See `Executor.close`. Nothing else can be called after it."""
        if self._exported is not None:
            self._exported.movers.close()
        if self._host_copies is not None:
            self._host_copies.close()
        platform, memories = self.runner.platform, (self._weights, self.runner.kv_memory)
        platform.synchronize()
        self.runner.graphs.close()
        if self.group is not None:
            self.group.close()
        if self.runner.shared_rings is not None:
            self.runner.shared_rings.close()
        del self.runner, self._adapters, self._drafter, self._update, self._arriving, self._exported
        del self._host_copies
        gc.collect()  # the buffers are parts of cycles
        for memory in memories:
            memory.free()
        platform.release_cached_memory()

    def watch_cache(self, lost: Callable[[], None]) -> None:
        """See `Executor.watch_cache`: `StepRunner.workbench` loses it."""
        self.runner.cache_lost = lost

    def export_cache(self, backend: str) -> ExportedCache:
        """See `Executor.export_cache`; of this rank alone."""
        assert self._exported is None
        self._exported = export_cache(backend, self._rank_cache())
        if self.mover_pipe is not None:
            MoverService(self.mover_pipe, self._exported.movers, self._wait_done)
        return self._exported

    def keep_on_host(self, num_bytes: int) -> HostCopies:
        """See `Executor.keep_on_host`."""
        assert self._host_copies is None
        cache = self._rank_cache()
        self._host_copies = HostCopies(cache, num_bytes, copy_for(cache))
        return self._host_copies

    def _rank_cache(self) -> RankCache:
        runner, shard = self.runner, WHOLE if self.group is None else self.group.shard
        assert runner.layout.reuses_prefixes, runner.layout
        layout = BlockLayout.of(runner.layout)
        for spec in runner.layout.specs:
            assert spec.heads is None or spec.heads == shard.heads(spec.heads.size), (spec, shard)
        tensors = tuple(runner.caches[index].block_tensors for index in layout.owners)
        return RankCache(layout, shard, tensors, runner.kv_memory, runner.signals)

    def _wait_done(self, num_steps: int) -> None:
        """Block until so many steps are done on this rank, whose launch was ordered. In any thread."""
        while self.runner.num_launched < num_steps:
            time.sleep(_NAP_S)
        if num_steps:
            self.runner.completion(num_steps - 1).wait()

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
        self.runner.graphs.store.before_capture = lambda key: about_to()

    def on_all(self, function: Callable[..., R], *args: Any) -> list[R]:
        """See `Executor.on_all`."""
        return [function(self, *args)]

    def rank_reports(self) -> list[RankReport]:
        """See `Executor.rank_reports`."""
        return [self.report()]

    def checksum(self) -> int:
        """Of what the device knows of requests, which all ranks must know alike; with no step under way."""
        lines = self.runner.state.lines.flatten().to(torch.int64)
        return int((lines * torch.arange(1, lines.shape[0] + 1, device=lines.device)).sum())

    def report(self) -> RankReport:
        """How this rank does."""
        platform, counts, experts = self.runner.platform, self.graph_counts(), self.runner.expert_counts
        seconds = max(time.perf_counter() - self._built_at, 1e-9)
        rank = 0 if self.group is None else self.group.shard.rank
        return RankReport(
            rank=rank,
            device=self.specs.device,
            pid=os.getpid(),
            num_graphs=counts.num_graphs,
            graph_bytes=counts.bytes,
            free_memory_bytes=platform.free_memory_bytes(),
            total_memory_bytes=platform.total_memory_bytes(),
            cpu_share=(time.process_time() - self._cpu_at_build) / seconds,
            waiting_share=self.waited_s() / seconds,
            experts=experts.kept,
            expert_tokens=() if rank else experts.read(self.runner.num_launched, self.num_done),
        )


def runner_of(executor: Executor) -> StepRunner:
    """The device of an executor, or of its rank in this process, for those who check or time its steps: an engine has no use for
    it. What replays graphs on several ranks does so on all of them, by `Executor.on_all`."""
    runner = getattr(executor, "runner", None)
    assert isinstance(runner, StepRunner), executor
    return runner
