"""Paged attention: the Triton kernels and the CPU kernel against the reference in float64.

Shapes: T tokens, R rows, H query heads, G key/value heads, D head size, B tokens per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from attention_batches import (
    Batch,
    assert_cpu_matches,
    assert_matches,
    assert_triton_matches,
    attend,
    attend_with_torch,
    geometry_of,
    make_batch,
    needs_hopper,
    plan_of,
    settings_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepgraph.ops.attention import AttentionPlan, attention_geometry, max_tiles, plan_triton
from stepgraph.ops.attention import triton as kernels
from stepgraph.ops.attention.geometry import HOPPER_TILE, KV_BLOCK, TALL_TILE
from stepgraph.platforms.tuning import DEFAULT


def compositions(total: int, max_parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as an ordered sum of at most `max_parts` positive parts."""
    for parts in range(1, max_parts + 1):
        for cuts in combinations(range(1, total), parts - 1):
            yield tuple(end - start for start, end in zip((0, *cuts), (*cuts, total), strict=True))


@pytest.mark.parametrize("group", [1, 3, 5])
def test_every_split_of_the_tokens_over_rows_matches_with_one_geometry(group: int, device: str) -> None:
    T, R = 7, 3
    geometries = set()
    for seed, query_lens in enumerate(compositions(T, R)):
        computed = torch.randint(0, 90, (R,), generator=torch.Generator().manual_seed(seed)).tolist()
        padded = query_lens + (0,) * (R - len(query_lens))
        batch = make_batch(
            list(zip(padded, computed, strict=True)), num_tokens=T, group=group, poisoned=True, seed=seed
        )
        geometries.add(geometry_of(batch))
        assert_triton_matches(batch, device)
        assert_cpu_matches(batch)
    assert len(geometries) == 1


# Rows (query length, computed); the tile height follows from the number of tokens.
MIXED = {
    "decode rows": [(1, 0), (1, 63), (1, 64), (1, 299)],
    "one prompt": [(70, 0)],
    "chunk of a long prompt": [(40, 333)],
    "prompt, decode and an empty row": [(50, 0), (1, 200), (0, 77), (3, 10)],
}


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_mixed_rows_match_at_every_block_size(rows: list[tuple[int, int]], block_size: int, device: str) -> None:
    num_tokens = sum(query_len for query_len, _ in rows) + 2
    batch = make_batch(rows, num_tokens=num_tokens, block_size=block_size, poisoned=True)
    assert_triton_matches(batch, device)
    assert_cpu_matches(batch)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("query_len", [1, 40], ids=["small tile", "large tile"])
def test_head_sizes_match_whether_or_not_a_power_of_two(head_dim: int, query_len: int, device: str) -> None:
    batch = make_batch([(query_len, 70)], num_tokens=query_len, head_dim=head_dim, poisoned=True)
    assert_triton_matches(batch, device)
    assert_cpu_matches(batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
def test_16_bit_inputs_match(rows: list[tuple[int, int]], dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter keeps bfloat16 as integers, which its dot multiplies as such")
    num_tokens = sum(query_len for query_len, _ in rows)
    assert_triton_matches(make_batch(rows, num_tokens=num_tokens, head_dim=32, dtype=dtype, poisoned=True), device)


@given(data=st.data())
@pytest.mark.slow
@settings(max_examples=15)
def test_random_mixtures_match(data: st.DataObject, device: str) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400)), min_size=1, max_size=4))
    num_tokens = max(1, sum(query_len for query_len, _ in rows)) + data.draw(st.integers(0, 3))
    group = data.draw(st.sampled_from([1, 2, 3, 5]))
    seed = data.draw(st.integers(0, 2**16))
    batch = make_batch(rows, num_tokens=num_tokens, group=group, poisoned=True, seed=seed)
    assert_triton_matches(batch, device, geometry_of(batch, data.draw(st.integers(1, 12))))
    assert_cpu_matches(batch)


LONG_DECODE = [(1, 700), (1, 299), (1, 64), (1, 0)]
LONG_PREFILL = [(200, 50)]


@pytest.mark.parametrize("rows", [LONG_DECODE, LONG_PREFILL], ids=["decode", "prefill"])
def test_rows_split_over_their_keys_are_combined(rows: list[tuple[int, int]], device: str) -> None:
    batch = make_batch(rows, num_tokens=sum(query_len for query_len, _ in rows), group=1)
    geometry = geometry_of(batch, multiprocessors=16)
    plan = plan_of(batch.to(device), geometry)
    items = plan.items[: int(plan.header[0])]
    assert (items[:, 5] >= 3).any(), items  # the case is about splits
    assert_triton_matches(batch, device, geometry)


