"""``bench graphs``: what a captured graph saves, step by step, against the same step launched eagerly."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from stepgraph.bench.account import KernelTime, StepAccount, account
from stepgraph.bench.offline import settings_line
from stepgraph.bench.report import check_one_device, choose, machine, pyplot, save_figure, table, write_json
from stepgraph.bench.roofline import Limits, measure_limits, step_cost
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.executor.local import runner_of
from stepgraph.graph.base import Graph
from stepgraph.graph.eager import EagerGraph
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.program import StepOutput
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import StepShape
from stepgraph.step.slot_sampling import SlotSampling

CONTEXT = 128
"""Tokens that a decoding request already has, unless a case says otherwise."""
GREEDY = SlotSampling(seed=0)


@dataclass(frozen=True)
class Case:
    """One step: so many requests decode, beside prompts of these lengths."""

    name: str
    num_decodes: int
    prompts: tuple[int, ...] = ()
    context: int = CONTEXT

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(query length, keys) of each row."""
        return [(1, self.context + 1)] * self.num_decodes + [(n, n) for n in self.prompts]


CASES = (
    Case("prefill 10", 0, (10,)),
    Case("prefill 80", 0, (80,)),
    Case("prefill 481", 0, (481,)),
    Case("prefill 2048", 0, (2048,)),
    Case("decode 1", 1),
    Case("decode 8", 8),
    Case("decode 64", 64),
    Case("decode 256", 256),
    Case("decode 1 at 1k", 1, context=1024),
    Case("decode 1 at 8k", 1, context=8 * 1024),
    Case("mixed 1+80+80+80", 1, (80, 80, 80)),
    Case("prefill 80+80+81", 0, (80, 80, 81)),
    Case("mixed 63x1+80", 63, (80,)),
)


@dataclass(frozen=True)
class Measurement:
    """Medians of one case."""

    case: str
    num_tokens: int
    num_rows: int
    graph_tokens: int
    graph_rows: int
    eager_ms: float  # the exact shape, launched operator by operator; launch to completion
    graph_ms: float  # the captured shape, padding included; launch to completion
    least_ms: float  # roofline of the unpadded step
    engine_ms: (
        float  # through the engine: from the requests' arrival (or the last token) to the next tokens on the host
    )
    host_us: float | None  # host work of the step in the engine, waiting excluded; on CPU the launch is the step

    @property
    def ratio(self) -> float:
        return self.eager_ms / self.graph_ms

    @property
    def padding(self) -> float:
        """Share of the graph's tokens that are padding."""
        return 1 - self.num_tokens / self.graph_tokens


