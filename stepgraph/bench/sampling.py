"""``bench sampling``: what each sampling feature adds to a decode step."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stepgraph.abi import slot_line
from stepgraph.bench.graphs import CONTEXT, GREEDY, Contender, lay_out, time_interleaved
from stepgraph.bench.offline import settings_line
from stepgraph.bench.report import check_one_device, machine, table, write_json
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.engine.build import build_engine
from stepgraph.errors import ConfigError
from stepgraph.executor.build import context_len
from stepgraph.executor.local import runner_of
from stepgraph.models.source import resolve_configured
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import Variant
from stepgraph.step.slot_sampling import SlotSampling

ROWS = (1, 64, 256)


@dataclass(frozen=True)
class Feature:
    """Something that every row of a step asks for."""

    name: str
    sampling: SlotSampling
    variant: Variant = Variant.EXTENDED


FEATURES = (
    Feature("greedy", GREEDY, Variant.PLAIN),
    Feature("temperature", SlotSampling(seed=1, temperature=0.8), Variant.PLAIN),
    Feature("top_k 50", SlotSampling(seed=1, temperature=0.8, top_k=50), Variant.PLAIN),
    Feature("top_p 0.9", SlotSampling(seed=1, temperature=0.8, top_p=0.9), Variant.PLAIN),
    Feature("min_p 0.05", SlotSampling(seed=1, temperature=0.8, min_p=0.05), Variant.PLAIN),
    Feature("extended graph, nothing asked", GREEDY),
    Feature("repetition penalty", SlotSampling(seed=1, repetition_penalty=1.2)),
    Feature("presence and frequency", SlotSampling(seed=1, presence_penalty=0.5, frequency_penalty=0.5)),
    Feature("logit_bias, 300 tokens", SlotSampling(seed=1, logit_bias=tuple((7 * i, 0.5) for i in range(300)))),
    Feature("bad_words, 16", SlotSampling(seed=1, bad_words=tuple((i, i + 1) for i in range(16)))),
    Feature("min_tokens", SlotSampling(seed=1, min_tokens=1 << 20, stop_token_ids=(2,))),
    Feature("mask (grammar, allowed tokens)", SlotSampling(seed=1, masked=True)),
    Feature("logprobs of the token", SlotSampling(seed=1, num_logprobs=1)),
    Feature("logprobs, top 5", SlotSampling(seed=1, num_logprobs=6)),
    Feature("logprobs, top 20", SlotSampling(seed=1, num_logprobs=21)),
    Feature(
        "all of these",
        SlotSampling(
            seed=1,
            temperature=0.8,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            min_tokens=1 << 20,
            stop_token_ids=(2,),
            logit_bias=tuple((7 * i, 0.5) for i in range(300)),
            bad_words=tuple((i, i + 1) for i in range(16)),
            masked=True,
            num_logprobs=21,
        ),
    ),
)


@dataclass(frozen=True)
class Cost:
    """Median of one feature at one number of rows."""

    feature: str
    rows: int
    step_ms: float
    added_us: float  # over the greedy step in a plain graph


def add_parser(commands: Any) -> None:
    """Register ``bench sampling``."""
    parser = commands.add_parser(
        "sampling",
        help="what each sampling feature adds to a decode step",
        description="Time decode steps of 1, 64 and 256 rows with each sampling feature in every row, interleaved with the "
        "plain greedy step.",
    )
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timed runs per case (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    if arguments.repeats < 1:
        raise ConfigError(f"repeats={arguments.repeats} must be 1 or more")
    settings: dict[str, Any] = {"max_num_seqs": max(ROWS), "capture": "lazy"} | settings_from_flags(arguments)
    config = EngineConfig.from_settings(**settings)
    check_one_device(config)
    source = resolve_configured(config.model)
    if (longest := context_len(config, source)) < CONTEXT + 2:
        raise ConfigError(
            f"max_model_len={longest} is too small for decode steps at {CONTEXT} tokens of context; give {CONTEXT + 2} or more"
        )
    engine = build_engine(config, source=source, progress=sys.stderr.isatty())
    runner = runner_of(engine.executor)
    most = min(runner.policy.max_shape.num_rows, (runner.num_kv_blocks - 1) // -(-(CONTEXT + 1) // runner.block_size))
    if not most:
        raise ConfigError(
            f"num_kv_blocks={runner.num_kv_blocks} hold no request of {CONTEXT + 1} tokens; raise it, or leave it unset"
        )
    costs = [cost for rows in ROWS if rows <= most for cost in measure(runner, rows, arguments.repeats)]
    where = machine(engine.executor.specs.device)
    print(
        f"{settings_line(engine, where)}; decode steps at {CONTEXT} tokens of context, medians of {arguments.repeats} "
        "interleaved runs\n"
    )
    print(_table(costs))
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "sampling",
                "machine": where,
                "settings": asdict(config),
                "costs": [asdict(cost) for cost in costs],
            },
        )
    return 0


def measure(runner: StepRunner, rows: int, repeats: int) -> list[Cost]:
    """Time every feature at one number of rows."""
    with runner.workbench():
        contenders = []
        half = np.full(-(-runner.vocab_size // slot_line.MASK_BITS), 0x55555555, dtype=np.int32)
        for slot in range(1, rows + 1):
            runner.state.set_masks(slot, half[None])
        for feature in tqdm(FEATURES, f"preparing {rows} rows", leave=False, disable=not sys.stderr.isatty()):
            plan = lay_out(runner, [(1, CONTEXT + 1)] * rows, feature.sampling)
            shape = runner.policy.round_up(rows, rows, feature.variant)
            graph = runner.graphs.store.graph(shape) or runner.graphs.store.eager_twin(shape)
            contenders.append(Contender(plan, shape, graph, runner.state.lines.clone()))
        times = time_interleaved(runner, contenders, repeats)
    return [
        Cost(feature.name, rows, step_ms, 1e3 * (step_ms - times[0]))
        for feature, step_ms in zip(FEATURES, times, strict=True)
    ]


def _table(costs: list[Cost]) -> str:
    rows = sorted({cost.rows for cost in costs})
    found = {(cost.feature, cost.rows): cost for cost in costs}
    header = ["every row asks for"]
    for count in rows:
        header += [f"{count} row{'s' * (count > 1)}: ms", "added us"]
    lines = []
    for feature in FEATURES:
        cells = [feature.name]
        for count in rows:
            cost = found[feature.name, count]
            cells += [f"{cost.step_ms:.3f}", f"{cost.added_us:+.0f}"]
        lines.append(cells)
    return table(header, lines)
