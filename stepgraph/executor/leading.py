"""LeadingExecutor: several devices, each driven by a process of its own, of which this one tells the others what to do."""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import finalize

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepgraph.errors import DeviceMemoryError, EngineDeadError, RequestError, StepgraphError
from stepgraph.executor.base import AdmissionError, GraphCounts, R, RankReport
from stepgraph.executor.local import LocalExecutor
from stepgraph.executor.orders import words_of_call, words_of_shape
from stepgraph.executor.rank_movers import RankedMovers
from stepgraph.executor.ring import NOTHING, NUMBERS, Kind, Words
from stepgraph.executor.step_watch import StepWatch
from stepgraph.executor.workers import Build, NotAdmitted, Workers
from stepgraph.models.adapters import AdapterFile
from stepgraph.models.source import ModelSource, resolve
from stepgraph.step.admission import Admission
from stepgraph.step.log import GraphRecord, StepLog, StepRecord
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import StepShape
from stepgraph.transfer.host_memory import HostCopies
from stepgraph.transfer.rank_cache import ExportedCache

_BUCKET_BYTES = 64 << 20
"""Of new weights, sent to other ranks at a time."""


class Threads:
    """The cores of this machine, shared out among ranks that compute on them.

    Args:
        size: ranks.
    """

    def __init__(self, size: int) -> None:
        before = torch.get_num_threads()
        self.each = max(1, before // size)
        """Threads of each rank."""
        torch.set_num_threads(self.each)
        self.restore: Callable[[], object] = finalize(self, torch.set_num_threads, before)
        """Gives this process all of them back; so does the end of this object."""


class LeadingExecutor(ABC):
    """See `stepgraph.executor.base.Executor`. This process is rank 0, the leader: it alone decides what steps run, and at what
    shapes, and it alone reads their results. Subclasses say which rows ranks run.

    Args:
        local: of rank 0.
        workers: of all others, which have built their parts.
        build: what they were told.
        ends_workers: end them with `close`.
        threads: what was taken from this process for them.
    """

    def __init__(
        self,
        local: LocalExecutor,
        workers: Workers,
        build: Build,
        *,
        ends_workers: bool,
        threads: Threads | None,
    ) -> None:
        assert local.group is not None
        self.specs = replace(local.specs, num_ranks=workers.size, collectives=local.group.name)
        self._local, self._workers, self._group = local, workers, local.group
        self._ends_workers, self._threads = ends_workers, threads
        self._model_impl, self._time_limit_s = build.config.model.model_impl, build.time_limit_s
        self._sends_weights = False  # those that were checked are this process's
        self._shapes: dict[StepShape, int] = {}  # that workers know, by their numbers
        self._tried: set[StepShape] = set()  # that run without a graph, and had memory
        self._alike_at = 0  # steps after which all ranks knew the same
        self._admitted_at = -1  # the first step after the last admission
        self._last_record: StepRecord | None = None
        self._last_shape = 0  # the number of its shape
        self._about_to: Callable[[], None] = lambda: None
        self._failure: StepgraphError | None = None
        self._movers: RankedMovers | None = None
        self._is_closed = False
        workers.on_end = self._group.abort
        self._watch = StepWatch(2 * build.time_limit_s, self._group.abort)
        self._end_watch = weakref.finalize(self, self._watch.close)
        self._store = local.runner.graphs.store
        self._store.before_capture = self._order_capture

    @property
    def runner(self) -> StepRunner:
        """Of rank 0."""
        return self._local.runner

    @property
    def statistics(self) -> StepLog:
        """See `Executor.statistics`: those of all ranks, which run the same."""
        return self._local.statistics

    # Steps

    @abstractmethod
    def admit(self, admission: Admission) -> None:
        """See `Executor.admit`. Workers do it meanwhile; `wait` says if one could not."""

    @abstractmethod
    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """See `Executor.set_masks`."""

    @abstractmethod
    def _pack(self, plan: StepPlan, shape: StepShape) -> tuple[slice, Words]:
        """Pack a step's plan. Returns where this rank's part belongs, as `StepRunner.pack` does, and what others are told."""

    def launch(self, plan: StepPlan) -> Ticket:
        """See `Executor.launch`.

        Raises:
            EngineDeadError: a rank has ended, or does not come.
        """
        runner = self.runner
        try:
            record, graph = runner.graphs.graph_for(plan)
            if record.eager_reason is not None and record.shape not in self._tried:
                self._order(Kind.TRY, shape=self._number_of(record.shape))
                self._store.try_eager_twin(record.shape)
                self._tried.add(record.shape)
        except torch.OutOfMemoryError as error:  # before anybody was told to launch
            raise DeviceMemoryError(str(error)) from error
        if record is not self._last_record:
            self._last_record, self._last_shape = record, self._number_of(record.shape)
        part, words = self._pack(plan, record.shape)
        kind = Kind.LAUNCH if record.eager_reason is None else Kind.EAGER
        self._order(kind, runner.num_launched % NUMBERS, self._last_shape, words)
        try:
            runner.put(part)
            step = runner.run(graph)
        except Exception as error:
            raise self._fail(f"rank 0 could not launch a step that others had launched: {error}") from error
        return Ticket(step, plan, record)

    def wait(self, ticket: Ticket) -> None:
        """See `Executor.wait`. It ends whatever happens to other ranks: collectives are given up then."""
        self._watch.since = time.monotonic()
        try:
            self._await(ticket)
        finally:
            self._watch.since = None
        self._check()
        if ticket.step <= self._admitted_at:
            failures = self._workers.admission_failures()
            if failures:
                slots = [self._slot_of(failure) for failure in failures]
                raise AdmissionError(failures[0].message, slots)

    def _await(self, ticket: Ticket) -> None:
        """Block until the results of a step lie where `collect` reads them."""
        self._local.wait(ticket)

    def _slot_of(self, failure: NotAdmitted) -> int:
        """The slot of a request that a worker could not admit, as the engine numbers slots."""
        return failure.slot

    def collect(self, ticket: Ticket) -> StepResults:
        """See `Executor.collect`."""
        return self._local.collect(ticket)

    def recover(self) -> None:
        """See `Executor.recover`."""
        self._tried.clear()
        self.on_all(LocalExecutor.recover)
        self._workers.admission_failures()  # which are those of requests that will be admitted anew

    # LoRA adapters

    def read_adapter(self, folder: str) -> AdapterFile:
        """See `Executor.read_adapter`: this rank's part."""
        return self._local.read_adapter(folder)

    def write_adapter(self, number: int, file: AdapterFile) -> None:
        """See `Executor.write_adapter`. The other ranks read their parts now.

        Raises:
            RequestError: the folder holds something else by now.
        """
        self._together(lambda: None, _read_and_write_adapter, number, file.folder, file.version)
        self._local.write_adapter(number, file)

    # Life

    def sleep(self, *, keep_weights: bool) -> None:
        """See `Executor.sleep`. If a rank cannot, none does, or the engine ends where others have dropped their weights."""
        self._tried.clear()
        try:
            self.on_all(_sleep, keep_weights)
        except Exception as error:
            if not keep_weights:
                raise self._fail(f"not all ranks could drop their weights: {error}") from error
            self._undo(error, LocalExecutor.wake)
            raise

    def wake(self) -> None:
        """See `Executor.wake`. If a rank cannot, all sleep on."""
        try:
            self.on_all(LocalExecutor.wake)
        except Exception as error:
            self._undo(error, _sleep, True)
            raise

    def check_weights(self, weights: ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """See `Executor.check_weights`. Each rank reads its part of a checkpoint; tensors are sent to the others."""
        self._sends_weights = not isinstance(weights, ModelSource)
        if isinstance(weights, ModelSource):
            check = partial(self._local.check_weights, weights)
            self._together(check, _check_source, weights.name, self._model_impl)
        else:
            self._local.check_weights(weights)
            self._together(lambda: None, LocalExecutor.expect_weights, self._local.announced_weights())

    def write_weights(self) -> None:
        """See `Executor.write_weights`."""
        if self._sends_weights:
            for bucket in self._local.buckets(_BUCKET_BYTES):
                self._together(lambda: None, LocalExecutor.take_weights, bucket)
        self.on_all(LocalExecutor.write_weights)

    def close(self) -> None:
        """See `Executor.close`. Takes a bounded time, whatever the other ranks do."""
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as rest:
            if self._threads is not None:
                rest.callback(self._threads.restore)
            if self._ends_workers:
                rest.callback(self._workers.close)
            if self._movers is not None:
                self._movers.close()
            with suppress(StepgraphError):  # if there is one, all others have been ended
                self._check()
                self._order(Kind.END)
            self._end_watch()
            del self._store  # which knows the runner
            self._local.close()

    def watch_cache(self, lost: Callable[[], None]) -> None:
        """See `Executor.watch_cache`."""
        self._local.watch_cache(lost)

    # Transfers

    def export_cache(self, backend: str) -> ExportedCache:
        """See `Executor.export_cache`."""
        exported, *others = self._together(partial(self._local.export_cache, backend), _export_cache, backend)
        self._movers = RankedMovers(exported.movers, self._workers.mover_pipes, lambda: self._local.num_done)
        return ExportedCache(exported.layout, exported.is_cut, (*exported.ranks, *others), self._movers)

    def keep_on_host(self, num_bytes: int) -> HostCopies:
        """See `Executor.keep_on_host`."""
        raise AssertionError("settings refuse it")

    # Graphs

    def prepare(self) -> bool:
        """See `Executor.prepare`. Where nothing is left, ranks are asked whether they are still alike.

        Raises:
            EngineDeadError: they are not.
        """
        self._check()
        if self._local.prepare():
            return True
        if self.runner.num_launched != self._alike_at:
            self.check_alike()
        return False

    def graph_counts(self) -> GraphCounts:
        """See `Executor.graph_counts`: those of rank 0; others have the same graphs."""
        return self._local.graph_counts()

    def graph_records(self) -> list[GraphRecord]:
        """See `Executor.graph_records`: those of rank 0."""
        return self._local.graph_records()

    def watch_captures(self, about_to: Callable[[], None]) -> None:
        """See `Executor.watch_captures`."""
        self._about_to = about_to

    # Ranks

    def on_all(self, function: Callable[..., R], *args: Any) -> list[R]:
        """See `Executor.on_all`."""
        own, *others = self._together(partial(function, self._local, *args), function, *args)
        return [own, *others]

    @abstractmethod
    def check_alike(self) -> None:
        """EngineDeadError if a rank is not where it must be, with no step under way."""

    def rank_reports(self) -> list[RankReport]:
        """See `Executor.rank_reports`."""
        return self._on_all_soon(LocalExecutor.report)

    def _on_all_soon(self, function: Callable[[LocalExecutor], R]) -> list[R]:
        """`on_all` of what takes no time, so that a rank which does not answer is one that hangs."""
        own, *others = self._together(partial(function, self._local), function, limit_s=self._time_limit_s)
        return [own, *others]

    def _undo(self, reason: Exception, function: Any, *args: Any) -> None:
        """Bring back those that could do what others could not, for a reason. If that fails, too, the engine ends."""
        if self._failure is not None:
            return
        try:
            self.on_all(function, *args)
        except Exception as error:
            raise self._fail(f"{reason}; and then: {error}") from reason

    def _together(self, own: Callable[[], Any], function: Any, *args: Any, limit_s: float | None = None) -> list[Any]:
        """What `own` returns here, and ``function(executor, *args)`` meanwhile on each of the others. If several fail, the error
        is that of the least rank. `limit_s`: how long the answers may take after `own`; default: what `Workers` allows."""
        self._check()
        self._order(Kind.CALL, words=words_of_call(function, args))
        self._store.before_capture = lambda key: self._about_to()  # the others come to it by themselves
        failure: BaseException | None = None
        results = []
        try:
            results.append(own())
        except BaseException as error:
            failure = error
        finally:
            self._store.before_capture = self._order_capture
        try:
            results += self._workers.replies(limit_s)
        except EngineDeadError as error:
            raise self._fail(str(error)) from failure
        except StepgraphError:
            if failure is None:
                raise
        except BaseException:
            self._fail("what all ranks were told to do was interrupted")  # and what they reply may come later
            raise
        if failure is not None:
            raise failure
        return results

    def _order(self, kind: Kind, number: int = 0, shape: int = 0, words: Words = NOTHING) -> None:
        if self._failure is not None or self._workers.has_ended:
            self._check()
        try:
            self._workers.ring.write(kind, number, shape, words)
        except EngineDeadError as error:
            raise self._fail(str(error)) from None
        except BaseException:
            self._fail("an order was interrupted, of which other ranks have read a part")
            raise

    def _number_of(self, shape: StepShape) -> int:
        """Under which workers know a shape, which they are told at its first use."""
        number = self._shapes.get(shape)
        if number is None:
            number = self._shapes[shape] = len(self._shapes)
            self._order(Kind.SHAPE, words=words_of_shape(shape))
        return number

    def _order_capture(self, shape: StepShape) -> None:
        self._order(Kind.CAPTURE, shape=self._number_of(shape))
        self._about_to()

    def _check(self) -> None:
        """EngineDeadError if a rank has ended, or a collective was given up."""
        if self._failure is not None:
            raise self._failure
        if self._workers.has_ended:
            try:
                self._workers.check()
            except EngineDeadError as error:
                raise self._fail(str(error)) from None
        fault = self._group.fault()
        if fault is not None:
            raise self._fail(
                f"rank {fault.rank} did not come to collective {fault.sequence} ({fault.collective}) within "
                f"{self._time_limit_s:.0f} s"
            )
        if self._watch.is_late:
            raise self._fail(
                f"a step was not done within {self._watch.limit_s:.0f} s: a rank hangs, and collectives by {self._group.name} do "
                "not say which"
            )

    def _fail(self, what: str) -> StepgraphError:
        """Note what ended the engine, and end all other ranks. Returns what was noted first."""
        if self._failure is not None:
            return self._failure
        self._group.abort()
        self._failure = EngineDeadError(what)
        self._workers.close(now=True)
        return self._failure


def _check_source(executor: LocalExecutor, name: str, model_impl: str) -> None:
    executor.check_weights(resolve(name, model_impl=model_impl))


def _export_cache(executor: LocalExecutor, backend: str) -> str:
    return executor.export_cache(backend).ranks[0]


def _sleep(executor: LocalExecutor, keep_weights: bool) -> None:
    executor.sleep(keep_weights=keep_weights)


def _read_and_write_adapter(executor: LocalExecutor, number: int, folder: str, version: tuple[int, ...]) -> None:
    file = executor.read_adapter(folder)
    if file.version != version:
        raise RequestError(f"the LoRA adapter {folder} was changed after rank 0 had read it; ask for it again")
    executor.write_adapter(number, file)
