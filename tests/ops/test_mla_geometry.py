"""The geometry of latent attention, whose group are all heads: more pairs of a token than a tile has rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_attention_geometry import most_tiles_over_all_splits

from stepgraph.ops.attention.geometry import max_tiles
from stepgraph.ops.mla_attention import mla_geometry
from stepgraph.ops.mla_attention.geometry import programs_of
from stepgraph.platforms.tuning import DEFAULT, SM_90, KernelTuning


@pytest.mark.parametrize("heads", [16, 20, 40, 128])
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_the_bound_of_tiles_equals_the_maximum_over_all_splits(heads: int, tile: int) -> None:
    for num_tokens in (*range(1, 13), 29, 40):
        for num_rows in range(1, 6):
            found = max_tiles(num_tokens, num_rows, heads, tile)
            assert found == most_tiles_over_all_splits(num_tokens, num_rows, heads, tile)


@given(
    num_tokens=st.integers(1, 4096),
    num_rows=st.integers(1, 256),
    heads=st.sampled_from([1, 5, 16, 20, 40, 128]),
    multiprocessors=st.integers(1, 160),
    deterministic=st.booleans(),
    tuning=st.sampled_from([DEFAULT, SM_90]),
)
def test_what_is_allocated_holds_all_that_a_plan_may_list(
    num_tokens: int, num_rows: int, heads: int, multiprocessors: int, deterministic: bool, tuning: KernelTuning
) -> None:
    geometry = mla_geometry(num_tokens, num_rows, heads, multiprocessors, deterministic=deterministic, tuning=tuning)
    splits = 0 if deterministic else geometry.split_target
    assert geometry.max_items == max_tiles(num_tokens, num_rows, heads, geometry.tile) + splits
    assert geometry.max_partials == 2 * splits
    assert 1 <= geometry.num_programs <= multiprocessors * programs_of(geometry.tile, tuning)
    assert (geometry.tile == 16) >= (deterministic or tuning is DEFAULT)


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "heads", "tile"),
    [
        (128, 128, 16, 16),
        (256, 128, 16, 32),
        (128, 128, 20, 32),
        (512, 128, 16, 64),
        (1, 1, 40, 64),
        (640, 129, 16, 64),
    ],
)
def test_tiles_are_as_tall_as_an_average_row_needs(num_tokens: int, num_rows: int, heads: int, tile: int) -> None:
    assert mla_geometry(num_tokens, num_rows, heads, 132, tuning=SM_90).tile == tile
