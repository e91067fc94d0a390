"""What an observer of the server is told, made up for tests."""

import asyncio
from dataclasses import replace

from stepgraph.config.server import ServerConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.server.bodies import Bodies
from stepgraph.server.connections import Connections, Limits
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.generation import EndedRequest
from stepgraph.server.messages import Load, Progress, Ready, StepInfo, TokenUpdate
from stepgraph.server.metrics import Metrics
from stepgraph.server.rest import Rest

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
)
IN_GRAPH = StepInfo("mixed", "plain", 24, 8, 3, 21, None, 0.004, 0.001)
EAGER = StepInfo("decode", "extended", 2, 2, 0, 2, "not_pure_prefill", 0.05, 0.002)


def busy_metrics() -> Metrics:
    """Metrics that have seen one of everything."""
    metrics = Metrics("tiny")
    metrics.on_state(EngineState.READY)
    metrics.on_progress(Progress([TokenUpdate("a", (5,)), TokenUpdate("b", (6, 7))], [IN_GRAPH, EAGER], LOAD))
    metrics.on_first_token(0.02)
    metrics.on_token_gap(0.004)
    for reason in ("stop", "length", "abort", "error"):
        metrics.on_end(replace(ENDED, finish_reason=reason))
    metrics.on_response("/v1/chat/completions", 200)
    config = ServerConfig()
    metrics.watch(Bodies(config, asyncio.to_thread), Connections(Limits.of(config), max_open=8), Rest())
    return metrics
