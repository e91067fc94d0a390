"""``bench sizes``: step times between measured ones, and what a list of sizes comes to."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from stepgraph import bench
from stepgraph.bench.simulation import Scenario, simulate
from stepgraph.bench.sizes import CANDIDATES, MeasuredStepTime, geometric, interpolate
from stepgraph.bench.workloads import load_lengths, make_trace
from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.errors import ConfigError
from stepgraph.step.shape_policy import ShapePolicy

GRAPHS = Path(__file__).parents[2] / "benchmarks" / "results" / "h100-graphs-qwen3-0.6b.json"


def test_measured_steps_take_what_was_measured_and_others_lie_between() -> None:
    cases = json.loads(GRAPHS.read_text())["cases"]
    times = MeasuredStepTime.of(cases)
    for case in cases:
        if case["case"].startswith(("prefill", "decode")) and "+" not in case["case"]:
            seconds = times.seconds(case["graph_tokens"], case["graph_rows"])
            assert 1e3 * seconds == pytest.approx(case["graph_ms"], rel=0.07), case["case"]
    by_tokens = [times.seconds(n, 1) for n in range(1, 3000, 7)]
    assert all(a <= b * 1.07 for a, b in pairwise(by_tokens))
    assert times.seconds(64, 64) > times.seconds(64, 32) > times.seconds(64, 8) == times.seconds(64, 1)


def test_beyond_the_last_point_the_line_goes_on_and_before_the_first_it_is_level() -> None:
    points = [(2.0, 10.0), (4.0, 20.0), (8.0, 20.0), (9.0, 21.0)]
    assert [interpolate(points, x) for x in (1, 2, 3, 4, 6, 9, 11)] == [10, 10, 15, 20, 20, 21, 23]


def test_geometric_sizes_leave_no_larger_gap_than_they_promise() -> None:
    assert geometric(1, 100) == [1, 2, 4, 8, 16, 32, 64, 100]
    for per_doubling in (1, 2, 4, 8):
        sizes = geometric(per_doubling, 2048)
        assert sizes[-1] == 2048
        assert all(b <= max(a + 1, a * 2 ** (1 / per_doubling) + 1) for a, b in pairwise(sizes))


def test_every_candidate_holds_every_step() -> None:
    config = SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=300)
    for candidate in CANDIDATES:
        sizes = candidate.sizes(300)
        graph = GraphConfig(
            capture_sizes=None if sizes is None else tuple(sizes),
            capture_rows=None if candidate.rows is None else tuple(candidate.rows),
        )
        ladder = ShapePolicy.of(graph, config)
        assert ladder.token_sizes[-1] == 300
        for rows in range(1, 6):
            assert ladder.round_up(300, rows).num_rows >= rows


def test_more_sizes_pad_less_and_cost_more_graphs(tmp_path, capsys) -> None:
    file = tmp_path / "sizes.json"
    command = ["sizes", f"--graphs={GRAPHS}", "--lengths=short", "--loads", "0.3", "--requests=60", f"--json={file}"]
    assert bench.main(command) == 0
    found = {c["candidate"]: c for c in json.loads(file.read_text())["candidates"]}
    finer = [found[name] for name in ("one per 4x", "powers of two", "4 per doubling", "8 per doubling")]
    for few, many in pairwise(finer):
        assert few["graphs"] < many["graphs"]
        assert few["padding"][0] > many["padding"][0]
    assert found["default"]["capture_s"] / found["default"]["graphs"] == pytest.approx(4.175 / 82, rel=1e-3)
    assert "default, rows only the most" in capsys.readouterr().out


def test_padding_of_rows_is_counted() -> None:
    lengths = load_lengths("short")
    trace = make_trace(lengths, num_requests=40, requests_per_s=50.0)
    most = Scenario(graph=GraphConfig(capture_rows=(1024,)))
    plain, padded = simulate(trace, Scenario()), simulate(trace, most)
    assert plain.num_rows <= plain.captured_rows < padded.captured_rows


@pytest.mark.parametrize("content", ["{", "{}", '{"cases": [], "graphs": {}, "machine": {"device": ""}}'])
def test_a_file_without_measured_steps_is_refused(tmp_path, content) -> None:
    file = tmp_path / "graphs.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="bench graphs"):
        bench.main(["sizes", f"--graphs={file}"])
