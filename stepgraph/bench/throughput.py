"""``bench throughput``: many requests through an engine in this process, all at once or as they arrive."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from stepgraph.bench.length_flags import add_length_flags, check_lengths, length_range
from stepgraph.bench.offline import HEADER, Job, StepShares, answered, run_round, settings_line
from stepgraph.bench.peers import Peers, load_peers, mark_cells
from stepgraph.bench.report import machine, table, write_json
from stepgraph.bench.routing import add_routing_flag, apply_routing, check_routing
from stepgraph.bench.serve_metrics import summarize
from stepgraph.bench.serve_prompts import PromptOptions, make_prompts
from stepgraph.bench.serve_report import latency_table, summary_table
from stepgraph.bench.workloads import arrival_times
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.engine.build import build_engine
from stepgraph.errors import ConfigError
from stepgraph.executor.build import context_len
from stepgraph.models.source import resolve_configured

_INPUT_LEN, _OUTPUT_LEN = 512, 128
_METRICS = ("ttft", "tpot", "itl")
_PERCENTILES = (95, 99)
_COMPARED = ("total_token_throughput", "median_ttft_ms", "p95_ttft_ms", "median_itl_ms", "p95_itl_ms", "p99_itl_ms")


def add_parser(commands: Any) -> None:
    """Register ``bench throughput``."""
    parser = commands.add_parser(
        "throughput",
        help="tokens per second of many requests, offline; latencies under Poisson arrivals",
        description="Send random prompts through an engine in this process, answered greedily to their full length.",
        allow_abbrev=False,
    )
    parser.add_argument("--num-prompts", type=int, default=256, metavar="N", help="requests (default: 256)")
    add_length_flags(parser, _INPUT_LEN, f"which always reaches it (default: {_OUTPUT_LEN})")
    parser.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="arrivals per second, a Poisson process (default: all at once)",
    )
    parser.add_argument(
        "--num-warmups", type=int, default=8, metavar="N", help="requests before the first round (default: 8)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="rounds, of which the one of median throughput is reported (default: 3; 1 with --request-rate)",
    )
    add_routing_flag(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code.

    Raises:
        ConfigError: flags out of range, or requests that do not fit into the context.
        StepgraphError: a request failed.
    """
    repeats = arguments.repeats or (3 if math.isinf(arguments.request_rate) else 1)
    if min(arguments.num_prompts, repeats) < 1 or arguments.num_warmups < 0 or not arguments.request_rate > 0:
        raise ConfigError(
            f"num_prompts={arguments.num_prompts}, repeats={arguments.repeats}, num_warmups={arguments.num_warmups}, "
            f"request_rate={arguments.request_rate}: at least one prompt and one round, no negative number, a rate above 0"
        )
    check_lengths(arguments)
    ratio = arguments.random_range_ratio or 0.0
    inputs = length_range(arguments.random_input_range, arguments.random_input_len or _INPUT_LEN, ratio)
    outputs = length_range(arguments.random_output_range, arguments.random_output_len or _OUTPUT_LEN, ratio)
    # Prompts of repeated rounds are the same, and shall be computed each time.
    config = EngineConfig.from_settings(**({"enable_prefix_caching": False} | settings_from_flags(arguments)))
    source = resolve_configured(config.model)
    if inputs[1] + outputs[1] > (longest := context_len(config, source)):
        raise ConfigError(
            f"a prompt of {inputs[1]} tokens and an answer of {outputs[1]} do not fit into max_model_len={longest}; shorten them "
            "or raise it"
        )
    check_routing([arguments.routing], config)
    engine = build_engine(config, source=source, progress=sys.stderr.isatty())
    apply_routing(arguments.routing, engine)
    options = PromptOptions(
        dataset="random",
        chat=False,
        seed=config.model.seed,
        input_range=inputs,
        output_range=outputs,
        vocab_size=engine.source.config.vocab_size,
    )
    prompts = make_prompts(options, arguments.num_prompts + arguments.num_warmups)
    times_s = arrival_times(arguments.num_prompts, rate=arguments.request_rate, burstiness=1.0, seed=config.model.seed)
    jobs = [
        Job(cast(list[int], prompt.content), prompt.max_tokens, due_s)
        for prompt, due_s in zip(prompts, times_s + [0.0] * arguments.num_warmups, strict=True)
    ]
    workload = _name(arguments.num_prompts, inputs, outputs, arguments.request_rate)

    answered(run_round(engine, jobs[arguments.num_prompts :]))
    rounds = [
        answered(run_round(engine, jobs[: arguments.num_prompts]))
        for _ in tqdm(range(repeats), desc="rounds", leave=False, disable=not sys.stderr.isatty())
    ]
    engine.shutdown()
    in_order = sorted(rounds, key=lambda round_: round_.duration_s)
    shown = in_order[(len(in_order) - 1) // 2]
    summary = summarize(
        shown.outcomes, duration_s=shown.duration_s, metrics=_METRICS, percentiles=_PERCENTILES, goodput_ms={}
    )
    shares = StepShares.of(engine, shown.steps)
    where = machine(engine.executor.specs.device)
    peers = load_peers(engine.source.name, where["device"], engine.executor.specs.num_ranks)
    print(f"{settings_line(engine, where)}; {workload}, the median of {repeats} rounds\n")
    print(summary_table(summary, arguments.num_prompts, ()))
    print(f"\n{latency_table(summary, _METRICS, _PERCENTILES)}")
    print(f"\n{table(('', *HEADER), [('steps of the round', *shares.cells())])}")
    if compared := _comparison(peers, workload, summary):
        print(f"\n{compared}\n{peers.source}")
    captured = [StepShares.of(engine, round_.steps).captured for round_ in rounds]
    if any(captured):
        print(
            f"\n{captured} graphs were captured in the rounds; more --num-warmups or --capture all keep that out of them"
        )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "throughput",
                "machine": where,
                "num_ranks": engine.executor.specs.num_ranks,
                "settings": asdict(config),
                "routing": arguments.routing,
                "workload": workload,
                "rounds_s": [round_.duration_s for round_ in rounds],
                **summary,
                "steps": asdict(shares),
                "captured": captured,
                "peers": {name: asdict(peers.mark(workload, name)) for name in peers.figures.get(workload, ())},
            },
        )
    return 0


def _name(num_prompts: int, inputs: tuple[int, int], outputs: tuple[int, int], rate: float) -> str:
    """A workload's name, as in `peers.json`."""
    lengths = (f"{low}" if low == high else f"{low}-{high}" for low, high in (inputs, outputs))
    pace = "" if math.isinf(rate) else f" at {rate:g}/s"
    return f"{num_prompts} x ({next(lengths)} in + {next(lengths)} out){pace}"


def _comparison(peers: Peers, workload: str, summary: dict[str, Any]) -> str:
    """A table of the figures that others have, too; empty without any."""
    rows: Sequence[tuple[str, ...]] = [
        (name, f"{summary[name]:.1f}", *mark_cells(peers.mark(workload, name), ".1f"))
        for name in _COMPARED
        if name in peers.figures.get(workload, ())
    ]
    return table((workload, "here", "peer", "target"), rows) if rows else ""
