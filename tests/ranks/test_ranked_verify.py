"""`graphs verify` on several ranks: right graphs pass, and ranks that come to other values are named."""

import json

import pytest
from ranked_engines import add_by_another_rule
from tiny import TINY_SETTINGS, save_tiny_mixture

from stepgraph.config import EngineConfig
from stepgraph.step.shape import Variant
from stepgraph.verify.graphs import main_verify, verify_graphs

PROPOSING = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}


@pytest.fixture
def create_two(create_ranked, tiny_model):
    """Makes executors of two ranks of the tiny model."""

    def create(**settings):
        settings = TINY_SETTINGS | {"model": tiny_model, "device": "cpu", "tensor_parallel_size": 2} | settings
        return create_ranked(EngineConfig.from_settings(**settings)).executor

    return create


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "bfloat16", "deterministic": True},
        {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
        {"quantization": "fp8"},
        PROPOSING,
    ],
    ids=["float32", "deterministic", "fp8 cache", "fp8 weights", "mtp"],
)
def test_right_graphs_of_two_ranks_pass_at_every_shape(create_two, settings) -> None:
    executor = create_two(**settings)
    levels = executor.specs.draft_levels
    reports = verify_graphs(executor, rounds=4, seed=0, variants=(Variant.PLAIN, Variant.EXTENDED), draft_levels=levels)
    assert len(reports) == 2 * 2 * len(levels)
    for report in reports:
        assert report.mismatches == []
        assert report.compositions == len(report.digests) == 4
        assert report.worst_graph_difference == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_expert_parallel": True},
        {"enable_expert_parallel": True, "dtype": "bfloat16", "deterministic": True},
        {"enable_expert_parallel": True, "quantization": "fp8"},
    ],
    ids=["parts of experts", "whole experts", "deterministic", "fp8 weights"],
)
def test_right_graphs_of_ranks_with_experts_pass_at_every_shape(create_two, tmp_path, settings) -> None:
    executor = create_two(model=save_tiny_mixture(tmp_path), **settings)
    for report in verify_graphs(executor, rounds=4, seed=0):
        assert report.mismatches == []
        assert report.worst_graph_difference == 0


def test_the_command_says_how_many_ranks_there_are(tiny_model, capsys, tmp_path) -> None:
    settings = TINY_SETTINGS | {"model": tiny_model, "device": "cpu", "tensor_parallel_size": 2}
    written = tmp_path / "verify.json"
    config = EngineConfig.from_settings(**settings)
    assert main_verify(config, rounds=2, seed=0, progress=False, json_file=written) == 0
    out = capsys.readouterr().out
    assert "cpu, 2 ranks; 2 compositions a shape" in out
    assert "2 graphs, 4 compositions, 0 mismatches" in out
    result = json.loads(written.read_text())
    assert (result["num_ranks"], result["mismatches"]) == (2, 0)


def _spoil_captures(executor) -> None:
    """What rank 1 captures from now on scales the residual stream; what it runs without a graph is right."""
    group = executor.group
    right = group.add_sum

    def wrong(part_TE, residual_TE, **options):
        result = right(part_TE, residual_TE, **options)
        if group._depth and group.shard.rank == 1:
            residual_TE.mul_(1.001)
        return result

    group.add_sum = wrong


def _spoil_logits(executor) -> None:
    """Rank 1 reads fewer bits of the logits than there are, in graphs and without."""
    group = executor.group
    right = group.gather

    def wrong(part_RW, out_RV):
        right(part_RW, out_RV)
        return out_RV.copy_(out_RV.bfloat16()) if group.shard.rank == 1 else out_RV

    group.gather = wrong


def test_mutant_a_rank_whose_graphs_are_wrong_is_found(create_two) -> None:
    executor = create_two()
    executor.on_all(_spoil_captures)
    for report in verify_graphs(executor, rounds=2, seed=0):
        assert any(text.startswith("rank 1: graph and eager differ in") for text in report.mismatches)


@pytest.mark.parametrize("spoil", [_spoil_logits, add_by_another_rule])
def test_mutant_a_rank_that_is_wrong_in_graphs_and_without_is_found(create_two, spoil) -> None:
    """It alone would find nothing amiss."""
    executor = create_two()
    executor.on_all(spoil)
    for report in verify_graphs(executor, rounds=2, seed=0, alone_rows=0, variants=tuple(Variant)):
        assert report.mismatches
        assert all(text.startswith("rank 1 and rank 0 differ") for text in report.mismatches)
