"""The check of captured graphs passes right ones, and catches wrong ones: padding, baked values, reads past the end."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY_SETTINGS, drain

from stepgraph import ops
from stepgraph.config import EngineConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.graph.verify import Composition, Row, main_verify, random_compositions, verify_pool, verify_shape
from stepgraph.layers import attention as attention_layer
from stepgraph.ops import BuiltStep, build_step, paged_attention, slot_line
from stepgraph.step.shape import StepShape, Variant

SHAPE = StepShape(48, 8)
MIXED = Composition((Row(20, 1, 21), Row(0, 17, 17), Row(33, 9, 50), Row(7, 1, 8, active=False), Row(0, 3, 3)), seed=1)


@pytest.fixture
def runner(create_engine):
    return create_engine(capture="lazy").runner


def check(runner, *compositions: Composition) -> list[str]:
    return verify_shape(runner, SHAPE, compositions, alone_rows=8).mismatches


@given(
    tokens=st.integers(1, 300),
    rows=st.integers(1, 64),
    max_len=st.integers(1, 500),
    num_blocks=st.integers(1, 60),
    log_block=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_random_compositions_fit_the_shape_the_model_and_the_cache(
    tokens, rows, max_len, num_blocks, log_block, seed
) -> None:
    shape, block_size = StepShape(tokens, min(rows, tokens)), 1 << log_block
    room = {"max_len": max_len, "num_blocks": num_blocks, "block_size": block_size}
    compositions = list(random_compositions(shape, 12, random.Random(seed), **room))
    assert len(compositions) == 12
    for composition in compositions:
        assert 1 <= len(composition.rows) <= shape.num_rows
        assert sum(row.query_len for row in composition.rows) <= tokens
        assert sum(-(-(row.computed + row.query_len) // block_size) for row in composition.rows) <= num_blocks
        for row in composition.rows:
            assert row.query_len >= 1
            assert row.computed + row.query_len <= row.length <= max_len


def test_random_compositions_begin_with_the_adversarial_families_and_then_vary() -> None:
    room = {"max_len": 4000, "num_blocks": 1000, "block_size": 16}
    compositions = list(random_compositions(StepShape(160, 8), 200, random.Random(0), **room))
    lengths = [[row.query_len for row in composition.rows] for composition in compositions]
    assert lengths[:3] == [[160], [1] * 7 + [153], [1] * 8]
    assert len({tuple(n) for n in lengths}) > 190
    rows = [row for composition in compositions for row in composition.rows]
    assert any(not row.active for row in rows)
    assert any(row.emits and row.computed and row.query_len > 1 for row in rows)
    assert any(row.active and not row.emits for row in rows)


def test_right_graphs_pass_at_every_shape(create_engine) -> None:
    reports = verify_pool(create_engine().runner, rounds=12, seed=0)
    assert [str(report.shape) for report in reports] == ["48x8", "8x8"]
    for report in reports:
        assert report.mismatches == []
        assert report.compositions == 12
        assert report.worst_graph_difference == 0
        assert 0 <= report.worst_alone_difference < 1e-4


def test_sequences_longer_than_the_model_or_the_cache_allows_are_never_tried(create_engine) -> None:
    for limits in ({"max_model_len": 20}, {"num_kv_blocks": 5}):
        engine = create_engine(max_num_batched_tokens=96, capture_sizes=(96,), **limits)
        assert [report.mismatches for report in verify_pool(engine.runner, rounds=20, seed=0)] == [[]]


def test_shapes_over_the_memory_budget_are_left_out(create_engine) -> None:
    runner = create_engine(graph_memory_mib=1, capture="lazy").runner
    sizes = iter([0, 100, 100, 2**21, 2**21, 2**21])
    runner.pool._used_memory_bytes = lambda: next(sizes)
    assert [str(report.shape) for report in verify_pool(runner, rounds=2, seed=0)] == ["48x8"]


def test_the_check_leaves_an_engine_that_answers_as_before(create_engine) -> None:
    engine = create_engine()

    def answer() -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        request = engine.add_request("r", range(30), params)
        drain(engine)
        return request.output_token_ids

    before = answer()
    verify_pool(engine.runner, rounds=3, seed=0)
    assert answer() == before


def test_extended_graphs_agree_on_rows_with_any_sampling_features(create_engine) -> None:
    reports = verify_pool(create_engine().runner, rounds=6, seed=0, variants=tuple(Variant))
    assert [(str(report.shape), report.mismatches) for report in reports] == [
        (f"{size}x8{variant}", []) for variant in ("", " extended", " prompt_logprobs") for size in (48, 8)
    ]


def test_mutant_log_probabilities_of_another_row_are_caught(create_engine, monkeypatch) -> None:
    """The captured graph has the fault; the eager twin, made later, has not."""
    engine = create_engine()
    report = ops.logprobs
    with monkeypatch.context() as patch:
        patch.setattr(ops, "logprobs", lambda logits, target, *rest: report(logits, target.flip(0), *rest))
        for shape in engine.runner.pool.shapes(Variant.EXTENDED):
            engine.runner.pool.graph(shape)
    reports = verify_pool(engine.runner, rounds=6, seed=0, variants=(Variant.EXTENDED,))
    assert all(any("differ in logprobs" in mismatch for mismatch in report.mismatches) for report in reports)


# Mutants of the step. The check must see each, whether graph and eager run get it wrong alike or differently.


def padding_writes_to(choose_entry):
    """A build whose padding tokens point at a real KV entry rather than at the null block."""

    def mutant(*args) -> BuiltStep:
        built = build_step(*args)
        token = torch.arange(built.kv_slots.shape[0], device=built.kv_slots.device)
        return built._replace(kv_slots=torch.where(token >= built.query_start[-1], choose_entry(built), built.kv_slots))

    return mutant


def test_mutant_padding_that_writes_over_a_token_of_the_step_is_caught(runner, monkeypatch) -> None:
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda built: built.kv_slots[0]))
    rows = Composition((Row(0, 6, 6), Row(9, 1, 10)), seed=2)
    assert any("row 0 differs from the same row alone" in mismatch for mismatch in check(runner, rows))


def test_mutant_padding_that_writes_to_a_cached_token_is_caught(runner, monkeypatch) -> None:
    """The row it destroys emits nothing in this step, so only the cache shows it."""
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda built: built.kv_slots[0] // 16 * 16))
    rows = Composition((Row(20, 2, 40),), seed=3)
    assert [mismatch.split(" on rows")[0] for mismatch in check(runner, rows)] == [
        "1 cache entries of no token of the step were written"
    ]


def test_mutant_padding_that_writes_to_a_free_block_is_caught(runner, monkeypatch) -> None:
    free_entry = torch.tensor(16 * 200 + 5, dtype=torch.int32, device=runner.platform.device)
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda built: free_entry))
    assert any("1 cache entries of no token of the step were written" in mismatch for mismatch in check(runner, MIXED))


def test_mutant_that_runs_rows_the_device_has_ended_is_caught(runner, monkeypatch) -> None:
    def mutant(plan, lines, *args) -> BuiltStep:
        always_active = lines.clone()
        always_active[:, slot_line.ACTIVE] = 1
        return build_step(plan, always_active, *args)

    monkeypatch.setattr(ops, "build_step", mutant)
    assert any("cache entries of no token of the step were written" in mismatch for mismatch in check(runner, MIXED))


def test_mutant_that_bakes_in_the_number_of_rows_at_capture_is_caught(runner, monkeypatch) -> None:
    """What a host-computed launch grid does: right for the batch it was captured on, and for no larger one."""
    num_rows = [1]
    load = runner.load

    def load_and_count(plan, shape) -> None:
        num_rows[0] = len(plan.rows)
        load(plan, shape)

    def mutant(*args) -> BuiltStep:
        built = build_step(*args)
        keep = torch.arange(built.row_slot.shape[0], device=built.row_slot.device) < num_rows[0]
        return built._replace(row_slot=built.row_slot * keep)

    monkeypatch.setattr(runner, "load", load_and_count)
    monkeypatch.setattr(ops, "build_step", mutant)
    one_row = Composition((Row(5, 3, 8),), seed=4)
    assert check(runner, one_row) == []
    assert any("graph and eager differ in tokens (row 1" in mismatch for mismatch in check(runner, MIXED))


def test_mutant_attention_that_reads_one_key_too_many_meets_the_poison(runner, monkeypatch) -> None:
    def mutant(q, k_cache, v_cache, block_table, row_slot, query_start, kv_len, *rest):
        return paged_attention(q, k_cache, v_cache, block_table, row_slot, query_start, kv_len + 1, *rest)

    monkeypatch.setattr(attention_layer, "paged_attention", mutant)
    assert any("hold NaN: something read a poisoned entry" in mismatch for mismatch in check(runner, MIXED))


def test_mutant_sampling_that_takes_another_rows_logits_is_caught(runner, monkeypatch) -> None:
    monkeypatch.setattr(
        ops, "build_step", lambda *args: (built := build_step(*args))._replace(logit_index=built.logit_index.flip(0))
    )
    assert any("differs from the same row alone" in mismatch for mismatch in check(runner, MIXED))


def test_the_command_exits_with_0_and_a_table_if_all_is_right(tiny_model, device, capsys) -> None:
    config = EngineConfig.from_settings(model=tiny_model, device=device, **TINY_SETTINGS)
    assert main_verify(config, rounds=3, seed=0, progress=False) == 0
    out = capsys.readouterr().out
    assert out.count(" ok\n") == 2
    assert "2 graphs, 6 compositions, 0 mismatches" in out


def test_the_command_exits_with_1_and_names_the_rows_if_a_graph_is_wrong(
    tiny_model, device, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda built: built.kv_slots[0]))
    config = EngineConfig.from_settings(model=tiny_model, device=device, **TINY_SETTINGS)
    assert main_verify(config, rounds=4, seed=0, progress=False) == 1
    out = capsys.readouterr().out
    assert "MISMATCH" in out
    assert "row 0 differs from the same row alone" in out
