"""What an observer of the server is told, made up for tests."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from prometheus_client.core import Metric

from stepgraph.config.server import ServerConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.server.counts import EngineCounts, FrontCounts, RequestCounts
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.engine_life import Launch
from stepgraph.server.engine_observer import EngineState, EngineStatus
from stepgraph.server.generation import EndedRequest
from stepgraph.server.messages import Load, Progress, RankInfo, Ready, StepInfo, TokenUpdate, TransferLoad
from stepgraph.server.metrics import Metrics
from stepgraph.server.replicas import Replicas
from stepgraph.server.rest import Rest
from stepgraph.server.service import Service
from stepgraph.server.supervisor import OneFront, Supervisor

ENDED = EndedRequest(
    finish_reason="stop",
    params=SamplingParams(max_tokens=64, temperature=0.5, top_p=0.9),
    num_prompt_tokens=20,
    num_cached_tokens=16,
    num_output_tokens=5,
    arrived_at=100.0,
    admitted_at=100.5,
    first_token_at=101.5,
    last_token_at=103.5,
    ended_at=103.75,
)
READY = Ready(
    max_model_len=64,
    max_num_seqs=1,
    backend="cpu",
    device="cpu",
    precision="float32",
    num_kv_blocks=9,
    block_size=16,
    max_drafts=0,
    end_token_ids=(0,),
    longest_step_s=0.0,
    max_adapters=2,
)
LOAD = Load(
    num_running=2,
    num_waiting=1,
    kv_usage=0.25,
    preemptions=3,
    prompt_tokens=40,
    cached_prompt_tokens=16,
    num_graphs=7,
    graph_bytes=1000,
    capture_seconds=1.5,
    failed_captures=2,
    drafts=10,
    draft_tokens=28,
    saved_steps=14,
    accepted_per_position=(9, 4, 2),
    transfers=TransferLoad(
        1,
        2,
        3,
        40,
        4000,
        50,
        5000,
        17,
        {"confirmed": 6},
        {"link": 1},
        (0, 2, *[0] * 23),
        0.002,
        (2, *[0] * 24),
        0.0,
        5,
        640,
        7,
        8,
    ),
    adapters=("/adapters/poet",),
    awaited_adapters=("/adapters/critic",),
)
IN_GRAPH = StepInfo("mixed", "plain", 24, 8, 3, 21, None, 0.004, 0.001)
EAGER = StepInfo("decode", "extended", 2, 2, 0, 2, "not_pure_prefill", 0.05, 0.002)


class OneServer:
    """What is counted of a server with one engine and one front, by its name in tests: as the two tell it."""

    def __init__(self, model_name: str, num_engines: int = 1):
        self.adapters = {"poet": "/adapters/poet", "critic": "/adapters/critic", "idle": "/adapters/idle"}
        self.engine = EngineCounts()
        self.engines = [self.engine, *(EngineCounts() for _ in range(num_engines - 1))]
        self.front = FrontCounts.of(num_engines)
        self.requests = self.front.engines[0]
        self._metrics = Metrics(model_name, self.engines, Rest(), self.adapters)
        self.on_first_token, self.on_token_gap = self.requests.on_first_token, self.requests.on_token_gap
        self.on_end, self.on_response = self.requests.on_end, self.front.on_response
        self.on_restart = self.engine.on_restart

    def on_progress(self, message: Progress) -> None:
        self.engine.on_progress(message)
        self.requests.on_progress(message)

    def on_state(self, state: EngineState) -> None:
        self.engine.on_status(EngineStatus(state, READY if state is EngineState.READY else None))

    def render(self, accept: str | None) -> tuple[bytes, str]:
        return self._metrics.render(accept, self.front)

    def collect(self) -> Iterator[Metric]:
        self.render(None)
        return self._metrics.collect()


def one_engine(send: Callable[[bytes], None] = lambda content: None, *, is_ready: bool = True) -> Replicas:
    """An engine of which a front has heard that it takes requests."""
    replicas = Replicas([EngineClient(send, RequestCounts())], Rest())
    if is_ready:
        replicas.on_status(0, EngineStatus(EngineState.READY, READY))
    return replicas


def service(
    config: ServerConfig | None = None,
    replicas: Replicas | None = None,
    load_model: Any = SimpleNamespace,
) -> Service:
    """What endpoints share, in front of `replicas`."""
    config, replicas = config or ServerConfig(), replicas or one_engine(is_ready=False)
    counts, supervisor = FrontCounts.of(1), Supervisor([Launch({})], "tiny", config.adapters())
    supervisor.attach(OneFront(replicas, lambda: counts))
    return Service(config, replicas, load_model, supervisor, supervisor.adapters, counts)


def busy_metrics(model_name: str = "tiny") -> OneServer:
    """Metrics that have seen one of everything."""
    metrics = OneServer(model_name)
    metrics.on_state(EngineState.READY)
    metrics.on_progress(Progress([TokenUpdate("a", (5,)), TokenUpdate("b", (6, 7))], [IN_GRAPH, EAGER], LOAD))
    metrics.on_first_token(0.02)
    metrics.on_token_gap(0.004)
    for reason in ("stop", "length", "abort", "error"):
        metrics.on_end(replace(ENDED, finish_reason=reason))
    metrics.on_response("/v1/chat/completions", 200)
    metrics.front.connections_ended = {"idle": 1}
    metrics.engine.ranks = [
        RankInfo(0, "cuda:0", 1000, 20, 80, 0.5, 0.0, 4, (3, 1, 0, 12)),
        RankInfo(1, "cuda:1", 900, 30, 80, 0.25, 0.75, 12),
    ]
    return metrics
