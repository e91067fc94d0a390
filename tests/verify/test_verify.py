"""The check of captured graphs passes right ones, and catches wrong ones: padding, baked values, reads past the end."""

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY_SETTINGS, drain
from triton_operators import make_rows_of_products_independent, triton_operators

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.ops import AttentionPlan, BuiltStep, attention_plan, build_step, paged_attention
from stepgraph.ops.attention import max_tiles
from stepgraph.step.shape import StepShape, Variant
from stepgraph.verify import trial
from stepgraph.verify.compositions import Composition, Row, random_compositions
from stepgraph.verify.graphs import main_verify, verify_graphs, verify_shape

SHAPE = StepShape(48, 8)
MIXED = Composition((Row(20, 1, 21), Row(0, 17, 17), Row(33, 9, 50), Row(7, 1, 8, active=False), Row(0, 3, 3)), seed=1)


@pytest.fixture
def runner(create_engine):
    return create_engine(capture="lazy").executor.runner


def check(runner, *compositions: Composition) -> list[str]:
    return verify_shape(runner, SHAPE, compositions, alone_rows=8).mismatches


@given(
    tokens=st.integers(1, 300),
    rows=st.integers(1, 64),
    max_len=st.integers(1, 500),
    num_blocks=st.integers(1, 60),
    log_block=st.integers(0, 6),
    num_drafts=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_random_compositions_fit_the_shape_the_model_and_the_cache(
    tokens, rows, max_len, num_blocks, log_block, num_drafts, seed
) -> None:
    shape, block_size = StepShape(tokens, min(rows, tokens), num_drafts=num_drafts), 1 << log_block
    room = {"max_len": max_len, "num_blocks": num_blocks, "block_size": block_size}
    compositions = list(random_compositions(shape, 12, random.Random(seed), **room))
    assert len(compositions) == 12
    for composition in compositions:
        assert 1 <= len(composition.rows) <= shape.num_rows
        assert sum(row.query_len for row in composition.rows) <= tokens
        # Beyond a row's own entries, a draft model may write those of all its proposals but the last.
        beyond = max(0, num_drafts - 1) if len(composition.rows) > 1 else 0
        assert sum(-(-(row.end + beyond) // block_size) for row in composition.rows) <= num_blocks
        assert sum(row.num_samples for row in composition.rows) <= shape.num_samples
        for row in composition.rows:
            assert row.query_len >= 1
            assert row.end <= row.length + row.num_drafts <= max_len
            assert row.num_drafts <= num_drafts
            assert not row.num_drafts or row.computed == row.length - 1


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


def test_where_a_shape_verifies_proposals_most_rows_do_in_uneven_numbers() -> None:
    room = {"max_len": 4000, "num_blocks": 1000, "block_size": 16}
    compositions = list(random_compositions(StepShape(31, 8, num_drafts=3), 100, random.Random(0), **room))
    assert [row.query_len for row in compositions[3].rows] == [4] * 7 + [3]
    verifying = [[row.num_samples - 1 for row in composition.rows if row.num_drafts] for composition in compositions]
    assert len({tuple(n) for n in verifying}) > 40
    assert {0, 1, 2, 3} < {n for row in verifying for n in row}
    rows = [row for composition in compositions for row in composition.rows]
    assert any(row.num_samples - 1 < row.num_drafts for row in rows if row.active)  # its bound is smaller
    assert any(not row.active and row.num_drafts for row in rows)
    assert any(row.active and not row.emits for row in rows)


def test_right_graphs_pass_at_every_shape(create_engine) -> None:
    reports = verify_graphs(create_engine().executor, rounds=12, seed=0)
    assert [str(report.shape) for report in reports] == ["48x8", "8x8"]
    for report in reports:
        assert report.mismatches == []
        assert report.compositions == 12
        assert report.worst_graph_difference == 0
        assert 0 <= report.worst_alone_difference < 1e-4


def test_sequences_longer_than_the_model_or_the_cache_allows_are_never_tried(create_engine) -> None:
    for limits in ({"max_model_len": 20}, {"num_kv_blocks": 5}):
        engine = create_engine(max_num_batched_tokens=96, capture_sizes=(96,), **limits)
        assert [report.mismatches for report in verify_graphs(engine.executor, rounds=20, seed=0)] == [[]]


def test_shapes_that_the_pool_has_no_room_for_are_left_out(create_engine, monkeypatch) -> None:
    executor = create_engine().executor
    store, graph_of = executor.runner.graphs.store, executor.runner.graphs.store.graph
    monkeypatch.setattr(store, "graph", lambda shape: None if shape.num_tokens == 8 else graph_of(shape))
    assert [str(report.shape) for report in verify_graphs(executor, rounds=2, seed=0)] == ["48x8"]


def test_the_check_leaves_an_engine_that_answers_as_before(create_engine) -> None:
    engine = create_engine()

    def answer() -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        request = engine.add_request("r", range(30), params)
        drain(engine)
        return request.output_token_ids

    before = answer()
    verify_graphs(engine.executor, rounds=3, seed=0)
    assert answer() == before


def test_extended_graphs_agree_on_rows_with_any_sampling_features(create_engine) -> None:
    reports = verify_graphs(create_engine().executor, rounds=6, seed=0, variants=tuple(Variant))
    assert [(str(report.shape), report.mismatches) for report in reports] == [
        (f"{size}x8{variant}", []) for variant in ("", " extended", " prompt_logprobs") for size in (48, 8)
    ]


def test_mutant_log_probabilities_of_another_row_are_caught(create_engine, monkeypatch) -> None:
    """The captured graph has the fault; the eager twin, made later, has not."""
    engine = create_engine()
    report = ops.logprobs
    with monkeypatch.context() as patch:
        patch.setattr(ops, "logprobs", lambda logits, target, *rest: report(logits, target.flip(0), *rest))
        for shape in engine.executor.runner.policy.shapes(Variant.EXTENDED):
            engine.executor.runner.graphs.store.graph(shape)
    reports = verify_graphs(engine.executor, rounds=6, seed=0, variants=(Variant.EXTENDED,))
    assert all(any("differ in logprobs" in mismatch for mismatch in report.mismatches) for report in reports)


# Mutants of the step. The check must see each, whether graph and eager run get it wrong alike or differently.


def padding_writes_to(choose_entry):
    """A build whose padding tokens point at a real KV entry rather than at the null block."""

    def mutant(*args) -> BuiltStep:
        tokens, samples = build_step(*args)
        token = torch.arange(tokens.kv_slots.shape[0], device=tokens.kv_slots.device)
        kv_slots = torch.where(token >= tokens.query_start[-1], choose_entry(tokens), tokens.kv_slots)
        return BuiltStep(tokens._replace(kv_slots=kv_slots), samples)

    return mutant


def test_mutant_padding_that_writes_over_a_token_of_the_step_is_caught(runner, monkeypatch) -> None:
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda tokens: tokens.kv_slots[0]))
    rows = Composition((Row(0, 6, 6), Row(9, 1, 10)), seed=2)
    assert any("row 0 differs from the same row alone" in mismatch for mismatch in check(runner, rows))


def test_mutant_padding_that_writes_to_a_cached_token_is_caught(runner, monkeypatch) -> None:
    """The row it destroys emits nothing in this step, so only the cache shows it."""
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda tokens: tokens.kv_slots[0] // 16 * 16))
    rows = Composition((Row(20, 2, 40),), seed=3)
    assert [mismatch.split(" on rows")[0] for mismatch in check(runner, rows)] == [
        "1 cache entries of no token of the step were written"
    ]


def test_mutant_padding_that_writes_to_a_free_block_is_caught(runner, monkeypatch) -> None:
    free_entry = torch.tensor(16 * 200 + 5, dtype=torch.int32, device=runner.platform.device)
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda tokens: free_entry))
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
        tokens, samples = build_step(*args)
        keep = torch.arange(tokens.row_slot.shape[0], device=tokens.row_slot.device) < num_rows[0]
        return BuiltStep(tokens._replace(row_slot=tokens.row_slot * keep), samples)

    monkeypatch.setattr(runner, "load", load_and_count)
    monkeypatch.setattr(ops, "build_step", mutant)
    one_row = Composition((Row(5, 3, 8),), seed=4)
    assert check(runner, one_row) == []
    assert any("graph and eager differ in tokens (row 1" in mismatch for mismatch in check(runner, MIXED))