@pytest.mark.parametrize("rows", [LONG_DECODE, LONG_PREFILL], ids=["decode", "prefill"])
def test_output_does_not_depend_on_the_order_in_which_splits_finish(rows: list[tuple[int, int]], device: str) -> None:
    batch = make_batch(rows, num_tokens=sum(query_len for query_len, _ in rows), group=1).to(device)
    geometry = replace(geometry_of(batch, multiprocessors=16), num_programs=1)
    plan = plan_of(batch, geometry)
    out = attend(batch, plan, geometry)
    num_items = int(plan.header[0])
    plan.items[:num_items] = plan.items[:num_items].flip(0)
    assert torch.equal(attend(batch, plan, geometry), out)


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
def test_cache_positions_of_no_row_change_nothing(rows: list[tuple[int, int]], device: str) -> None:
    num_tokens = sum(query_len for query_len, _ in rows)
    clean, poisoned = (make_batch(rows, num_tokens=num_tokens, poisoned=p).to(device) for p in (False, True))
    assert poisoned.k_cache.isnan().any()
    geometry = geometry_of(clean)
    outputs = [attend(batch, plan_of(batch, geometry), geometry) for batch in (clean, poisoned)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("window", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # padding of a tile may see no key at all
def test_under_a_window_older_keys_are_not_seen(rows: list[tuple[int, int]], window: int, device: str) -> None:
    """They are NaN here, or their blocks are freed."""
    num_tokens = sum(query_len for query_len, _ in rows) + 2
    batch = make_batch(rows, num_tokens=num_tokens, window=window, poisoned=True)
    assert_triton_matches(batch, device)
    assert_cpu_matches(batch)


@given(data=st.data())
@settings(max_examples=10)
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # padding of a tile may see no key at all
def test_random_mixtures_under_a_window_match(data: st.DataObject, device: str) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 300)), min_size=1, max_size=3))
    batch = make_batch(
        rows,
        num_tokens=max(1, sum(query_len for query_len, _ in rows)) + data.draw(st.integers(0, 3)),
        num_kv_heads=1,
        group=data.draw(st.sampled_from([1, 2, 3, 12])),
        block_size=data.draw(st.sampled_from([1, 8, 64])),
        window=data.draw(st.integers(1, 250)),
        poisoned=True,
        seed=data.draw(st.integers(0, 2**16)),
    )
    assert_triton_matches(batch, device, geometry_of(batch, data.draw(st.integers(1, 6))))
    assert_cpu_matches(batch)


