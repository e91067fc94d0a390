"""`max_tiles` bounds every batch exactly, and the geometry is built on it."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.ops.attention.geometry import attention_geometry, max_tiles


def most_tiles_over_all_splits(num_tokens: int, num_rows: int, group: int, tile: int) -> int:
    """The definition: try every length of the first row, and every way to split what is left."""

    @cache
    def best(tokens: int, rows: int) -> int:
        if tokens == 0:
            return 0
        if rows == 0:
            return -1
        rest = [(n, best(tokens - n, rows - 1)) for n in range(1, tokens + 1)]
        return max((-(-n * group // tile) + tiles for n, tiles in rest if tiles >= 0), default=-1)

    return best(num_tokens, num_rows)


@given(
    num_tokens=st.integers(1, 100),
    num_rows=st.integers(1, 6),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    tile=st.sampled_from([4, 16, 64]),
)
def test_max_tiles_equals_the_maximum_over_all_splits(num_tokens: int, num_rows: int, group: int, tile: int) -> None:
    assert max_tiles(num_tokens, num_rows, group, tile) == most_tiles_over_all_splits(num_tokens, num_rows, group, tile)


@pytest.mark.parametrize(("num_rows", "tiles"), [(1, 13), (2, 14)])
def test_splitting_160_tokens_over_two_rows_needs_one_more_tile(num_rows: int, tiles: int) -> None:
    assert max_tiles(160, num_rows, group=5, tile=64) == tiles


@given(
    num_tokens=st.integers(1, 500),
    num_rows=st.integers(1, 64),
    group=st.integers(1, 8),
    tile=st.sampled_from([16, 64]),
    data=st.data(),
)
def test_no_smaller_batch_needs_more_tiles(
    num_tokens: int, num_rows: int, group: int, tile: int, data: st.DataObject
) -> None:
    """A captured step serves every batch of fewer tokens or rows; the rest is padding."""
    fewer_tokens = data.draw(st.integers(0, num_tokens))
    fewer_rows = data.draw(st.integers(1, num_rows))
    assert max_tiles(fewer_tokens, fewer_rows, group, tile) <= max_tiles(num_tokens, num_rows, group, tile)


@given(num_tokens=st.integers(1, 4096), num_rows=st.integers(1, 256), group=st.sampled_from([1, 2, 3, 5, 8, 12]))
def test_a_deterministic_geometry_tiles_alike_at_all_shapes_and_never_splits(
    num_tokens: int, num_rows: int, group: int
) -> None:
    """Two tile heights are two kernels, and a split's end would depend on the other rows."""
    geometry = attention_geometry(num_tokens, num_rows, 2 * group, 2, 132, deterministic=True)
    assert geometry.deterministic
    assert geometry.tile == attention_geometry(1, 1, 2, 2, 132, deterministic=True).tile
    assert geometry.min_split_keys >= 2**30
    assert geometry.max_partials == 0
    assert geometry.max_items == max_tiles(num_tokens, num_rows, group, geometry.tile)


@given(
    num_tokens=st.integers(1, 4096),
    num_rows=st.integers(1, 256),
    num_kv_heads=st.sampled_from([1, 2, 8]),
    group=st.sampled_from([1, 2, 3, 5, 8]),
    multiprocessors=st.integers(1, 160),
)
def test_grid_is_no_larger_than_the_work_and_fits_the_machine(
    num_tokens: int, num_rows: int, num_kv_heads: int, group: int, multiprocessors: int
) -> None:
    geometry = attention_geometry(num_tokens, num_rows, num_kv_heads * group, num_kv_heads, multiprocessors)
    assert 1 <= geometry.num_programs <= min(geometry.max_items * num_kv_heads, 4 * multiprocessors)
    assert geometry.max_items >= max_tiles(num_tokens, num_rows, group, geometry.tile) + geometry.split_target
