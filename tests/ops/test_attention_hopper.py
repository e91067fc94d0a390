"""The attention kernel of tall tiles on Hopper against the reference in float64. `test_attention.py` has the notation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_batches import Batch, assert_matches, attend, geometry_of, make_batch, needs_hopper, plan_of

from stepgraph.ops.attention import AttentionGeometry
from stepgraph.ops.attention.geometry import HOPPER_TILE, KV_BLOCK
from stepgraph.platforms.tuning import SM_90

pytestmark = needs_hopper

MODEL = {"num_kv_heads": 8, "group": 2, "head_dim": 128, "block_size": 16, "dtype": torch.bfloat16}
MODELS = [
    MODEL,
    {"num_kv_heads": 8, "group": 4, "head_dim": 128, "block_size": 16, "dtype": torch.bfloat16},
    {"num_kv_heads": 2, "group": 5, "head_dim": 128, "block_size": 64, "dtype": torch.float16},
    {"num_kv_heads": 3, "group": 3, "head_dim": 64, "block_size": 8, "dtype": torch.float16},
    {"num_kv_heads": 1, "group": 1, "head_dim": 64, "block_size": 128, "dtype": torch.bfloat16},
]
PADDING = 600
"""Tokens of no row: with so many, steps of few and short rows are given tall tiles too."""
MIXTURES = [
    [(80, 0)],
    [(1, 0), (2, 0), (63, 0), (64, 0), (65, 0), (129, 0)],
    [(1, 300), (130, 77), (0, 5), (200, 3), (63, 64), (1, 0), (1, 1023)],
    [(1, 128)] * 20 + [(80, 0)],
    [(300, 0), (5, 2000)],
]


def tall_geometry(batch: Batch, multiprocessors: int, min_split_keys: int) -> AttentionGeometry:
    geometry = geometry_of(batch, multiprocessors, tall_tile=HOPPER_TILE)
    assert geometry.tile == HOPPER_TILE
    return replace(geometry, min_split_keys=min_split_keys)


def assert_hopper_matches(
    batch: Batch, *, multiprocessors: int = 132, min_split_keys: int = SM_90.min_split_keys_tall
) -> None:
    """Twice over one plan: a layer leaves the counters to the next as it found them."""
    batch = batch.to("cuda")
    geometry = tall_geometry(batch, multiprocessors, min_split_keys)
    plan = plan_of(batch, geometry)
    for _ in range(2):
        assert_matches(attend(batch, plan, geometry), batch)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: "-".join(str(value) for value in m.values()))
def test_mixtures_of_rows_match_the_reference_whatever_else_the_cache_holds(model: dict[str, object]) -> None:
    for seed, rows in enumerate(MIXTURES):
        num_tokens = sum(n for n, _ in rows) + PADDING
        assert_hopper_matches(make_batch(rows, num_tokens=num_tokens, poisoned=True, seed=seed, **model))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_every_remainder_of_a_block_a_box_and_a_half_tile_is_masked(length: int) -> None:
    for computed in (0, 1, 47, 63, 64, 65, 130):
        assert_hopper_matches(make_batch([(length, computed)], num_tokens=600, poisoned=True, seed=computed, **MODEL))


@pytest.mark.parametrize("multiprocessors", [1, 3, 40, 132])
def test_split_rows_are_combined(multiprocessors: int) -> None:
    for seed, rows in enumerate([*MIXTURES, [(300, 3000)], [(1, 4000), (100, 900)]]):
        batch = make_batch(rows, num_tokens=sum(n for n, _ in rows) + PADDING, poisoned=True, seed=seed, **MODEL)
        assert_hopper_matches(batch, multiprocessors=multiprocessors, min_split_keys=KV_BLOCK)


def test_a_ring_that_goes_round_many_times_in_one_program_stays_in_step() -> None:
    """One program does all items of a prompt on a long context, each of other lengths."""
    batch = make_batch([(512, 2048), (70, 900)], num_tokens=600, poisoned=True, **MODEL)
    geometry = replace(tall_geometry(batch, 132, SM_90.min_split_keys_tall), num_programs=1)
    batch = batch.to("cuda")
    assert_matches(attend(batch, plan_of(batch, geometry), geometry), batch)


def test_rows_whose_scores_are_huge_or_alike_stay_exact() -> None:
    """Weights of 0, of 1, and all the same."""
    batch = make_batch([(200, 100)], num_tokens=600, poisoned=True, **MODEL)
    assert_hopper_matches(replace(batch, q=batch.q * 50))
    assert_hopper_matches(replace(batch, q=batch.q * 0))
