"""Graphs that run nothing, the device that captures them, and the settings that tests share."""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field

from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.graph.store import GraphStore
from stepgraph.step.graphs import StepGraphs
from stepgraph.step.plan import StepPlan
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy

MIB = 2**20


@dataclass(frozen=True)
class FakeGraph:
    shape: StepShape


@dataclass
class Device:
    """Graph backend, source of programs and memory in one: a captured graph needs as many bytes as `bytes_of` says, of a memory
    that all share and that is given back when no graph is left."""

    bytes_of: object = lambda shape: 0
    name: str = "fake"
    captured: list = field(default_factory=list)  # (shape, warm-ups, whether inside the capture context)
    trials: list = field(default_factory=list)
    inside: bool = False
    failing: object = lambda shape: None  # raises what the capture of a shape is to fail with
    num_counted: int = 0  # times that the memory was counted
    _used_bytes: int = 0
    _graphs: list = field(default_factory=list)  # weakly

    def capture(self, program, warmups):
        self.captured.append((program, warmups, self.inside))
        self.failing(program)
        self._used_bytes = max(self.memory_bytes(), self.bytes_of(program))
        graph = FakeGraph(program)
        self._graphs.append(weakref.ref(graph))
        return graph

    def memory_bytes(self):
        self.num_counted += 1
        return self._used_bytes if any(graph() is not None for graph in self._graphs) else 0

    def create_program(self, shape):
        return shape

    def try_out(self, graph):
        self.trials.append(graph)

    @contextmanager
    def leaving_no_trace(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def shapes(self):
        return [str(shape) for shape, *_ in self.captured]


def create_policy(*, max_tokens=64, max_rows=8, draft_levels=(0,), graphs_off=False, **config) -> ShapePolicy:
    return ShapePolicy.of(
        graph_config(**config),
        SchedulerConfig(max_num_batched_tokens=max_tokens, max_num_seqs=max_rows),
        draft_levels=draft_levels,
        graphs_off=graphs_off,
    )


def graph_config(**config) -> GraphConfig:
    return GraphConfig(**{"capture_sizes": (8, 16, 64), "capture_rows": (2, 8)} | config)


def create_graphs(
    device: Device, *, max_tokens=64, max_rows=8, draft_levels=(0,), graph_bytes=0, lazy=True, **config
) -> StepGraphs:
    settings = graph_config(**config)
    budget = settings.graph_memory_mib
    store = GraphStore(
        device,
        device,
        budget_bytes=None if budget is None else budget * MIB,
        driver_bytes=graph_bytes,
        warmups=settings.capture_warmups,
    )
    policy = create_policy(
        max_tokens=max_tokens,
        max_rows=max_rows,
        draft_levels=draft_levels,
        graphs_off=device.name == "eager",
        **config,
    )
    return StepGraphs(settings, policy, store, lazy=lazy)


def plan(*query_lens: int, prefill_rows: int = 0) -> StepPlan:
    return StepPlan(tuple((slot, n) for slot, n in enumerate(query_lens, start=1)), (), prefill_rows)
