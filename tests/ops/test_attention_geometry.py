"""`max_tiles` bounds every batch exactly, and the geometry is built on it."""

import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.experimental.gluon import language as gluon_language

from stepgraph.ops import attention
from stepgraph.ops.attention.geometry import HOPPER_TILE, TALL_TILE, attention_geometry, max_tiles, tall_tile
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.platforms.tuning import SM_90, of_capability


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
    tile=st.sampled_from([4, 16, 64, 128]),
)
def test_max_tiles_equals_the_maximum_over_all_splits(num_tokens: int, num_rows: int, group: int, tile: int) -> None:
    assert max_tiles(num_tokens, num_rows, group, tile) == most_tiles_over_all_splits(num_tokens, num_rows, group, tile)


@pytest.mark.parametrize(("num_rows", "tiles"), [(1, 13), (2, 14)])
def test_splitting_160_tokens_over_two_rows_needs_one_more_tile(num_rows: int, tiles: int) -> None:
    assert max_tiles(160, num_rows, group=5, tile=64) == tiles


def tiles_of_one_long_row(num_tokens: int, num_rows: int, group: int, tile: int) -> int:
    """What a usual dummy batch needs, in which every row has one token and the last takes the rest."""
    return (num_rows - 1) * -(-group // tile) + -(-(num_tokens - num_rows + 1) * group // tile)


def test_one_long_row_is_not_the_worst_case() -> None:
    assert tiles_of_one_long_row(26, 2, group=5, tile=64) == 3
    assert sum(-(-length * 5 // 64) for length in (13, 13)) == max_tiles(26, 2, group=5, tile=64) == 4
    sizes = [(num_tokens, num_rows) for num_tokens in range(1, 129) for num_rows in range(1, min(num_tokens, 16) + 1)]
    missing = [max_tiles(*size, 5, 64) - tiles_of_one_long_row(*size, 5, 64) for size in sizes]
    assert (min(missing), max(missing)) == (0, 1)
    assert len(sizes) == 1928
    assert sum(map(bool, missing)) == 399, "docs/architecture.md gives this number"


@given(
    num_tokens=st.integers(1, 500),
    num_rows=st.integers(1, 64),
    group=st.integers(1, 8),
    tile=st.sampled_from([16, 64, 128]),
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
    tall=st.sampled_from([TALL_TILE, HOPPER_TILE]),
)
def test_grid_is_no_larger_than_the_work_and_fits_the_machine(
    num_tokens: int, num_rows: int, num_kv_heads: int, group: int, multiprocessors: int, tall: int
) -> None:
    geometry = attention_geometry(
        num_tokens, num_rows, num_kv_heads * group, num_kv_heads, multiprocessors, tall_tile=tall
    )
    most = multiprocessors * (1 if geometry.tile == HOPPER_TILE else 4)
    assert 1 <= geometry.num_programs <= min(geometry.max_items * num_kv_heads, most)
    assert geometry.max_items >= max_tiles(num_tokens, num_rows, group, geometry.tile) + geometry.split_target
    assert geometry.max_partials >= 2 * geometry.split_target


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "deterministic", "tile"),
    [
        (8, 1, False, 16),
        (256, 256, False, 16),
        (80, 1, False, TALL_TILE),
        (512, 1, False, HOPPER_TILE),
        (512, 256, False, 16),
        (513, 256, False, HOPPER_TILE),
        (2048, 256, False, HOPPER_TILE),
        (2048, 256, True, 16),
    ],
)
def test_only_long_queries_get_tall_tiles(num_tokens: int, num_rows: int, deterministic: bool, tile: int) -> None:
    sizes = (num_tokens, num_rows, 16, 8, 132)
    assert attention_geometry(*sizes, deterministic=deterministic, tall_tile=HOPPER_TILE).tile == tile
    assert attention_geometry(*sizes, deterministic=deterministic).tile == min(tile, TALL_TILE)


def test_rows_that_verify_proposals_get_small_tiles() -> None:
    assert attention_geometry(1024, 256, 16, 8, 132, decode_tokens=4).tile == 16
    assert attention_geometry(1024, 256, 16, 8, 132).tile == TALL_TILE


SERVED: dict[str, Any] = {
    "tuning": SM_90,
    "dtype": torch.bfloat16,
    "cache_dtype": torch.bfloat16,
    "head_dim": 128,
    "block_size": 16,
    "windows": (0, 0),
    "plain_scores": True,
}


@pytest.mark.parametrize(
    ("capability", "changes", "tile"),
    [
        ((9, 0), {}, HOPPER_TILE),
        ((9, 0), {"dtype": torch.float16, "cache_dtype": torch.float16}, HOPPER_TILE),
        ((9, 0), {"head_dim": 64}, HOPPER_TILE),
        ((9, 0), {"block_size": 8}, HOPPER_TILE),
        ((9, 0), {"block_size": 128}, HOPPER_TILE),
        ((8, 9), {}, TALL_TILE),
        ((10, 0), {}, TALL_TILE),
        ((9, 0), {"tuning": CpuPlatform.tuning}, TALL_TILE),
        ((9, 0), {"dtype": torch.float32, "cache_dtype": torch.float32}, TALL_TILE),
        ((9, 0), {"cache_dtype": torch.float8_e4m3fn}, TALL_TILE),
        ((9, 0), {"head_dim": 256}, TALL_TILE),
        ((9, 0), {"head_dim": 96}, TALL_TILE),
        ((9, 0), {"block_size": 4}, TALL_TILE),
        ((9, 0), {"windows": (0, 512)}, TALL_TILE),
        ((9, 0), {"plain_scores": False}, TALL_TILE),
    ],
)
def test_tiles_are_as_tall_as_the_kernel_for_them_serves(
    capability: tuple[int, int], changes: dict[str, Any], tile: int
) -> None:
    assert tall_tile(**SERVED | {"tuning": of_capability(capability)} | changes) == tile


@pytest.mark.parametrize("lacks", ["module", "name"])
def test_a_triton_that_lacks_gluon_as_it_is_now_gets_the_kernel_that_needs_none(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(attention, "hopper", raising=False)
    if lacks == "module":
        monkeypatch.setitem(sys.modules, "stepgraph.ops.attention.hopper", None)
    else:
        monkeypatch.delitem(sys.modules, "stepgraph.ops.attention.hopper", raising=False)
        for name in ("barrier", "thread_barrier"):
            monkeypatch.delattr(gluon_language, name, raising=False)
    assert tall_tile(**SERVED) == TALL_TILE