def test_mutant_attention_that_reads_one_key_too_many_meets_the_poison(runner, monkeypatch) -> None:
    def mutant(q, k_cache, v_cache, block_table, row_slot, query_start, kv_len, plan, *rest):
        items = plan.items.clone()  # a CUDA kernel takes a row's keys from here; on CPU it is empty
        items[..., 3:4] += 1
        plan = plan._replace(items=items)
        return paged_attention(q, k_cache, v_cache, block_table, row_slot, query_start, kv_len + 1, plan, *rest)

    monkeypatch.setattr(sys.modules[ops.rope_attention.__module__], "paged_attention", mutant)
    assert any("hold NaN: something read a poisoned entry" in mismatch for mismatch in check(runner, MIXED))


def test_mutant_sampling_that_takes_another_rows_logits_is_caught(runner, monkeypatch) -> None:
    def mutant(*args) -> BuiltStep:
        tokens, samples = build_step(*args)
        return BuiltStep(tokens, samples._replace(token_index=samples.token_index.flip(0)))

    monkeypatch.setattr(ops, "build_step", mutant)
    assert any("differs from the same row alone" in mismatch for mismatch in check(runner, MIXED))


# Of the list of attention's work, which only the Triton kernels have.

TILES = StepShape(16, 2)
"""Of tiles of 16: 8 tokens of 2 heads."""
UNEVEN = Composition((Row(3, 9, 12), Row(0, 7, 7)), seed=6)  # 3 tiles
ONE_ROW = Composition((Row(5, 16, 21),), seed=7)  # 2
SHORT = Composition((Row(0, 5, 5),), seed=8)  # 1


