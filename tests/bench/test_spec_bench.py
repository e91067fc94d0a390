"""``bench spec``: its formulas, what it takes for identical, and that a run on the tiny model reports what happened."""

import json
import random

import pytest

from stepgraph import bench
from stepgraph.bench import spec_workloads
from stepgraph.bench.roofline import Limits, StepCost
from stepgraph.bench.spec_cost import RoundCosts, RoundTimes, expected_tokens, round_costs, spread, time_round
from stepgraph.bench.spec_forced import Launches, launches_of
from stepgraph.bench.spec_text import TextOptions, count_identical, run_pass
from stepgraph.bench.spec_workloads import WORKLOADS, Workload, load_workload
from stepgraph.errors import ConfigError

FLAGS = [
    *("--dtype=float32", "--max-num-seqs=8", "--max-num-batched-tokens=48"),
    *("--capture-sizes", "8", "48", "--capture-rows", "8"),
]
"""Of engines that capture two graphs for each number of proposals."""


@pytest.mark.parametrize("num_drafts", [1, 3, 5])
@pytest.mark.parametrize("probability", [0.0, 0.7, 1.0])
def test_expected_tokens_are_those_of_simulated_rounds(num_drafts, probability) -> None:
    rng, rounds = random.Random(0), 20_000
    tokens = 0
    for _ in range(rounds):
        tokens += 1
        for _ in range(num_drafts):
            if rng.random() >= probability:
                break
            tokens += 1
    assert tokens / rounds == pytest.approx(expected_tokens(num_drafts, probability), rel=0.02)


def test_the_ideal_counts_the_bytes_of_verification_and_of_each_sub_step() -> None:
    costs = RoundCosts(StepCost(100, 1), StepCost(110, 600), (StepCost(30, 1), StepCost(20, 1)))
    assert costs.speedup_by_bytes(2.4) == pytest.approx(2.4 * 100 / 160)
    # 1 byte and 5 FLOPs take as long: verification is bound by its 600 FLOPs.
    limits = Limits(copy_bytes_per_s=1e6, flops_per_s=5e6)
    assert costs.speedup_by_roofline(2.4, limits) == pytest.approx(2.4 * 100 / (120 + 50))


def test_a_round_must_read_the_module_and_the_head_once_per_sub_step(create_engine) -> None:
    engine = create_engine(speculative_config={"method": "mtp", "num_speculative_tokens": 3})
    costs = round_costs(engine.executor.runner, rows=2, context=20, num_drafts=3)
    hidden, vocab, kv = 32, 257, 2 * 2 * 16
    attention = hidden * 64 + 2 * hidden * 32 + 64 * hidden  # q, k and v, o
    module = 2 * hidden * hidden + attention + 3 * hidden * 64 + 5 * hidden  # projection, MLP, norms
    first = 4 * (module + vocab * hidden + 2 * kv * (23 + 4))
    assert [draft.bytes for draft in costs.drafts] == [
        first,
        4 * (module + vocab * hidden + 2 * kv * (21 + 1)),
        4 * (module + vocab * hidden + 2 * kv * (22 + 1)),
    ]
    # of the model's two layers: three more tokens per row are written, and read
    assert costs.verify.bytes - costs.plain.bytes == 4 * 2 * 2 * kv * (3 + 3)
    assert costs.verify.flops > costs.plain.flops


def test_proposals_are_spread_evenly_over_rows() -> None:
    assert spread(4, 4) == (0, 0, 0, 0)
    assert spread(9, 4) == (2, 1, 1, 1)


def test_one_token_that_differs_in_one_round_makes_an_answer_differ() -> None:
    expected = [[1, 2, 3], [4, 5]]
    assert count_identical([expected, expected], expected) == 2
    assert count_identical([expected, [[1, 2, 3], [4, 6]]], expected) == 1
    assert count_identical([[[1, 2], [4, 5, 6]]], expected) == 0


def test_calls_are_counted_by_what_they_launch() -> None:
    calls = {
        "cudaGraphLaunch": 20,
        "cuLaunchKernelEx": 3,
        "cudaLaunchKernel": 1,
        "cudaMemcpyAsync": 10,
        "cudaMemsetAsync": 2,
        "cudaEventRecord": 20,
        "a_kernel": 900,
    }
    assert launches_of(calls, 20) == Launches(graphs=1.0, kernels=0.2, copies=0.6)


def test_verifying_and_drafting_are_timed_apart_and_leave_nothing_behind(create_engine) -> None:
    engine = create_engine(speculative_config={"method": "mtp", "num_speculative_tokens": 3})
    times = time_round(engine.executor.runner, rows=2, context=20, num_drafts=3, repeats=1)
    assert min(times.plain_ms, times.verify_ms, times.round_ms) > 0
    assert RoundTimes(1.0, 1.5, 2.25).draft_ms == 0.75
    assert not engine.executor.runner.state.lines.any()
    with pytest.raises(ConfigError, match="raise num_kv_blocks"):
        time_round(engine.executor.runner, rows=8, context=600, num_drafts=3, repeats=1)


