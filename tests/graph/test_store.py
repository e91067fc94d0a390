"""GraphStore knows of its keys that they are ordered and which holds which."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Barrier

import pytest

from stepgraph.errors import CaptureError, DeviceMemoryError
from stepgraph.graph.store import GraphStore


@dataclass(frozen=True, order=True)
class Size:
    """As a key: a graph of some size runs smaller ones of its color."""

    number: int
    color: str = "red"

    def holds(self, other):
        return self.number >= other.number and self.color == other.color


class Graph:
    def __init__(self, program):
        self.program = program

    def replay(self):
        return self.program()


@dataclass
class Workshop:
    """Backend and source of programs; `faults` are raised by the capture of a key."""

    faults: dict = field(default_factory=dict)
    name: str = "fake"
    log: list = field(default_factory=list)
    inside: bool = False

    def create_program(self, key):
        self.log.append(f"create {key.number}, {'inside' if self.inside else 'outside'}")

        def program():
            return key

        program.key = key
        return program

    @contextmanager
    def leaving_no_trace(self):
        self.inside = True
        yield
        self.inside = False

    def try_out(self, graph):
        self.log.append(f"try {graph.replay().number}")

    def capture(self, program, warmups):
        if program.key in self.faults:
            raise self.faults[program.key]
        return Graph(program)

    def memory_bytes(self):
        return 0


def create_store(workshop: Workshop, **settings) -> GraphStore:
    return GraphStore(workshop, workshop, **settings)


def test_a_graph_is_captured_once_and_found_by_its_key_alone() -> None:
    workshop = Workshop()
    store = create_store(workshop)
    first, other = store.graph(Size(4)), store.graph(Size(4, "blue"))
    assert store.graph(Size(4)) is first is store.serving(Size(4)).graph is not other
    assert workshop.log == ["create 4, inside"] * 2
    assert (Size(4) in store, Size(2) in store) == (True, False)
    assert [found.key for found in store.captured] == [Size(4, "blue"), Size(4, "red")]


def test_a_twin_is_the_same_program_without_a_graph_made_once() -> None:
    workshop = Workshop()
    store = create_store(workshop)
    twin = store.eager_twin(Size(3))
    assert twin is store.eager_twin(Size(3))
    assert twin.replay() == store.graph(Size(3)).replay() == Size(3)
    assert workshop.log == ["create 3, outside", "create 3, inside"]
    assert store.num_graphs == 1


def test_what_cannot_be_captured_is_served_by_the_smallest_graph_that_holds_it() -> None:
    store = create_store(Workshop(faults={Size(2): CaptureError("a fault")}))
    for key in (Size(16), Size(1), Size(4, "blue"), Size(8)):
        store.graph(key)
    assert store.serving(Size(2)).key == Size(8)
    assert store.failed_captures == 1
    with pytest.raises(CaptureError):
        store.graph(Size(2))


def test_the_budget_and_a_failure_are_told_apart() -> None:
    store = create_store(Workshop(faults={Size(2): DeviceMemoryError("no memory")}), budget_bytes=10, driver_bytes=7)
    store.capture_all([Size(1)], progress=False)
    assert [store.serving(key) for key in (Size(2), Size(3))] == [None, None]
    assert [store.is_over_budget(key) for key in (Size(2), Size(3))] == [False, True]
    assert store.bytes == 7


def serve_two(*workshops: Workshop, **settings) -> list[GraphStore]:
    """Two ranks' stores, after each was asked for the same key."""
    said, barrier = [b"", b""], Barrier(2, timeout=30)

    def exchange_of(rank: int):
        def exchange(value: bytes) -> list[bytes]:
            said[rank] = value
            barrier.wait()
            heard = list(said)
            barrier.wait()
            return heard

        return exchange

    stores = [
        create_store(workshop, exchange=exchange_of(rank), **{name: of[rank] for name, of in settings.items()})
        for rank, workshop in enumerate(workshops)
    ]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda store: store.serving(Size(4)), stores))
    return stores


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", [DeviceMemoryError("no memory"), CaptureError("a fault"), RuntimeError("a compiler")])
def test_a_graph_that_a_rank_cannot_compile_or_capture_is_nobodys_and_all_say_whose_fault_it_is(
    rank, fault, caplog
) -> None:
    workshops = [Workshop(), Workshop()]
    workshops[rank].faults[Size(4)] = fault
    stores = serve_two(*workshops)
    assert [(Size(4) in store, store.num_graphs, store.failed_captures) for store in stores] == [(False, 0, 1)] * 2
    assert f"rank {rank}: {fault}" in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_graph_over_the_budget_of_one_rank_is_over_that_of_all(rank) -> None:
    budgets = [10, 10]
    budgets[rank] = 5
    stores = serve_two(Workshop(), Workshop(), budget_bytes=budgets, driver_bytes=[7, 7])
    assert [(Size(4) in store, store.is_over_budget(Size(4)), store.bytes) for store in stores] == [
        (False, True, 0)
    ] * 2
    stores = serve_two(Workshop(), Workshop(), budget_bytes=[10, 10], driver_bytes=[7, 7])
    assert [Size(4) in store for store in stores] == [True, True]


def test_the_first_of_graphs_captured_all_at_once_is_tried_out() -> None:
    workshop = Workshop()
    create_store(workshop).capture_all([Size(8), Size(4)], progress=False)
    assert workshop.log == ["create 8, inside", "try 8", "create 4, inside"]


def test_whoever_waits_is_told_before_each_capture() -> None:
    workshop = Workshop()
    store = create_store(workshop)
    store.before_capture = lambda key: workshop.log.append("tell")
    store.serving(Size(4))
    store.serving(Size(4))
    assert workshop.log == ["tell", "create 4, inside"]


def test_a_closed_store_holds_no_graph_and_counts_on() -> None:
    store = create_store(Workshop(), driver_bytes=7)
    graphs = [weakref.ref(store.graph(Size(4))), weakref.ref(store.eager_twin(Size(2)))]
    seconds = store.capture_seconds
    assert (store.num_graphs, store.bytes, seconds > 0) == (1, 7, True)
    store.close()
    assert [graph() for graph in graphs] == [None, None]
    assert (store.num_graphs, store.bytes, store.capture_seconds) == (0, 0, seconds)