def add_parser(commands: Any) -> None:
    """Register ``bench graphs``."""
    parser = commands.add_parser(
        "graphs",
        help="eager against captured, per kind of step",
        description="Time steps launched eagerly and as captured graphs, interleaved, with the roofline beside them.",
    )
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timed runs per case (default: 30)")
    parser.add_argument("--cases", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument(
        "--kernels",
        type=int,
        default=0,
        metavar="N",
        help="also list each case's N longest operators with their kernels, bytes, FLOPs and roofline",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart as PNG (needs matplotlib)")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    if arguments.repeats < 1 or arguments.kernels < 0:
        raise ConfigError(
            f"repeats={arguments.repeats}, kernels={arguments.kernels}: repeats must be 1 or more, kernels no negative number"
        )
    asked = choose(CASES, arguments.cases)
    # Prompts of repeated steps are alike, and shall be computed each time.
    config = EngineConfig.from_settings(**({"enable_prefix_caching": False} | settings_from_flags(arguments)))
    check_one_device(config)
    engine = build_engine(config, progress=sys.stderr.isatty())
    runner = runner_of(engine.executor)
    limits = measure_limits(runner.platform, runner.model.dtype)
    cases = [case for case in asked if _fits(case, engine, arguments.repeats)]
    skipped = [case.name for case in asked if case not in cases]
    measured = [
        measure(engine, case, limits, arguments.repeats)
        for case in tqdm(cases, desc="measuring", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
    ]
    records = engine.executor.graph_records()
    capture_s, pool_mib = sum(r.capture_ms for r in records) / 1e3, engine.executor.graph_counts().bytes / 2**20
    where = machine(engine.executor.specs.device)
    print(
        f"{settings_line(engine, where)}; medians of {arguments.repeats} interleaved runs\n"
        f"limits measured here: copy {limits.copy_bytes_per_s / 1e9:.0f} GB/s, "
        f"matrix product {limits.flops_per_s / 1e12:.2f} TFLOP/s\n"
    )
    print(_table(measured))
    accounts = {case.name: take_apart(engine, case, limits) for case in cases} if arguments.kernels else {}
    for name, step in accounts.items():
        print(f"\n{name}: {step.us:.0f} us")
        print(_account_table(step, limits, arguments.kernels))
    print(f"\n{len(records)} graphs captured in {capture_s:.2f} s, {pool_mib:.0f} MiB")
    if skipped:
        print(
            f"left out, larger than max_num_seqs, max_num_batched_tokens, max_model_len or the KV cache: {', '.join(skipped)}"
        )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "graphs",
                "machine": where,
                "settings": asdict(config),
                "limits": asdict(limits),
                "graphs": {"count": len(records), "capture_s": capture_s, "mib": pool_mib},
                "cases": [
                    asdict(m) | {"ratio": m.ratio, "padding": m.padding, "roofline": m.least_ms / m.graph_ms}
                    for m in measured
                ],
                "accounts": {name: asdict(step) | {"us": step.us} for name, step in accounts.items()},
            },
        )
    if arguments.plot:
        _plot(arguments.plot, measured, f"{engine.source.name} on {where['device']}")
    return 0


def measure(engine: Engine, case: Case, limits: Limits, repeats: int) -> Measurement:
    """Time one case."""
    runner = runner_of(engine.executor)
    with runner.workbench():
        plan = lay_out(runner, case.rows, GREEDY)
        shape = runner.policy.round_up(plan.num_tokens, len(plan.rows))
        exact = StepShape(plan.num_tokens, len(plan.rows))
        eager = EagerGraph(runner.create_program(exact))
        captured = runner.graphs.store.graph(shape) or runner.graphs.store.eager_twin(shape)
        lines = runner.state.lines.clone()
        contenders = [Contender(plan, exact, eager, lines), Contender(plan, shape, captured, lines)]
        eager_ms, graph_ms = time_interleaved(runner, contenders, repeats)
    engine_ms, host_us = _time_engine(engine, case, repeats)
    return Measurement(
        case=case.name,
        num_tokens=plan.num_tokens,
        num_rows=len(plan.rows),
        graph_tokens=shape.num_tokens,
        graph_rows=shape.num_rows,
        eager_ms=eager_ms,
        graph_ms=graph_ms,
        least_ms=step_cost(runner.model, case.rows).least_ms(limits),
        engine_ms=engine_ms,
        host_us=host_us,
    )


def take_apart(engine: Engine, case: Case, limits: Limits) -> StepAccount:
    """Where the time of a case's captured step goes; on CPU, of the same step run eagerly."""
    runner = runner_of(engine.executor)
    with runner.workbench():
        plan = lay_out(runner, case.rows, GREEDY)
        shape = runner.policy.round_up(plan.num_tokens, len(plan.rows))
        twin = runner.graphs.store.eager_twin(shape)
        graph = runner.graphs.store.graph(shape) or twin
        lines = runner.state.lines.clone()

        def prepare() -> None:
            runner.state.lines.copy_(lines)
            runner.load(plan, shape)

        return account(runner, prepare, twin.replay, graph.replay, case.rows, limits)


def lay_out(runner: StepRunner, rows: Sequence[tuple[int, int]], sampling: SlotSampling) -> StepPlan:
    """Put requests into slots and blocks, so that one step of them can be run again and again.

    Args:
        runner: whose workbench is open.
        rows: (query length, KV length) of each; KV entries before the query hold whatever the cache holds.
        sampling: of every row.
    """
    generator = torch.Generator().manual_seed(0)
    next_block = 1
    runner.state.lines.zero_()
    for slot, (query_len, kv_len) in enumerate(rows, start=1):
        num_blocks = runner.layout.groups.size * -(-kv_len // runner.block_size)
        runner.state.admit(
            Admission(
                slot,
                tokens=torch.randint(runner.vocab_size, (kv_len,), generator=generator).tolist(),
                prompt_len=max(1, kv_len // 2),
                blocks=range(next_block, next_block + num_blocks),
                computed=kv_len - query_len,
                generation=1,
                max_length=runner.max_model_len,
                sampling=sampling,
            )
        )
        next_block += num_blocks
    plan_rows = tuple((slot, query_len) for slot, (query_len, _) in enumerate(rows, start=1))
    return StepPlan(plan_rows, (), sum(query_len > 1 for query_len, _ in rows))


class Contender(NamedTuple):
    """One of several steps, or ways to run one, to be timed in turn."""

    plan: StepPlan
    shape: StepShape
    graph: Graph[StepOutput]
    lines: Tensor  # SlotState's lines before the step


def time_interleaved(runner: StepRunner, contenders: Sequence[Contender], repeats: int) -> list[float]:
    """Median ms from launch to completion of each contender, run in turn."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(repeats + 3):
        for (plan, shape, graph, lines), series in zip(contenders, times, strict=True):
            runner.state.lines.copy_(lines)
            runner.load(plan, shape)
            runner.platform.synchronize()
            started = time.perf_counter()
            graph.replay()
            runner.platform.synchronize()
            if turn >= 3:
                series.append(time.perf_counter() - started)
    return [1e3 * median(series) for series in times]


def _time_engine(engine: Engine, case: Case, repeats: int) -> tuple[float, float | None]:
    """Median ms per step and host µs per step of the case, with real requests through scheduler and runner."""
    endless = SamplingParams(temperature=0, max_tokens=_steps_needed(repeats, case.num_decodes), ignore_eos=True)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    vocab = engine.source.config.vocab_size
    decoding = [f"decode-{i}" for i in range(case.num_decodes)]
    decoding_requests = []
    for i, name in enumerate(decoding):
        decoding_requests.append(engine.add_request(name, [(i * 7 + j) % vocab for j in range(case.context)], endless))
    while any(not r.output_token_ids for r in decoding_requests):
        engine.step()
    assert engine.scheduler.num_running == case.num_decodes, (engine.scheduler.num_running, case)
    step_ms, host_us = [], []
    for turn in range(repeats + 3):
        steps, seconds = engine.host_time.steps, engine.host_time.seconds
        started = time.perf_counter()
        names = {f"prompt-{turn}-{i}" for i in range(len(case.prompts))}
        for i, n in enumerate(case.prompts):
            engine.add_request(f"prompt-{turn}-{i}", [(turn + i + j) % vocab for j in range(n)], one)
        waiting = names or set(decoding[:1])
        while waiting:
            waiting -= {u.request.id for u in engine.step()}
        if turn >= 3:
            step_ms.append(1e3 * (time.perf_counter() - started))
            host_us.append(1e6 * (engine.host_time.seconds - seconds) / (engine.host_time.steps - steps or 1))
    for name in decoding:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    return median(step_ms), median(host_us) if engine.executor.specs.run_ahead else None


def _steps_needed(repeats: int, num_decodes: int) -> int:
    """Tokens a decoding request must be able to give while the others start and all runs are timed."""
    return 4 * (repeats + 3) + 2 * num_decodes


def _fits(case: Case, engine: Engine, repeats: int) -> bool:
    scheduler, block_size = engine.config.scheduler, engine.executor.specs.block_size
    longest = case.context + _steps_needed(repeats, case.num_decodes)
    tokens = [longest] * case.num_decodes + [n + 1 for n in case.prompts]
    return (
        sum(-(-n // block_size) for n in tokens) < engine.executor.specs.num_kv_blocks
        and len(case.rows) <= scheduler.max_num_seqs
        and sum(n for n, _ in case.rows) <= engine.executor.specs.max_tokens
        and max(tokens) <= engine.max_model_len
    )


def _table(measured: Sequence[Measurement]) -> str:
    header = ("step", "graph", "padding", "eager ms", "graph ms", "ratio", "roofline", "engine ms", "host us")
    rows = [
        (
            m.case,
            f"{m.graph_tokens}x{m.graph_rows}",
            f"{m.padding:.0%}",
            f"{m.eager_ms:.3f}",
            f"{m.graph_ms:.3f}",
            f"{m.ratio:.2f}x",
            f"{m.least_ms / m.graph_ms:.0%}",
            f"{m.engine_ms:.3f}",
            "-" if m.host_us is None else f"{m.host_us:.0f}",
        )
        for m in measured
    ]
    return table(header, rows)


def _account_table(step: StepAccount, limits: Limits, longest: int) -> str:
    header = (
        "operator",
        "calls",
        "us",
        "us each",
        "share",
        "MB",
        "GFLOP",
        "roofline us",
        "of it",
        "of GB/s",
        "kernels",
    )

    def cells(name: str, calls: str, us: float, rest: Sequence[str]) -> tuple[str, ...]:
        return name, calls, f"{us:.1f}", *rest[:1], f"{us / step.us:.1%}", *rest[1:]

    def bare(name: str, us: float) -> tuple[str, ...]:
        return cells(name, "", us, [""] * 7)

    rows = [
        cells(
            o.operator,
            f"{o.calls}",
            o.us,
            (
                f"{o.us / o.calls:.2f}",
                f"{o.bytes / 1e6:.2f}",
                f"{o.flops / 1e9:.2f}",
                f"{o.least_us:.1f}",
                f"{o.least_us / o.us:.0%}",
                f"{o.bytes / o.us * 1e6 / limits.copy_bytes_per_s:.0%}",
                _kernel_names(o.kernels),
            ),
        )
        for o in step.operators[:longest]
    ]
    others = step.operators[longest:]
    if others:
        rows.append(bare(f"{len(others)} more", sum(o.us for o in others)))
    rows.append(bare("between", step.between_us))
    return table(header, rows)


def _kernel_names(kernels: Sequence[KernelTime]) -> str:
    """With the calls and microseconds of each, if there are several."""
    if len(kernels) == 1:
        return kernels[0].name[:48]
    return ", ".join(f"{k.name[:40]} {k.calls:.0f} x {k.us / k.calls:.2f}" for k in kernels)


def _plot(path: Path, measured: Sequence[Measurement], title: str) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(measured) + 1.6), layout="constrained")
    y = range(len(measured))
    axes.barh([i - 0.2 for i in y], [m.eager_ms for m in measured], 0.38, label="eager", color="#b0b7c3")
    axes.barh([i + 0.2 for i in y], [m.graph_ms for m in measured], 0.38, label="graph", color="#2f6fde")
    axes.plot(
        [m.least_ms for m in measured], [i + 0.2 for i in y], "k|", markersize=13, markeredgewidth=2, label="roofline"
    )
    for i, m in enumerate(measured):
        axes.text(m.graph_ms, i + 0.2, f" {m.ratio:.1f}x", va="center", fontsize=8)
    axes.set_yticks(list(y), [m.case for m in measured])
    axes.invert_yaxis()
    axes.set_xlabel("ms per step, launch to completion")
    axes.set_title(title)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False)
    save_figure(figure, path, dpi=140)