@pytest.mark.parametrize(("deterministic", "most_keys"), [(False, 96), (True, 128)])
def test_work_on_cpu_grows_with_the_window_and_not_with_the_context(
    deterministic: bool, most_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 32 keys, and what rounding to pieces of 64 tokens or to multiples of 64 keys adds."""
    scores = 0
    attention = torch.nn.functional.scaled_dot_product_attention

    def counting(q_HMD: Tensor, k_GLD: Tensor, *args: Any, **settings: Any) -> Tensor:
        nonlocal scores
        scores += q_HMD.shape[:-1].numel() * k_GLD.shape[-2]
        return attention(q_HMD, k_GLD, *args, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    batch = make_batch([(512, 300), (1, 900), (1, 700)], num_tokens=514, group=1, window=32, poisoned=True)
    attend_with_torch(batch, deterministic=deterministic)
    rows = 512 + 2 * 16  # a tile of a decode row may be padded to 16
    assert 512 * 2 * 32 <= scores <= rows * 2 * most_keys


def test_a_query_that_sees_no_key_of_its_tiles_first_splits_is_right(device: str) -> None:
    """Windows of 10 keys and splits of 64: a tile spans 64 tokens, so its last query sees nothing of the tile's first keys."""
    batch = make_batch([(200, 130)], num_tokens=200, group=1, window=10, poisoned=True)
    geometry = geometry_of(batch, multiprocessors=64)
    plan = plan_of(batch.to(device), geometry)
    num_items, keys_per_split = plan.header.tolist()
    assert (keys_per_split, int(plan.items[:num_items, 5].max())) == (KV_BLOCK, 2)
    assert_triton_matches(batch, device, geometry)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
def test_a_float8_cache_is_read_as_the_values_it_holds(rows: list[tuple[int, int]], window: int, device: str) -> None:
    num_tokens = sum(query_len for query_len, _ in rows)
    cache_dtype = torch.float8_e4m3fn
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        batch = make_batch(
            rows, num_tokens=num_tokens, dtype=dtype, cache_dtype=cache_dtype, window=window, poisoned=True
        )
        assert_cpu_matches(batch)
        if dtype != torch.bfloat16 or device == "cuda":  # see test_16_bit_inputs_match
            assert_triton_matches(batch, device)


@given(
    query_lens=st.lists(st.one_of(st.integers(0, 60), st.integers(61, 900)), min_size=1, max_size=9),
    spare_tokens=st.integers(0, 20),
    group=st.sampled_from([1, 2, 3, 5, 8]),
    num_kv_heads=st.sampled_from([1, 2, 8]),
    multiprocessors=st.integers(1, 80),
    min_split_keys=st.sampled_from([KV_BLOCK, DEFAULT.min_split_keys]),
    window=st.one_of(st.just(0), st.integers(1, 300), st.integers(1, 6000)),
    tall_tile=st.sampled_from([TALL_TILE, HOPPER_TILE]),
    data=st.data(),
)
@settings(max_examples=50)
def test_items_cover_every_tile_and_key_once_within_the_bounds(
    query_lens: list[int],
    spare_tokens: int,
    group: int,
    num_kv_heads: int,
    multiprocessors: int,
    min_split_keys: int,
    window: int,
    tall_tile: int,
    data: st.DataObject,
    device: str,
) -> None:
    R = len(query_lens)
    computed = data.draw(st.lists(st.integers(0, 5000), min_size=R, max_size=R))
    kv_len = [n + c for n, c in zip(query_lens, computed, strict=True)]
    T = max(1, sum(query_lens) + spare_tokens)
    geometry = attention_geometry(T, R, num_kv_heads * group, num_kv_heads, multiprocessors, tall_tile=tall_tile)
    geometry = replace(geometry, min_split_keys=min_split_keys)
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int().to(device)
    plan = AttentionPlan(
        *plan_triton.attention_plan(
            torch.arange(R, dtype=torch.int32, device=device),
            query_start,
            torch.tensor(kv_len, dtype=torch.int32, device=device),
            num_kv_heads * group,
            num_kv_heads,
            8,
            geometry.tile,
            geometry.min_split_keys,
            geometry.split_target,
            geometry.max_items,
            geometry.max_partials,
            window,
        )
    )
    num_items, keys_per_split = plan.header.tolist()
    assert num_items <= geometry.max_items
    tiles = sum(-(-n * group // geometry.tile) for n in query_lens)
    assert num_items <= geometry.split_target or tiles >= geometry.split_target
    assert keys_per_split % KV_BLOCK == 0
    assert keys_per_split >= min_split_keys
    assert not plan.counters.any()

    items = plan.items[:num_items].tolist()
    starts = query_start.tolist()
    assert all(item[1:4] == [starts[item[0]], query_lens[item[0]], kv_len[item[0]]] for item in items)
    listed = [(row, tile, split, partial) for row, *_, tile, split, partial, _ in items]
    splits = dict.fromkeys(range(R), 0)
    for row, _, split, _ in listed:
        splits[row] = max(splits[row], split + 1)
    wanted = set()
    for row, query_len in enumerate(query_lens):
        context_len = kv_len[row] - query_len
        for tile in range(-(-query_len * group // geometry.tile)):
            wanted |= {(row, tile, split) for split in range(splits[row])}
            first, last = (
                min(pair // group, query_len - 1) for pair in (tile * geometry.tile, (tile + 1) * geometry.tile - 1)
            )
            first_key = max(0, context_len + first - window + 1) // KV_BLOCK * KV_BLOCK if window else 0
            assert first_key + splits[row] * keys_per_split > context_len + last
        reach = min(kv_len[row], window + KV_BLOCK + geometry.tile // group + 1) if window else kv_len[row]
        assert splits[row] <= -(-reach // keys_per_split)  # work grows with the window, not with the context
    assert len(listed) == len(wanted)
    assert {item[:3] for item in listed} == wanted
    partials = [first + split for _, _, split, first in listed if first >= 0]
    assert sorted(partials) == list(range(len(partials)))
    assert len(partials) <= geometry.max_partials
    assert all((first >= 0) == (splits[row] > 1) for row, _, _, first in listed)


@pytest.mark.parametrize(
    ("kv_len", "expected"),
    [
        ([32768] * 4, (8, 16384)),  # an even share of 9 programs has a third, short split of each row
        ([8192] + [1024] * 3, (9, 1408)),  # of an even share, 1280, there would be ten
        ([4096], (8, 512)),
        ([0] * 20 + [32768] * 4, (8, 16384)),  # tiles without keys are no work of any program
        ([100] * 10, (10, KV_BLOCK * 2)),
    ],
)
def test_no_program_gets_two_items_where_tiles_are_fewer(
    kv_len: list[int], expected: tuple[int, int], device: str
) -> None:
    R = len(kv_len)
    rows = torch.arange(R + 1, dtype=torch.int32, device=device)
    plan = plan_triton.attention_plan(
        rows[:R], rows, torch.tensor(kv_len, dtype=torch.int32, device=device), 1, 1, 8, 16, KV_BLOCK, 9, R + 9, 18, 0
    )
    assert tuple(plan[1].tolist()) == expected


def test_a_tile_bound_computed_as_if_rows_were_merged_loses_a_row(device: str) -> None:
    """The mutant: 160 tokens in one row need 13 tiles, and a list cut there lacks a tile of the batch [80, 80]."""
    rows = [(80, 0), (80, 0)]
    batch = make_batch(rows, num_tokens=160, num_kv_heads=1, group=5).to(device)
    geometry = geometry_of(batch)
    assert geometry.tile == 64
    plan = plan_of(batch, geometry)
    assert int(plan.header[0]) == max_tiles(160, 2, 5, 64)
    assert_matches(attend(batch, plan, geometry), batch)

    plan.header[0] = max_tiles(160, 1, 5, 64)
    torch.use_deterministic_algorithms(True)  # fills what the kernel does not write with NaN
    try:
        out = attend(batch, plan, geometry)
    finally:
        torch.use_deterministic_algorithms(False)
    lost = out.isnan().any(dim=1)
    assert not lost[:80].any()
    assert lost[80:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
@pytest.mark.parametrize(
    ("num_tokens", "tall_tile"),
    [(8, TALL_TILE), (200, TALL_TILE), pytest.param(200, HOPPER_TILE, marks=needs_hopper)],
    ids=["small tile", "tall tile", "tall tile of Hopper"],
)
def test_one_captured_launch_serves_every_composition(num_tokens: int, tall_tile: int) -> None:
    """Captured on one batch, replayed on others whose arrays are copied over its own."""
    R, model = 4, {"num_kv_heads": 8, "group": 2, "head_dim": 128, "block_size": 16, "dtype": torch.bfloat16}
    n = num_tokens

    def padded(rows: list[tuple[int, int]]) -> Batch:
        batch = make_batch(rows + [(0, 0)] * (R - len(rows)), num_tokens=n, poisoned=True, **model).to("cuda")
        table = batch.block_table
        block_table = torch.nn.functional.pad(table, (0, 512 - table.shape[1]))
        k_cache, v_cache = (
            torch.nn.functional.pad(cache, (0, 0) * 3 + (0, 1024 - cache.shape[0]), value=float("nan"))
            for cache in (batch.k_cache, batch.v_cache)
        )
        return replace(batch, block_table=block_table, k_cache=k_cache, v_cache=v_cache)

    static = padded([(1, 5)])
    geometry = geometry_of(static, torch.cuda.get_device_properties(0).multi_processor_count, tall_tile=tall_tile)
    attend(static, plan_of(static, geometry), geometry)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = plan_of(static, geometry)
        out = kernels.paged_attention(*static.inputs(), *plan, *settings_of(static, geometry))

    batches = [[(n, 0)], [(n - 3, 700), (1, 5000), (1, 0), (1, 63)], [(1, 3000), (n - 5, 64)], [(n // 2, 9)] * 2]
    for rows in batches:
        batch = padded(rows)
        for target, source in zip(static.inputs(), batch.inputs(), strict=True):
            target.copy_(source)
        for _ in range(2):  # a replay leaves the counters as it found them
            graph.replay()
            assert_matches(out[: batch.num_real_tokens], batch)