@pytest.fixture
def check_tiles(create_engine, monkeypatch):
    make_rows_of_products_independent(monkeypatch)
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "capture_sizes": (16,), "capture_rows": (2,)}

    def check(*compositions: Composition) -> list[str]:
        runner = create_engine(capture="lazy", num_kv_blocks=40, **settings).executor.runner
        with triton_operators("attention_plan", "paged_attention"):
            return verify_shape(runner, TILES, compositions, alone_rows=2).mismatches

    return check


def test_right_tiles_pass(check_tiles) -> None:
    assert check_tiles(UNEVEN, ONE_ROW, SHORT) == []


def test_mutant_tile_bound_of_one_long_row_is_caught(check_tiles, monkeypatch) -> None:
    """As a dummy batch guesses it: all tokens in one row, which need a tile less than two rows do."""
    bound = max_tiles(16, 1, group=2, tile=16)
    assert bound == max_tiles(16, 2, group=2, tile=16) - 1

    def mutant(*args) -> AttentionPlan:
        plan = attention_plan(*args)
        plan.header[0].clamp_(max=bound)
        return plan

    monkeypatch.setattr(ops, "attention_plan", mutant)
    assert check_tiles(ONE_ROW, SHORT) == []
    assert any("row 1 differs from the same row alone" in mismatch for mismatch in check_tiles(UNEVEN))


def test_mutant_without_the_early_exit_of_surplus_tiles_is_caught(check_tiles, monkeypatch) -> None:
    """Programs beyond the list's end do what a larger batch left there: another row's work."""
    bound = max_tiles(16, 2, group=2, tile=16)
    left: dict[int, torch.Tensor] = {}  # by the length of the list

    def mutant(*args) -> AttentionPlan:
        plan = attention_plan(*args)
        items = left.setdefault(len(plan.items), torch.zeros_like(plan.items))
        listed = torch.arange(len(items), device=items.device)[:, None] < plan.header[0]
        items.copy_(torch.where(listed, plan.items, items))
        plan.header[0].clamp_(min=min(bound, len(items)))
        return plan._replace(items=items)

    monkeypatch.setattr(ops, "attention_plan", mutant)
    assert check_tiles(UNEVEN) == []
    left.clear()
    assert check_tiles(UNEVEN, SHORT) != []


