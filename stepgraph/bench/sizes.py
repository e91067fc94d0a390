"""``bench sizes``: which sizes to capture. What padding costs with more or fewer of them, against what capturing them costs.

The scheduler is simulated on traces at several loads, with each list of sizes in turn. Step times are interpolated between
those that `bench graphs` measured; seconds and memory of the graphs are its means times their number.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stepgraph.bench.report import table, write_json
from stepgraph.bench.simulation import Scenario, StepTime, simulate
from stepgraph.bench.workloads import LENGTHS, Lengths, load_lengths, make_trace
from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.errors import ConfigError
from stepgraph.step.shape_policy import ShapePolicy

_FEW_ROWS = 8
"""Steps of no more rows tell what tokens cost."""


@dataclass(frozen=True)
class MeasuredStepTime(StepTime):
    """Between measured steps: what a step of these tokens in few rows takes, and what its rows add to that.

    Both are linear between their points; beyond the last, as between the last two.
    """

    few_rows_ms: Sequence[tuple[float, float]]
    """(tokens, ms), ascending."""
    rows_add_ms: Sequence[tuple[float, float]]
    """(rows, ms beyond those of as many tokens in few rows), ascending, from (`_FEW_ROWS`, 0)."""

    @classmethod
    def of(cls, cases: Sequence[dict[str, Any]]) -> MeasuredStepTime:
        """From the cases of a `bench graphs` result, those at long contexts left out.

        Raises:
            ConfigError: they are too few.
        """
        cases = [case for case in cases if " at " not in case["case"]]
        few = {c["graph_tokens"]: c["graph_ms"] for c in cases if c["graph_rows"] <= _FEW_ROWS}
        decodes = [c for c in cases if c["case"].startswith("decode") and c["graph_rows"] > _FEW_ROWS]
        if len(few) < 2 or not decodes:
            raise ConfigError(
                "step times cannot be interpolated from these steps; make the file with bench graphs, all cases, "
                "--max-num-seqs 256"
            )
        few_rows_ms = sorted(few.items())
        added = {
            c["graph_rows"]: max(0.0, c["graph_ms"] - interpolate(few_rows_ms, c["graph_tokens"])) for c in decodes
        }
        return cls(few_rows_ms, [(_FEW_ROWS, 0.0), *sorted(added.items())])

    def seconds(self, num_tokens: int, num_rows: int) -> float:
        added = interpolate(self.rows_add_ms, num_rows) if num_rows > _FEW_ROWS else 0.0
        return (interpolate(self.few_rows_ms, num_tokens) + added) / 1e3


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between points ascending in x; beyond the last as between the last two, before the first as there."""
    i = min(max(1, bisect_right(points, x, key=lambda point: point[0])), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (max(x, points[0][0]) - x0) / (x1 - x0)


@dataclass(frozen=True)
class Candidate:
    """A list of sizes that might be captured."""

    name: str
    sizes: Callable[[int], Sequence[int] | None]
    """Token counts up to the largest; None: the default's."""
    rows: Sequence[int] | None = None
    """Row counts; None: the default's."""


def geometric(per_doubling: int, most: int) -> list[int]:
    """Sizes up to `most`, so many per doubling as far as whole numbers allow; `most` last."""
    sizes = {min(most, round(2 ** (i / per_doubling))) for i in range(per_doubling * most.bit_length() + 1)}
    return sorted(sizes)


CANDIDATES = (
    Candidate("default", lambda most: None),
    Candidate("one per 4x", lambda most: [4**i for i in range(12) if 4**i < most] + [most]),
    Candidate("powers of two", lambda most: geometric(1, most)),
    Candidate("2 per doubling", lambda most: geometric(2, most)),
    Candidate("4 per doubling", lambda most: geometric(4, most)),
    Candidate("8 per doubling", lambda most: geometric(8, most)),
    Candidate("every size to 64, then default", lambda most: [*range(1, min(65, most)), *geometric(4, most)]),
    Candidate("default, rows only the most", lambda most: None, rows=(1024,)),
    Candidate("default, rows 1 2 4 ...", lambda most: None, rows=[2**i for i in range(11)]),
)


@dataclass(frozen=True)
class Outcome:
    """What capturing a candidate's sizes comes to, at several loads."""

    candidate: str
    graphs: int
    capture_s: float
    mib: float
    padding: Sequence[float]
    """Share of the computed tokens, at each load."""
    row_padding: Sequence[float]
    """Share of the rows."""
    lost: Sequence[float]
    """Share of the device's time that padding takes."""
    first_token_ms: Sequence[float]
    """Median."""


def add_parser(commands: Any) -> None:
    """Register ``bench sizes``."""
    defaults = SchedulerConfig()
    parser = commands.add_parser(
        "sizes",
        help="which sizes to capture: padding against the cost of capture",
        description="Simulate the scheduler with several lists of captured sizes. No model runs.",
    )
    parser.add_argument(
        "--graphs", type=Path, required=True, metavar="FILE", help="JSON of `bench graphs`, which says what steps cost"
    )
    parser.add_argument("--lengths", choices=LENGTHS, default="random", help="of prompts and answers (default: random)")
    parser.add_argument(
        "--loads",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.6, 0.9],
        metavar="N",
        help="arrival rates, 1 being about what the device can serve (default: %(default)s)",
    )
    for name, default, text in (
        ("max-num-seqs", defaults.max_num_seqs, "requests that run at the same time"),
        ("max-num-batched-tokens", defaults.max_num_batched_tokens, "tokens of one step"),
        ("requests", 400, "requests of each trace"),
        ("seed", 0, "of all traces"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code.

    Raises:
        ConfigError: numbers out of range, or a file that is no result of ``bench graphs``.
    """
    if arguments.requests < 1 or min(arguments.loads) <= 0:
        raise ConfigError(
            f"requests={arguments.requests}, loads={arguments.loads}: at least one request, and loads above 0"
        )
    try:
        result = json.loads(arguments.graphs.read_text())
        cases, pool, where = result["cases"], result["graphs"], result["machine"]["device"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{arguments.graphs} is no JSON of bench graphs: {error!r}; make one with --json") from error
    step_time = MeasuredStepTime.of(cases)
    config = SchedulerConfig(
        max_num_seqs=arguments.max_num_seqs, max_num_batched_tokens=arguments.max_num_batched_tokens
    )
    lengths = load_lengths(arguments.lengths)
    outcomes = [
        try_candidate(candidate, config, step_time, lengths, pool, arguments)
        for candidate in tqdm(CANDIDATES, leave=False, disable=not sys.stderr.isatty())
    ]
    print(
        f"{arguments.lengths} lengths, {config.max_num_seqs} requests at a time, {config.max_num_batched_tokens} tokens a "
        f"step; times from {arguments.graphs} ({where}), {1e3 * pool['capture_s'] / pool['count']:.0f} ms and "
        f"{pool['mib'] / pool['count']:.1f} MiB per graph\n"
    )
    print(_table(outcomes, arguments.loads))
    print(
        "\nAt each load: padding among the tokens and the rows, the time it takes, and the median time to the first token."
    )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "sizes",
                "step_times": {"file": str(arguments.graphs), "device": where, **asdict(step_time)},
                "scheduler": asdict(config),
                "lengths": arguments.lengths,
                "loads": arguments.loads,
                "requests": arguments.requests,
                "seed": arguments.seed,
                "candidates": [asdict(outcome) for outcome in outcomes],
            },
        )
    return 0


def try_candidate(
    candidate: Candidate,
    config: SchedulerConfig,
    step_time: StepTime,
    lengths: Lengths,
    pool: dict[str, float],
    arguments: argparse.Namespace,
) -> Outcome:
    """Simulate the traces of all loads with a candidate's sizes."""
    sizes = candidate.sizes(config.max_num_batched_tokens)
    graph = GraphConfig(
        capture_sizes=None if sizes is None else tuple(sizes),
        capture_rows=None if candidate.rows is None else tuple(candidate.rows),
    )
    scenario = Scenario(config, graph, step_time=step_time)
    num_graphs = len(ShapePolicy.of(graph, config).shapes())
    runs = [
        simulate(
            make_trace(
                lengths,
                num_requests=arguments.requests,
                requests_per_s=load * scenario.requests_per_s(lengths),
                seed=arguments.seed,
            ),
            scenario,
        )
        for load in arguments.loads
    ]
    return Outcome(
        candidate=candidate.name,
        graphs=num_graphs,
        capture_s=num_graphs * pool["capture_s"] / pool["count"],
        mib=num_graphs * pool["mib"] / pool["count"],
        padding=[run.padding for run in runs],
        row_padding=[1 - run.num_rows / max(1, run.captured_rows) for run in runs],
        lost=[run.padding_time for run in runs],
        first_token_ms=[1e3 * run.percentile("first_token_s", 50) for run in runs],
    )


def _table(outcomes: Sequence[Outcome], loads: Sequence[float]) -> str:
    header = ["captured sizes", "graphs", "capture s", "MiB"]
    header += [f"{what} {load:g}" for load in loads for what in ("tokens", "rows", "time", "first ms")]
    rows = []
    for o in outcomes:
        cells = [o.candidate, f"{o.graphs}", f"{o.capture_s:.1f}", f"{o.mib:.0f}"]
        for padding, row_padding, lost, first_ms in zip(
            o.padding, o.row_padding, o.lost, o.first_token_ms, strict=True
        ):
            cells += [f"{padding:.1%}", f"{row_padding:.1%}", f"{lost:.1%}", f"{first_ms:.1f}"]
        rows.append(cells)
    return table(header, rows)
