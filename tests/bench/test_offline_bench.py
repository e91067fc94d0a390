"""``bench latency``, ``throughput``, ``sampling``: what they time is what happened, and they compare only like with like."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from stepgraph import bench
from stepgraph.bench.latency import CASES, Case, _samples_s, measure
from stepgraph.bench.offline import Job, Round, StepShares, answered, run_round
from stepgraph.bench.peers import Mark, load_peers
from stepgraph.bench.roofline import Limits, step_cost
from stepgraph.bench.serve_metrics import Outcome
from stepgraph.errors import ConfigError, StepgraphError
from stepgraph.models.decoder import Decoder
from stepgraph.models.loader import create_model
from stepgraph.models.source import resolve, shape_names
from stepgraph.parallel.shard import WHOLE, Shard
from stepgraph.step.log import StepRecord
from stepgraph.step.plan import StepKind
from stepgraph.step.shape import StepShape

FLAGS = [
    *("--dtype=float32", "--max-num-seqs=8", "--max-num-batched-tokens=48"),
    *("--capture-sizes", "8", "48", "--capture-rows", "8"),
]


def test_every_job_gets_its_whole_answer_and_each_step_is_reported(create_engine) -> None:
    engine = create_engine(enable_prefix_caching=False)
    jobs = [Job([1 + i] * (5 + 9 * i), 4 + i) for i in range(4)]
    done = run_round(engine, jobs)
    assert [(o.input_len, len(o.chunk_times_s), o.error) for o in done.outcomes] == [
        (5 + 9 * i, 4 + i, "") for i in range(4)
    ]
    tokens = sum(len(job.prompt) + job.max_tokens - 1 for job in jobs)
    assert sum(step.record.num_tokens for step in done.steps) == tokens
    assert len({times for o in done.outcomes for times in o.chunk_times_s}) <= len(done.steps)
    shares = StepShares.of(engine, done.steps)
    assert (shares.steps, shares.in_graphs) == (len(done.steps), 1)
    assert shares.padding == pytest.approx(1 - tokens / sum(step.record.shape.num_tokens for step in done.steps))


def test_requests_that_never_decode_together_are_told_of(create_engine) -> None:
    engine = create_engine(max_num_seqs=8, max_num_batched_tokens=8, capture_sizes=(8,), capture_rows=(8,))
    with pytest.raises(StepgraphError, match=r"the first of 8 requests had its answer .* at most 8 tokens; raise"):
        measure(engine, Case("decode 8", 8, 16, answer_len=2), Limits(1e9, 1e9), load_peers("tiny", "cpu", 1), 1)


def test_a_request_waits_from_the_time_it_is_due(create_engine) -> None:
    engine = create_engine()
    step, slow = engine.step, []

    def slow_step():
        slow.append(time.sleep(0.05))
        return step()

    engine.step = slow_step
    first, second = run_round(engine, [Job([1, 2], 3), Job([3, 4], 1, due_s=0.06)]).outcomes
    assert second.start_s == 0.06
    assert second.ttft_s >= 0.05
    assert second.chunk_times_s[0] in first.chunk_times_s[1:], "it enters between two steps"


def test_a_request_that_fails_is_told_with_its_error() -> None:
    well, failed, silent = (
        Outcome(0.0, 1.0, 1, 1, times, error=error) for times, error in (([1.0], ""), ([], "x"), ([], ""))
    )
    assert answered(Round([well], 1.0, [])).outcomes == [well]
    with pytest.raises(StepgraphError, match="1 of 2 requests failed, the first with x"):
        answered(Round([well, failed], 1.0, []))
    with pytest.raises(StepgraphError, match="2 of 2 requests failed, the first with no token"):
        answered(Round([silent, failed], 1.0, []))


def test_padding_of_a_round_is_that_of_all_ranks(create_engine) -> None:
    shape = StepShape(8, 8)
    step = SimpleNamespace(record=StepRecord(StepKind.DECODE, shape, 10, 10, None, num_ranks=2), host_seconds=0.0)
    assert StepShares.of(create_engine(), [step, step]).padding == pytest.approx(6 / 16)


def test_nobody_enters_before_it_is_due(create_engine) -> None:
    [late] = run_round(create_engine(), [Job([1], 1, due_s=0.2)]).outcomes
    assert late.chunk_times_s[0] >= 0.2


def test_gaps_count_only_while_all_requests_decode() -> None:
    outcomes = [Outcome(0, 9, 1, 5, [1, 3, 6, 8, 9]), Outcome(0, 12, 1, 4, [3, 6, 8, 12])]
    assert list(_samples_s(Round(outcomes, 12, []), Case("decode 2", 2, 1))) == [3, 2]
    first_token = Case("first token after 1", 1, 1, answer_len=1)
    assert list(_samples_s(Round(outcomes[1:], 12, []), first_token)) == [3]


@pytest.mark.parametrize(
    ("device", "num_ranks"), [("NVIDIA H100 80GB HBM3", 1), ("NVIDIA H200", 1), ("NVIDIA H200", 2)]
)
def test_figures_of_others_are_for_cases_and_shapes_that_exist(device, num_ranks) -> None:
    for shape in ("qwen3-0.6b", "qwen3-8b"):
        assert shape in shape_names()
        peers = load_peers(shape, device, num_ranks)
        assert "vLLM" in peers.source
        names = {name for name, figures in peers.figures.items() if "ms" in figures}
        assert names <= {case.name for case in CASES}
        assert {name for name in peers.figures if " x " not in name} == names


def test_figures_of_others_are_of_the_same_devices_and_as_many() -> None:
    h100, h200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
    assert load_peers("qwen3-0.6b", h100, 1).mark("decode 1", "ms") == Mark(1.68, 0.60)
    assert load_peers("qwen3-0.6b", h100, 1).mark("decode 1", "hours") == Mark()
    assert load_peers("qwen3-8b", h200, 1).mark("decode 1", "ms") == Mark(5.19)
    assert load_peers("qwen3-8b", h200, 2).mark("decode 1", "ms") == Mark(3.73, 2.4)
    for shape, device, num_ranks in (
        ("smollm2", h100, 1),
        ("qwen3-0.6b", "NVIDIA B200", 1),
        ("qwen3-8b", h100, 2),
        ("qwen3-8b", h200, 4),
    ):
        assert load_peers(shape, device, num_ranks).figures == {}


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen3-8b"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_what_ranks_must_do_adds_up_to_what_one_would(shape, size) -> None:
    """All but the norms, of which no rank is spared. The first one's output head is its embedding table, the other's is not."""

    def model(shard: Shard = WHOLE) -> Decoder:
        source = resolve(shape)
        return create_model(
            source,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
            max_model_len=64,
            load_format="dummy",
            shard=shard,
        )

    rows = [(1, 30)] * 7 + [(40, 90)]
    whole = step_cost(model(), rows)
    costs = [step_cost(model(shard), rows, shard) for shard in (Shard(rank, size) for rank in range(size))]
    norms = sum(p.numel() for name, p in model().named_parameters() if "norm" in name)
    assert sum(cost.bytes for cost in costs) == whole.bytes + 2 * (size - 1) * norms
    assert sum(cost.flops for cost in costs) == whole.flops + 2 * 47 * (size - 1) * norms


def test_latency_of_two_ranks_is_measured_as_that_of_one(tiny_model, tmp_path, capsys) -> None:
    file = tmp_path / "latency.json"
    ranks = ["--tensor-parallel-size=2", "--device=cpu", "--cases=decode 1", "--repeats=1", "--rounds=1"]
    assert bench.main(["latency", tiny_model, f"--json={file}", *FLAGS, *ranks]) == 0
    result = json.loads(file.read_text())
    assert result["num_ranks"] == 2
    [case] = result["cases"]
    assert case["steps"]["in_graphs"] == 1
    assert ", 2 x " in capsys.readouterr().out


def test_latency_is_printed_written_and_drawn(tiny_model, tmp_path, capsys) -> None:
    file, plot = tmp_path / "latency.json", tmp_path / "latency.png"
    command = ["latency", tiny_model, "--repeats=2", "--rounds=1", f"--json={file}", f"--plot={plot}", *FLAGS]
    assert bench.main(command) == 0
    cases = {case["case"]: case for case in json.loads(file.read_text())["cases"]}
    assert set(cases) == {*(f"first token after {n}" for n in (10, 80, 481)), "decode 1", "decode 8"}
    assert cases["first token after 80"]["samples"] == 2
    assert cases["first token after 80"]["steps"]["steps"] == 2 * 2, "a step holds 48 tokens"
    assert cases["decode 1"]["samples"] == 127
    for case in cases.values():
        assert case["ms"] > 0
        assert case["steps"]["in_graphs"] == 1
        assert case["roofline"] == pytest.approx(case["least_ms"] / case["ms"])
        assert case["mark"] == {"peer": None, "target": None}
    assert "left out" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rate", [[], ["--request-rate=200"]])
def test_throughput_counts_the_tokens_of_all_requests(tiny_model, tmp_path, capsys, rate) -> None:
    file = tmp_path / "throughput.json"
    lengths = ["--random-input-range", "4", "30", "--random-output-len=6"]
    command = ["throughput", tiny_model, "--num-prompts=9", "--num-warmups=2", "--repeats=2", *lengths, *rate, *FLAGS]
    assert bench.main([*command, f"--json={file}"]) == 0
    result = json.loads(file.read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (9, 0, 54)
    assert 9 * 4 <= result["total_input_tokens"] <= 9 * 30
    tokens = result["total_input_tokens"] + result["total_output_tokens"]
    assert result["total_token_throughput"] == pytest.approx(tokens / result["duration"])
    assert result["duration"] == min(result["rounds_s"]), "the median of two is the faster one"
    assert result["workload"] == f"9 x (4-30 in + 6 out){' at 200/s' if rate else ''}"
    assert result["steps"]["in_graphs"] == 1
    if rate:
        assert result["duration"] >= 9 / 200
    assert "p99" in capsys.readouterr().out


def test_figures_of_a_known_workload_stand_beside_ours(tiny_model, monkeypatch, capsys) -> None:
    from stepgraph.bench import throughput
    from stepgraph.bench.peers import Peers

    known = {"3 x (4 in + 2 out)": {"total_token_throughput": Mark(107_000, 200_000)}}
    monkeypatch.setattr(throughput, "load_peers", lambda shape, device, num_ranks: Peers("peer: somebody", known))
    flags = ["--num-prompts=3", "--input-len=4", "--output-len=2", "--repeats=1", *FLAGS]
    assert bench.main(["throughput", tiny_model, *flags]) == 0
    out = capsys.readouterr().out
    for text in ("107000.0", "200000.0", "peer: somebody"):
        assert text in out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["latency", "--repeats=0"], "must be 1 or more"),
        (["throughput", "--num-prompts=0"], "at least one prompt"),
        (["throughput", "--request-rate=0"], "a rate above 0"),
        (["throughput", "--random-output-len=0"], "the smallest value is 1"),
        (["throughput", "--input-len=4", "--random-input-range", "1", "4"], "contradict"),
        (["throughput", "--output-len=512"], "do not fit into max_model_len"),
        (["sampling", "--repeats=0"], "must be 1 or more"),
        (["sampling", "--max-model-len=129"], "max_model_len=129 is too small"),
        (["sampling", "--num-kv-blocks=9"], "num_kv_blocks=9 hold no request of 129 tokens"),
        (["tokens", "--prompts=0"], "prompts=0, tokens=64: both must be 1 or more"),
        (["front", "--streams", "1", "0"], "all must be 1 or more"),
        (["front", "--streams", "1", "--repeats=0"], "all must be 1 or more"),
        (["latency", "--cases=decod 1"], "in no case's name; there are first token after 10"),
        (["graphs", "--cases=decod 1"], "in no case's name; there are prefill 10"),
    ],
)
def test_flags_that_measure_nothing_are_refused(tiny_model, flags, complaint) -> None:
    command, *rest = flags
    with pytest.raises(ConfigError, match=complaint):
        bench.main([command, tiny_model, *FLAGS, *rest])
