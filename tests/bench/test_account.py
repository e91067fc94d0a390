"""``bench graphs --kernels``: whose a kernel is, what an operator cannot avoid, and that nothing of a step is lost."""

import json

import pytest

from stepgraph import bench
from stepgraph.bench.account import Call, Kernel, assign, split_bursts
from stepgraph.bench.graphs import Case, take_apart
from stepgraph.bench.roofline import Limits, Operand, StepCost, operator_cost

LIMITS = Limits(copy_bytes_per_s=1e9, flops_per_s=1e10)
CALLS = [
    Call("linear qkv_proj", StepCost(2000, 40), 0),
    Call("norm", StepCost(0, 0), 0),
    Call("linear qkv_proj", StepCost(0, 9000), 0),
]


def operand(kind: str, *shape: int, is_float=True, is_written=False, is_output=False) -> Operand:
    return Operand(kind, shape, 2, is_float, is_written, is_output)


def test_a_kernel_belongs_to_the_call_that_launched_it_in_the_same_turn() -> None:
    replay = [Kernel("gemm", 0, 10), Kernel("norm", 12, 15), Kernel("gemm", 15, 35), Kernel("sum", 35, 36)]
    step = assign(CALLS, {"gemm": [0, 2], "norm": [1], "sum": [2]}, [replay], LIMITS)
    assert [(o.operator, o.calls, o.us) for o in step.operators] == [("linear qkv_proj", 2, 31), ("norm", 1, 3)]
    assert [(k.name, k.calls, k.us) for k in step.operators[0].kernels] == [("gemm", 2, 30), ("sum", 1, 1)]
    assert (step.between_us, step.us, step.unexplained) == (2, 36, 0)


def test_each_call_is_bound_by_its_own_bytes_or_flops() -> None:
    step = assign(CALLS, {"gemm": [0, 2]}, [[Kernel("gemm", 0, 4), Kernel("gemm", 4, 8)]], LIMITS)
    assert step.operators[0].least_us == pytest.approx(2.0 + 0.9)
    assert (step.operators[0].bytes, step.operators[0].flops) == (2000, 9040)


def test_time_in_which_two_kernels_overlap_counts_once() -> None:
    early = [Kernel("gemm", 0, 10), Kernel("norm", 3, 14), Kernel("gemm", 5, 12), Kernel("gemm", 20, 30)]
    step = assign(CALLS, {"gemm": [0, 2], "norm": [1]}, [early], LIMITS)
    assert {o.operator: o.us for o in step.operators} == {
        "linear qkv_proj": 10,
        "norm": 4,
        "kernels of no known operator": 10,
    }
    assert (step.us, step.between_us) == (30, 6)
    assert step.unexplained == pytest.approx(1 / 3)


def test_times_are_means_over_the_replays() -> None:
    replays = [[Kernel("gemm", 0, 10)], [Kernel("gemm", 100, 130)]]
    step = assign(CALLS, {"gemm": [0]}, replays, LIMITS)
    assert (step.us, step.operators[0].us, step.operators[0].kernels[0].calls) == (20, 20, 1)


def test_replays_are_told_apart_by_the_pause_between_them() -> None:
    steps = [[Kernel("a", start, start + 9), Kernel("b", start + 5, start + 1500)] for start in (0.0, 6000.0, 12000.0)]
    assert split_bursts(kernel for step in reversed(steps) for kernel in step) == steps


def test_a_product_reads_its_weight_and_does_two_flops_per_entry_and_token() -> None:
    x, weight = operand("other", 3, 64), operand("weight", 100, 64)
    assert operator_cost("linear", [x, weight], [operand("other", 3, 100)], [], 4) == StepCost(
        2 * (3 * 64 + 6400 + 300), 2 * 3 * 6400
    )
    out = operand("other", 3, 100, is_written=True, is_output=True)
    assert operator_cost("linear_out", [x, weight, out], [], [], 4).bytes == 2 * (3 * 64 + 6400 + 300)


def test_a_residual_that_is_updated_is_read_and_written() -> None:
    operands = [operand("other", 3, 64), operand("other", 3, 64, is_written=True), operand("weight", 64)]
    assert operator_cost("any_other", operands, [operand("other", 3, 64)], [], 4) == StepCost(2 * (4 * 192 + 64), 0)


def test_attention_reads_the_keys_and_values_of_its_rows_and_of_no_others() -> None:
    cache = operand("cache", 1000, 16, 2, 8)
    operands = [operand("other", 5, 4, 8), cache, cache, operand("other", 9, 9, 9, 9, is_written=True)]
    rows = [(1, 30), (4, 10)]
    cost = operator_cost("paged_attention", operands, [operand("other", 5, 32)], rows, 4)
    assert cost.bytes == 2 * (2 * 5 * 32 + 2 * 40 * 16)
    assert cost.flops == 4 * 4 * 8 * (30 + 7 + 8 + 9 + 10)


def test_what_writes_the_cache_writes_its_own_tokens() -> None:
    cache = operand("cache", 1000, 16, 2, 8, is_written=True)
    assert operator_cost("rope_cache", [operand("other", 5, 64), cache, cache], [], [(5, 9)], 4).bytes == 2 * (
        5 * 64 + 2 * 80
    )


def test_a_lookup_reads_the_rows_it_returns() -> None:
    table, ids = operand("weight", 5000, 64), operand("other", 3, is_float=False)
    assert operator_cost("embedding", [table, ids], [operand("other", 3, 64)], [], 4) == StepCost(2 * 2 * 192, 0)


def test_a_step_reads_every_weight_once_and_says_what_it_is_for(create_engine) -> None:
    engine = create_engine()
    step = take_apart(engine, Case("decode", 2, context=20), LIMITS)
    products = {o.operator: o for o in step.operators if o.flops and not o.operator.startswith("paged_attention")}
    for role in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "output head"):
        assert any(role in name for name in products), role
    matrices = [p for p in engine.executor.runner.model.parameters() if p.ndim == 2]
    table = engine.executor.runner.model.embed_tokens.weight
    weights = sum(p.numel() for p in matrices if p is not table)
    activations = sum(o.bytes for o in products.values()) - weights * 4
    assert 0 < activations < weights * 4
    assert sum(o.us for o in step.operators) + step.between_us == pytest.approx(step.us)
    assert step.unexplained == 0
    assert not engine.executor.runner.state.lines.any()


def test_the_account_is_printed_and_written(tiny_model, tmp_path, capsys) -> None:
    file = tmp_path / "graphs.json"
    flags = ["--dtype=float32", "--max-num-seqs=8", "--max-num-batched-tokens=48", "--capture-sizes", "8", "48"]
    command = ["graphs", tiny_model, "--cases=decode 8", "--repeats=1", "--kernels=3", "--capture-rows", "8"]
    assert bench.main([*command, f"--json={file}", *flags]) == 0
    account = json.loads(file.read_text())["accounts"]["decode 8"]
    assert account["us"] == pytest.approx(account["between_us"] + sum(o["us"] for o in account["operators"]))
    out = capsys.readouterr().out
    assert " more " in out
    assert "between" in out