# With proposals.

SPECULATIVE = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}
PROPOSED = Composition(
    (
        Row(20, 4, 21, num_drafts=3),
        Row(9, 2, 10, num_drafts=1),
        Row(0, 7, 7),
        Row(33, 3, 34, num_drafts=3),
        Row(15, 4, 16, active=False, num_drafts=3),
        Row(31, 4, 32, num_drafts=3),
        Row(40, 5, 60),
        Row(47, 1, 48),
    ),
    seed=5,
)
ROUND = replace(SHAPE, num_drafts=3)


@pytest.fixture
def drafting(create_engine):
    return create_engine(capture="lazy", **SPECULATIVE).executor.runner


def check_round(runner, *compositions: Composition) -> list[str]:
    return verify_shape(runner, ROUND, compositions or (PROPOSED,), alone_rows=8).mismatches


@pytest.mark.parametrize("method", ["mtp", "suffix", "ngram", "hybrid"])
def test_right_graphs_pass_with_proposals_of_every_method(create_engine, method) -> None:
    engine = create_engine(
        capture_sizes=(11, 48),  # no multiple of 1 + K
        speculative_config={"method": method, "num_speculative_tokens": 3},
    )
    levels = (0, 3)
    reports = verify_graphs(engine.executor, rounds=10, seed=0, draft_levels=levels, variants=(Variant.EXTENDED,))
    assert [(str(report.shape), report.mismatches) for report in reports] == [
        (f"{size}x8{drafts} extended", []) for drafts in ("", "+3") for size in (48, 11)
    ]


def test_in_some_rows_proposals_stand_and_in_some_they_fall(drafting) -> None:
    """Whatever the check finds right, it has looked at."""
    twin = drafting.graphs.store.eager_twin(ROUND)
    proposals = trial.mostly_right_proposals(drafting, twin, ROUND, PROPOSED)
    ring = trial.run(drafting, twin, ROUND, PROPOSED, proposals).ring
    accepted = [line[slot_line.OUT_NUM_ACCEPTED] for line in ring]
    verified = [line[slot_line.OUT_NUM_VERIFIED] for line in ring]
    assert verified == [3, 1, 0, 2, 0, 3, 0, 0]
    assert any(0 < a < n for a, n in zip(accepted, verified, strict=True))
    assert any(0 == a < n for a, n in zip(accepted, verified, strict=True))
    assert any(0 < a == n for a, n in zip(accepted, verified, strict=True))
    assert sum(line[slot_line.OUT_NUM_DRAFTS] for line in ring) > 6


def test_mutant_samples_of_uneven_rows_at_wrong_tokens_are_caught(drafting, monkeypatch) -> None:
    """As if every row verified as many proposals as the most that any does."""

    def mutant(*args) -> BuiltStep:
        tokens, samples = build_step(*args)
        sample_S = torch.arange(samples.slot.shape[0], device=samples.slot.device)
        index = tokens.query_start[sample_S // 4] + sample_S % 4
        return BuiltStep(tokens, samples._replace(token_index=index.clamp(max=SHAPE.num_tokens - 1).to(torch.int32)))

    monkeypatch.setattr(ops, "build_step", mutant)
    assert any("differs from the same row alone" in mismatch for mismatch in check_round(drafting))


def test_mutant_commit_that_takes_one_proposal_too_many_in_the_graph_is_caught(drafting, monkeypatch) -> None:
    commit = ops.commit

    def mutant(lines, tokens, counter, ring, row_slot, *rest) -> None:
        commit(lines, tokens, counter, ring, row_slot, *rest)
        ran = (lines[:, slot_line.ACTIVE] > 0) & (lines[:, slot_line.COMPUTED] == lines[:, slot_line.LENGTH] - 1)
        lines[:, slot_line.LENGTH : slot_line.COMPUTED + 1] += ran.unsqueeze(1).to(torch.int32)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "commit", mutant)
        assert drafting.graphs.store.graph(ROUND) is not None
    assert any("graph and eager differ in" in mismatch for mismatch in check_round(drafting))