def test_a_pass_finds_nothing_of_the_answers_of_the_pass_before(create_engine) -> None:
    method = {"method": "suffix", "num_speculative_tokens": 3, "adaptive": False}  # else by what steps took
    engine = create_engine(speculative_config=method)
    options = TextOptions(("none", "suffix"), [Workload("w", "", [])], (2,), 24, 0.0, rounds=1, repeats=1)
    prompts = [[5 * i + j * j % 97 for j in range(20)] for i in range(3)]
    first, second = (run_pass(engine, prompts, 2, options) for _ in range(2))
    assert first.answers == second.answers
    assert (first.verified, first.stood) == (second.verified, second.stood), "the memory of answers was not emptied"
    assert second.num_captures == second.num_eager_steps == 0
    assert sum(second.row_tokens) == second.num_tokens - len(prompts), "all but the tokens that prompts end with"
    assert sum(second.stood) == sum(second.row_tokens) - len(second.row_tokens)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_the_same_at_every_call(name) -> None:
    few, more = load_workload(name, 2), load_workload(name, 4)
    assert len(more.prompts) == 4
    assert few.prompts == more.prompts[:2]
    assert all(len(prompt) > 20 for prompt in more.prompts)


def test_a_report_on_text_says_what_happened(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(spec_workloads.WORKLOADS, "chat", lambda: ("letters", iter(["ab" * 12, "abc" * 9, "a b c d"])))
    file = tmp_path / "spec.json"
    command = ["spec", tiny_model, "--methods=mtp,suffix", "--workloads=chat", "--batch-sizes=1,2", "--output-len=12"]
    options = ["--rounds=1", "--repeats=1", "--num-speculative-tokens=2", "--no-speculative-adaptive", f"--json={file}"]
    assert bench.main([*command, *options, *FLAGS]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["batch_size"], r["method"]) for r in results] == [
        (size, method) for size in (1, 2) for method in ("none", "mtp", "suffix")
    ]
    for r in results:
        assert (r["num_identical"], r["num_answers"], r["num_eager_steps"]) == (3, 3, 0)
        assert 1 <= r["tokens_per_step"] <= 3
        assert all(0 <= share <= 1 for share in r["acceptance"])
        if r["method"] == "none":
            assert (r["speedup"], r["decode_speedup"], r["ideal_speedup"], r["proposing"]) == (1, 1, None, 0)
        else:
            assert r["ideal_speedup"] > 0
            assert r["num_drafts"] == 2
    assert "3/3" in capsys.readouterr().out


def test_a_report_with_decreed_acceptance_counts_the_tokens_of_rounds(tiny_model, tmp_path) -> None:
    file = tmp_path / "spec.json"
    command = ["spec", tiny_model, "--acceptance=1", "--drafts=1,3", "--batch-sizes=1,2", "--context-len=150"]
    assert bench.main([*command, "--rounds=1", "--repeats=1", f"--json={file}", *FLAGS]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["num_drafts"], r["batch_size"]) for r in results] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for r in results:
        assert r["row_tokens"] == r["expected_tokens"] == 1 + r["num_drafts"]
        assert r["num_eager_steps"] == 0
        assert r["speedup"] == pytest.approx(r["expected_tokens"] * r["plain_ms"] / r["round_ms"])
        assert min(r["ideal_speedup"], r["roofline_speedup"], r["graph_speedup"]) > 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--acceptance=1.5"], "is a probability"),
        (["--acceptance=0.7", "--methods=mtp"], "--methods says nothing with --acceptance"),
        (["--drafts=3"], "--drafts says nothing without --acceptance"),
        (["--speculative-method=mtp"], "use --methods"),
        (["--acceptance=0.7", "--drafts=9"], "above 8"),
        (["--workloads=chat", "--batch-sizes=64"], "64 requests do not run at once with max_num_seqs=8"),
        (["--workloads=chat", "--methods=suffix", "--num-speculative-tokens=8"], "8 rows of 8 proposals are 72 tokens"),
        (["--acceptance=0.7", "--batch-sizes=1", "--context-len=500"], "lower the first or raise the second"),
        (["--workloads=chat", "--batch-sizes=1", "--output-len=512"], "leaves room for --output-len 512"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tiny_model, flags, complaint) -> None:
    with pytest.raises(ConfigError, match=complaint):
        bench.main(["spec", tiny_model, *FLAGS, *flags])
