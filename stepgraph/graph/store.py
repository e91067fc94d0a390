"""GraphStore: the captured graphs by their keys, within a budget of memory."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from tqdm import tqdm

from stepgraph.errors import DeviceMemoryError, EngineDeadError
from stepgraph.graph.agreement import agree
from stepgraph.graph.base import Graph, GraphBackend, Output
from stepgraph.graph.eager import EagerGraph
from stepgraph.parallel.exchange import Exchange, alone

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0
"""After memory did not suffice for a graph, it is not tried again for so long."""


class GraphKey(Hashable, Protocol):
    """What graphs are told apart by: sizes. Ordered by cost."""

    def __lt__(self, other: Any, /) -> bool: ...

    def holds(self, other: Self, /) -> bool:
        """Whether a graph of this key can run whatever one of `other` can."""


Key = TypeVar("Key", bound=GraphKey)
KeyContra = TypeVar("KeyContra", bound=GraphKey, contravariant=True)


class ProgramSource(Protocol[KeyContra, Output]):
    """Whose programs are captured."""

    def create_program(self, key: KeyContra, /) -> Callable[[], Output]:
        """The program of a key, over buffers that all share. torch.OutOfMemoryError if there is no memory for them."""

    def leaving_no_trace(self) -> AbstractContextManager[None]:
        """Entered around each capture: inside, programs run on nothing."""

    def try_out(self, graph: Graph[Output], /) -> None:
        """Launch a graph on as much as a launch can meet, leaving no trace."""


@dataclass(frozen=True)
class CapturedGraph(Generic[Key, Output]):
    """One graph, and what it took."""

    key: Key
    graph: Graph[Output]
    capture_ms: float
    bytes: int


class GraphStore(Generic[Key, Output]):
    """Captures graphs, keeps them, and finds them again.

    Several ranks that share a model have a store each, and keep the same graphs: whatever one of them lacks for a graph, all do
    without. They are told to capture the same graphs in the same order.

    Args:
        backend: how to capture.
        source: what to capture.
        budget_bytes: memory that the graphs may take; None if all there is.
        driver_bytes: what the driver holds for each graph, beside the memory that the backend knows of.
        warmups: runs before each capture.
        exchange: between the ranks, by which they agree; default: there is one.
    """

    def __init__(
        self,
        backend: GraphBackend,
        source: ProgramSource[Key, Output],
        *,
        budget_bytes: int | None = None,
        driver_bytes: int = 0,
        warmups: int = 1,
        exchange: Exchange = alone,
    ):
        self.before_capture: Callable[[Key], None] = lambda key: None
        """Called when a graph is about to be captured, which may take long; whoever waits for the engine sets it."""
        self.capture_seconds = 0.0
        """Time all captures took, those of graphs over the budget included."""
        self.failed_captures = 0
        """Captures that failed while somebody was served, who was served otherwise."""
        self._backend, self._source = backend, source
        self._budget_bytes, self._driver_bytes, self._warmups = budget_bytes, driver_bytes, warmups
        self._exchange = exchange
        self._captured: dict[Key, CapturedGraph[Key, Output]] = {}
        self._backend_bytes = 0  # by the backend, which takes long to count; only a capture changes it
        self._eager: dict[Key, Graph[Output]] = {}
        self._over_budget: set[Key] = set()
        self._left_behind = 0  # bytes that graphs over the budget added to the memory that all share
        self._failed: dict[Key, float] = {}  # when each may be tried again

    @property
    def backend_name(self) -> str:
        """How it captures."""
        return self._backend.name

    @property
    def num_graphs(self) -> int:
        """Captured graphs."""
        return len(self._captured)

    @property
    def bytes(self) -> int:
        """Memory that all captured graphs take."""
        return self._backend_bytes + len(self._captured) * self._driver_bytes

    @property
    def captured(self) -> list[CapturedGraph[Key, Output]]:
        """All graphs, smallest key first."""
        return [self._captured[key] for key in sorted(self._captured)]

    def __contains__(self, key: Key) -> bool:
        return key in self._captured

    def captured_graph(self, key: Key) -> Graph[Output]:
        """The graph of a key that was captured."""
        return self._captured[key].graph

    def graph(self, key: Key) -> Graph[Output] | None:
        """The graph of exactly this key, captured now if need be; None if the budget forbids it.

        Raises:
            CaptureError: its program cannot be captured.
            DeviceMemoryError: there is no memory for it.
        """
        found = self._captured.get(key) or self._capture(key)
        return found.graph if found else None

    def serving(self, key: Key) -> CapturedGraph[Key, Output] | None:
        """A graph for somebody who waits: of this key, captured now if need be, or else the smallest there is that holds it.
        None if there is none, because of the budget (see `is_over_budget`) or of a capture that failed, which the log tells."""
        return self._captured.get(key) or self.try_to_capture(key) or self._covering(key)

    def is_over_budget(self, key: Key) -> bool:
        """Whether the graph of this key was found too large."""
        return key in self._over_budget

    def eager_twin(self, key: Key) -> Graph[Output]:
        """The same program, run without a graph."""
        if key not in self._eager:
            self._eager[key] = EagerGraph(self._source.create_program(key))
        return self._eager[key]

    def try_eager_twin(self, key: Key) -> None:
        """Run a program without a graph, on nothing, so that its memory is there when it counts.

        Raises:
            DeviceMemoryError: there is none for it, here or on another rank.
        """
        failure: Exception | None = None
        try:
            with self._source.leaving_no_trace():
                self.eager_twin(key).replay()
        except Exception as error:
            failure = error
        verdict = agree(self._exchange, failure)
        if isinstance(verdict, Exception):
            raise verdict from failure

    def capture_all(self, keys: Sequence[Key], *, progress: bool) -> None:
        """Capture graphs before anybody waits for one, in this order, until the memory budget is used up. The first is tried out:
        where a launch cannot work, this is when to know."""
        started, tried = time.perf_counter(), False
        shown = tqdm(keys, desc="capturing graphs", unit="graph", disable=not progress, leave=False, file=sys.stderr)
        for key in shown:
            shown.set_postfix_str(str(key))
            graph = self.graph(key)
            if graph is not None and not tried:
                self._source.try_out(graph)
                tried = True
        logger.info(
            "captured %d of %d graphs in %.2f s, %.1f MiB",
            self.num_graphs,
            len(keys),
            time.perf_counter() - started,
            self.bytes / 2**20,
        )
        if self._budget_bytes is not None and self.num_graphs < len(keys):
            logger.warning(
                "graph_memory_mib=%s holds %d of %d graphs; other shapes run in a larger graph, or eagerly if none fits",
                self._budget_bytes >> 20,
                self.num_graphs,
                len(keys),
            )

    def try_to_capture(self, key: Key) -> CapturedGraph[Key, Output] | None:
        """Capture a graph while others are served, who must not suffer if that fails: None then, and the log says why.

        Raises:
            EngineDeadError: another rank is gone.
        """
        if time.monotonic() < self._failed.get(key, 0.0):
            return None
        try:
            return self._capture(key)
        except EngineDeadError:  # not about the graph: another rank is gone
            raise
        except Exception as error:
            for_good = not isinstance(error, DeviceMemoryError | torch.OutOfMemoryError)
            self._failed[key] = inf if for_good else time.monotonic() + _RETRY_SECONDS
            self.failed_captures += 1
            logger.warning(
                "the graph %s could not be captured, so its steps run in a larger graph or, if there is none, eagerly%s: %s",
                key,
                "" if for_good else f"; it is tried again after {_RETRY_SECONDS:.0f} s",
                str(error) or repr(error),
            )
            return None

    def close(self) -> None:
        """Let go of all graphs, now and not when garbage is collected: what they use may go next. Capture nothing after it."""
        self._captured.clear()
        self._eager.clear()
        self._backend_bytes = 0

    def _capture(self, key: Key) -> CapturedGraph[Key, Output] | None:
        if key in self._over_budget:
            return None
        self.before_capture(key)
        graph: Graph[Output] | None = None
        failure: Exception | None = None
        before, started = self.bytes, time.perf_counter()
        try:
            try:
                with self._source.leaving_no_trace():
                    graph = self._backend.capture(self._source.create_program(key), self._warmups)
            finally:
                seconds = time.perf_counter() - started
                self.capture_seconds += seconds
                self._backend_bytes = self._backend.memory_bytes()
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        num_bytes = self.bytes + self._driver_bytes - before
        budget = self._budget_bytes
        lacks_budget = failure is None and budget is not None and before + num_bytes - self._left_behind > budget
        verdict = agree(self._exchange, failure, lacks_budget=lacks_budget)
        if verdict is None:
            assert graph is not None
            found = self._captured[key] = CapturedGraph(key, graph, seconds * 1e3, num_bytes)
            logger.debug("captured %s in %.1f ms, %d bytes", key, found.capture_ms, num_bytes)
            return found
        del graph
        self._backend_bytes = self._backend.memory_bytes()
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # whose traceback holds this frame, and so what the program had taken
        self._left_behind += self.bytes - before
        if isinstance(verdict, Exception):
            raise verdict
        self._over_budget.add(key)
        if verdict:
            logger.info("the graph %s is over the memory budget of %s", key, verdict)
        return None

    def _covering(self, key: Key) -> CapturedGraph[Key, Output] | None:
        """The smallest captured graph that holds `key`."""
        fitting = [other for other in self._captured if other.holds(key)]
        return self._captured[min(fitting)] if fitting else None