def test_mutant_draft_model_that_writes_to_a_free_block_is_caught(drafting, monkeypatch) -> None:
    """In graph and eager alike."""
    row_tokens = ops.draft_row_tokens

    def mutant(*args):
        tokens = row_tokens(*args)
        return tokens._replace(kv_slots=torch.where(tokens.row_slot > 0, 16 * 200 + 5, tokens.kv_slots))

    monkeypatch.setattr(ops, "draft_row_tokens", mutant)
    assert any("cache entries of no token of the step were written" in mismatch for mismatch in check_round(drafting))


def test_mutant_draft_model_that_reads_a_key_too_many_meets_the_poison(drafting, monkeypatch) -> None:
    """Also in the last sub-step, of which nothing is left but a token."""
    row_tokens = ops.draft_row_tokens

    def mutant(*args):
        tokens = row_tokens(*args)
        return tokens._replace(kv_len=tokens.kv_len + (tokens.row_slot > 0))

    monkeypatch.setattr(ops, "draft_row_tokens", mutant)
    assert any("something read a poisoned entry" in mismatch for mismatch in check_round(drafting))


def test_mutant_drafts_that_start_from_a_proposal_that_fell_are_caught_in_the_graph(drafting, monkeypatch) -> None:
    inputs = ops.draft_inputs

    def mutant(lines, tokens, step):
        start = inputs(lines, tokens, step)
        return start._replace(token_index=(step.query_start[1:] - 1).clamp(min=0) * (start.slot > 0))

    with monkeypatch.context() as patch:
        patch.setattr(ops, "draft_inputs", mutant)
        assert drafting.graphs.store.graph(ROUND) is not None
    assert any("graph and eager differ in tokens" in mismatch for mismatch in check_round(drafting))


def test_the_command_checks_every_number_of_proposals_the_engine_chooses_from(tiny_model, device, capsys) -> None:
    settings = TINY_SETTINGS | {"capture": "lazy"} | SPECULATIVE
    config = EngineConfig.from_settings(model=tiny_model, device=device, **settings)
    levels = build_engine(config).draft_levels
    assert levels[-1] == 3
    assert len(levels) > 1
    assert main_verify(config, rounds=2, seed=0, progress=False) == 0
    out = capsys.readouterr().out
    for level in levels:
        assert f" 48x8{f'+{level}' if level else ''} " in out
    assert f"{2 * len(levels)} graphs, {4 * len(levels)} compositions, 0 mismatches" in out


def test_the_command_exits_with_0_and_a_table_if_all_is_right(tiny_model, device, capsys) -> None:
    config = EngineConfig.from_settings(model=tiny_model, device=device, **TINY_SETTINGS)
    assert main_verify(config, rounds=3, seed=0, progress=False) == 0
    out = capsys.readouterr().out
    assert out.count(" ok\n") == 2
    assert "2 graphs, 6 compositions, 0 mismatches" in out


def test_the_command_exits_with_1_and_names_the_rows_if_a_graph_is_wrong(
    tiny_model, device, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(ops, "build_step", padding_writes_to(lambda tokens: tokens.kv_slots[0]))
    config = EngineConfig.from_settings(model=tiny_model, device=device, **TINY_SETTINGS)
    written = tmp_path / "verify.json"
    assert main_verify(config, rounds=4, seed=0, progress=False, json_file=written) == 1
    out = capsys.readouterr().out
    assert "MISMATCH" in out
    assert "row 0 differs from the same row alone" in out
    result = json.loads(written.read_text())
    assert [graph["shape"] for graph in result["graphs"]] == ["48x8", "8x8"]
    assert sum(len(graph["mismatches"]) for graph in result["graphs"]) == result["mismatches"] > 0
    assert result["dtype"] == "float32"
