"""``bench latency``: time to the first token by length of the prompt, and from token to token by number of requests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tqdm import tqdm

from stepgraph.bench.offline import HEADER, Job, Round, StepShares, answered, run_round, settings_line
from stepgraph.bench.peers import Mark, Peers, load_peers, mark_cells
from stepgraph.bench.report import choose, machine, pyplot, save_figure, table, write_json
from stepgraph.bench.roofline import Limits, StepCost, measure_limits, step_cost
from stepgraph.bench.routing import ROUTINGS, Census, add_routing_flag, apply_routing, check_routing, take_census
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.errors import ConfigError, StepgraphError
from stepgraph.executor.local import runner_of
from stepgraph.parallel.shard import Shard

_POINTS = (("measured", "#2f6fde", "o"), ("peer", "#b0b7c3", "o"), ("target", "#2a9d5c", "_"))
"""Of the plot: label, colour, marker."""
_WARMUPS = 3
_ANSWER = 128


@dataclass(frozen=True)
class Case:
    """So many requests of this prompt length start at once; an answer of one token is a time to the first token."""

    name: str
    num_requests: int
    prompt_len: int
    answer_len: int = _ANSWER

    @property
    def is_first_token(self) -> bool:
        return self.answer_len == 1

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(query length, keys) of each row of the step that is timed, in the middle of the answer."""
        if self.is_first_token:
            return [(self.prompt_len, self.prompt_len)]
        return [(1, self.prompt_len + self.answer_len // 2)] * self.num_requests


CASES = (
    *(Case(f"first token after {n}", 1, n, answer_len=1) for n in (10, 80, 481, 2048)),
    *(Case(f"decode {n}", n, 32) for n in (1, 8, 64, 256)),
    *(Case(f"decode 1 at {n // 1024}k", 1, n - _ANSWER // 2) for n in (1024, 8192)),
)


@dataclass(frozen=True)
class Measurement:
    """One case, from the request's arrival or the token before to the token on the host."""

    case: str
    ms: float  # median
    mean_ms: float
    samples: int
    least_ms: float  # roofline, without padding, nor what ranks send each other
    bytes: int  # of a rank
    flops: int  # of a rank
    steps: StepShares
    mark: Mark
    experts: dict[str, float] | None = None
    """What tokens chose, see `Census`; None of a model without experts."""

    @property
    def roofline(self) -> float:
        """Least time over the time taken."""
        return self.least_ms / self.ms


def add_parser(commands: Any) -> None:
    """Register ``bench latency``."""
    parser = commands.add_parser(
        "latency",
        help="time to the first token, and per decode step",
        description="Time first tokens and decode steps of greedy requests through the engine, in this process, with the "
        "roofline beside them and, where they are known, the figures of another engine and our targets.",
    )
    parser.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="timed requests per prompt length (default: 20)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        metavar="N",
        help=f"rounds of {_ANSWER} tokens for each number of requests (default: 2)",
    )
    parser.add_argument("--cases", metavar="TEXT", help="only cases whose name contains this")
    add_routing_flag(parser, several=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline as PNG (needs matplotlib)")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    if min(arguments.repeats, arguments.rounds) < 1:
        raise ConfigError(f"repeats={arguments.repeats}, rounds={arguments.rounds}: both must be 1 or more")
    asked = choose(CASES, arguments.cases)
    # Prompts of repeated rounds are alike, and shall be computed each time.
    config = EngineConfig.from_settings(**({"enable_prefix_caching": False} | settings_from_flags(arguments)))
    check_routing(arguments.routing, config)
    engine = build_engine(config, progress=sys.stderr.isatty())
    runner = runner_of(engine.executor)
    limits = measure_limits(runner.platform, runner.model.dtype)
    cases = [case for case in asked if _fits(case, engine)]
    where = machine(engine.executor.specs.device)
    peers = load_peers(engine.source.name, where["device"], engine.executor.specs.num_ranks)
    measured_by: dict[str, list[Measurement]] = {}
    for routing in (routing for routing in ROUTINGS if routing in arguments.routing):
        apply_routing(routing, engine)
        measured_by[routing] = [
            measure(engine, case, limits, peers, arguments.repeats if case.is_first_token else arguments.rounds)
            for case in tqdm(cases, desc="measuring", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
        ]
    engine.shutdown()
    print(
        f"{settings_line(engine, where)}; medians\n"
        f"limits of one device, measured here: copy {limits.copy_bytes_per_s / 1e9:.0f} GB/s, "
        f"matrix product {limits.flops_per_s / 1e12:.2f} TFLOP/s\n"
    )
    for routing, measured in measured_by.items():
        if len(measured_by) > 1:
            print(f"{routing} routing")
        print(_table(measured))
        for line in (*_experts_lines(measured), *_long_contexts(measured, limits)):
            print(line)
    if peers.source:
        print(peers.source)
    if len(cases) < len(asked):
        print(
            "left out, larger than max_num_seqs, max_model_len or the KV cache: "
            + ", ".join(case.name for case in asked if case not in cases)
        )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "latency",
                "machine": where,
                "num_ranks": engine.executor.specs.num_ranks,
                "settings": asdict(config),
                "limits": asdict(limits),
                "cases": [
                    asdict(m) | {"roofline": m.roofline, "routing": routing}
                    for routing, measured in measured_by.items()
                    for m in measured
                ],
                "peers": peers.source,
            },
        )
    if arguments.plot:
        _plot(arguments.plot, next(iter(measured_by.values())), limits, f"{engine.source.name} on {where['device']}")
    return 0


def measure(engine: Engine, case: Case, limits: Limits, peers: Peers, rounds: int) -> Measurement:
    """Time a case, after rounds that do not count."""
    vocab = engine.source.config.vocab_size

    def jobs(turn: int) -> list[Job]:
        return [
            Job([(turn + 7 * i + j) % vocab for j in range(case.prompt_len)], case.answer_len)
            for i in range(case.num_requests)
        ]

    warmups = _WARMUPS if case.is_first_token else 1
    done = [answered(run_round(engine, jobs(turn))) for turn in range(warmups + rounds)][warmups:]
    samples_s = [seconds for round_ in done for seconds in _samples_s(round_, case)]
    if not samples_s:
        raise StepgraphError(
            f"{case.name}: the first of {case.num_requests} requests had its answer before the last had a token, as a step takes "
            f"in at most {engine.executor.specs.max_tokens} tokens; raise max_num_batched_tokens and the captured sizes, or "
            "leave the case out by --cases"
        )
    steps = [
        step
        for round_ in done
        for step in round_.steps
        if case.is_first_token or step.record.num_tokens == case.num_requests
    ]
    census = take_census(engine, jobs(warmups + rounds), sum(n for n, _ in case.rows), whole_round=case.is_first_token)
    cost = max(_costs(engine, case, census), key=lambda cost: cost.least_ms(limits))
    return Measurement(
        case=case.name,
        ms=1e3 * median(samples_s),
        mean_ms=1e3 * fmean(samples_s),
        samples=len(samples_s),
        least_ms=cost.least_ms(limits),
        bytes=cost.bytes,
        flops=cost.flops,
        steps=StepShares.of(engine, steps),
        mark=peers.mark(case.name, "ms"),
        experts=None if census is None else census.asdict(),
    )


def _costs(engine: Engine, case: Case, census: Census | None) -> list[StepCost]:
    """Of the step that is timed, for each of the ranks that have experts of their own; they differ in nothing else."""
    model, parallel = runner_of(engine.executor).model, engine.config.parallel
    if census is None:
        return [step_cost(model, case.rows, Shard(0, parallel.num_ranks))]
    if parallel.data_parallel_size > 1:  # each attends to its own rows
        rows = case.rows[: -(-len(case.rows) // parallel.data_parallel_size)]
        return [step_cost(model, rows, loads=loads) for loads in census.loads]
    return [step_cost(model, case.rows, Shard(0, parallel.num_ranks), loads) for loads in census.loads]


def _samples_s(round_: Round, case: Case) -> Iterator[float]:
    """The time to the first token, or the gaps between tokens while all requests decode."""
    if case.is_first_token:
        yield round_.outcomes[0].ttft_s
        return
    last_to_start = max(round_.outcomes, key=lambda outcome: outcome.chunk_times_s[0])
    first_end_s = min(outcome.end_s for outcome in round_.outcomes)
    running = [seconds for seconds in last_to_start.chunk_times_s if seconds <= first_end_s]
    yield from (after - before for before, after in pairwise(running))


def _fits(case: Case, engine: Engine) -> bool:
    length, block_size = case.prompt_len + case.answer_len, engine.executor.specs.block_size
    num_requests = -(-case.num_requests // engine.config.parallel.data_parallel_size)  # of a device with its own
    return (
        length <= engine.max_model_len
        and num_requests <= engine.config.scheduler.max_num_seqs
        and num_requests * -(-length // block_size) < engine.executor.specs.num_kv_blocks
    )


def _table(measured: Sequence[Measurement]) -> str:
    header = ("from arrival, or from token to token", "ms", "roofline ms", "of it", "peer", "target", *HEADER)
    rows = [
        (
            m.case,
            f"{m.ms:.3f}",
            f"{m.least_ms:.3f}",
            f"{m.roofline:.0%}",
            *mark_cells(m.mark, ".2f"),
            *m.steps.cells(),
        )
        for m in measured
    ]
    return table(header, rows)


def _experts_lines(measured: Sequence[Measurement]) -> Iterator[str]:
    """What the tokens of each case chose, of models with experts."""
    rows = [
        (
            m.case,
            f"{m.experts['touched']:.1f}",
            f"{m.experts['expected']:.1f}",
            f"{m.experts['imbalance']:.2f}",
            f"{m.experts['rank_imbalance']:.2f}",
        )
        for m in measured
        if m.experts is not None
    ]
    if rows:
        header = (
            "experts, means over the layers",
            "in the step",
            "if uniform",
            "busiest / mean",
            "busiest rank / mean",
        )
        yield "\n" + table(header, rows)


def _long_contexts(measured: Sequence[Measurement], limits: Limits) -> Iterator[str]:
    """What a long context adds to a step, beside what its bytes cost."""
    by_name = {m.case: m for m in measured}
    short = by_name.get("decode 1")
    for name, m in by_name.items():
        if short is not None and name.startswith("decode 1 at"):
            bytes_ms = 1e3 * (m.bytes - short.bytes) / limits.copy_bytes_per_s
            yield f"{name}: {m.ms - short.ms:.3f} ms more than decode 1, for {bytes_ms:.3f} ms of keys and values"


def _plot(path: Path, measured: Sequence[Measurement], limits: Limits, title: str) -> None:
    """FLOPs per second over FLOPs per byte, both axes logarithmic, below what the machine can do. Long contexts are left out:
    their points lie on that of the short one."""
    measured = [m for m in measured if " at " not in m.case]
    if not measured:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    costs = [StepCost(m.bytes, m.flops) for m in measured]
    intensities = [cost.flops / cost.bytes for cost in costs]
    ridge = limits.flops_per_s / limits.copy_bytes_per_s
    ends = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
    peaks = [min(limits.flops_per_s, x * limits.copy_bytes_per_s) / 1e12 for x in ends]
    axes.plot(ends, peaks, "k-", lw=1.2, label="the machine's limits")
    for label, color, marker in _POINTS:
        axes.plot([], [], marker, color=color, markersize=7, label=label)
    for m, cost, x in zip(measured, costs, intensities, strict=True):
        for ms, (_, color, marker) in zip((m.ms, m.mark.peer, m.mark.target), _POINTS, strict=True):
            if ms is not None:
                axes.plot(x, cost.flops / ms / 1e9, marker, color=color, markersize=7)
        place = {"xytext": (-7, -4), "ha": "right"} if m.case.startswith("decode") else {"xytext": (7, -4)}
        axes.annotate(m.case, (x, cost.flops / m.ms / 1e9), textcoords="offset points", fontsize=8, **place)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", title=title)
    axes.set_xlim(ends[0] / 2, ends[-1] * 2)  # names stand beside the points
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right", frameon=False)
    save_figure(figure, path, dpi=140)
    plt.close(figure)
