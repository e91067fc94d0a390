"""Latent attention: the Triton kernels against the reference in float64.

Shapes: T tokens, N rows, H heads, R size of a latent, P of the rotated part of an entry, B tokens per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from attention_batches import MULTIPROCESSORS, TOLERANCE, Batch, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_operators import make_rows_of_products_independent

from stepgraph.ops.attention import AttentionGeometry, AttentionPlan, max_tiles, plan_triton
from stepgraph.ops.attention.geometry import KV_BLOCK
from stepgraph.ops.mla_attention import mla_geometry, reference
from stepgraph.ops.mla_attention import triton as kernels
from stepgraph.platforms.tuning import SM_90

Rows = Sequence[tuple[int, int]]
"""Query length, and entries cached before this step."""
TUNING = replace(SM_90, min_split_keys_latent=KV_BLOCK)
"""Short rows are split too, which the interpreter can afford."""
SCALE = 0.3
MIXED: dict[str, Rows] = {
    "decode rows": [(1, 0), (1, 63), (1, 64), (1, 299)],
    "chunk of a long prompt": [(9, 333)],
    "prompt, decode and an empty row": [(20, 0), (1, 200), (0, 77), (3, 10)],
}


@pytest.fixture(autouse=True)
def few_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the interpreter, which takes as long for an operation on many numbers as on few."""
    if device == "cpu":
        monkeypatch.setattr(kernels, "SHARES", 1)
        for tile in kernels.LAUNCHES:
            monkeypatch.setitem(kernels.LAUNCHES, tile, kernels.Launch(128, 4, 2))


def make_latents(
    rows: Rows,
    heads: int,
    sizes: tuple[int, int],
    *,
    padding: int = 0,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Batch:
    """A batch whose keys are entries of `sizes` (R, P), with NaN in what belongs to no row."""
    return make_batch(
        rows,
        num_tokens=sum(n for n, _ in rows) + padding,
        num_kv_heads=1,
        group=heads,
        head_dim=sum(sizes),
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        poisoned=True,
        seed=seed,
    )


def geometry_of(
    batch: Batch, multiprocessors: int = MULTIPROCESSORS, *, deterministic: bool = False
) -> AttentionGeometry:
    T, H, _ = batch.q.shape
    return mla_geometry(T, len(batch.kv_len), H, multiprocessors, deterministic=deterministic, tuning=TUNING)


def plan_of(batch: Batch, rank: int, geometry: AttentionGeometry, kv_len: Tensor | None = None) -> AttentionPlan:
    sizes = (geometry.tile, geometry.min_split_keys, geometry.split_target, geometry.max_items, geometry.max_partials)
    rows = (batch.row_slot, batch.query_start, batch.kv_len if kv_len is None else kv_len)
    return AttentionPlan(*plan_triton.attention_plan(*rows, batch.q.shape[1], 1, rank, *sizes, 0))


def inputs(batch: Batch) -> tuple[Tensor, ...]:
    q, k_cache, _, *rows = batch.inputs()
    return q, k_cache[:, :, 0], *rows


def attend(batch: Batch, rank: int, plan: AttentionPlan, geometry: AttentionGeometry) -> Tensor:
    """The kernels' output, real tokens only."""
    out = kernels.mla_attention(
        *inputs(batch), *plan[:3], rank, SCALE, geometry.tile, geometry.num_programs, geometry.deterministic
    )
    return out[: batch.num_real_tokens].cpu()


def assert_matches(out: Tensor, batch: Batch, rank: int) -> None:
    q, cache, *rows = inputs(batch.to("cpu"))
    expected = reference.mla_attention(q.double(), cache.double(), *rows, rank, SCALE)[: batch.num_real_tokens]
    tolerance = 4 * TOLERANCE[batch.q.dtype]  # sums of four times as many numbers as a head has
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def assert_triton_matches(
    batch: Batch, rank: int, device: str, geometry: AttentionGeometry | None = None
) -> AttentionPlan:
    batch, geometry = batch.to(device), geometry or geometry_of(batch)
    plan = plan_of(batch, rank, geometry)
    assert_matches(attend(batch, rank, plan, geometry), batch, rank)
    return plan


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize(("heads", "block_size"), [(16, 16), (20, 1)])
def test_mixed_rows_match(rows: Rows, heads: int, block_size: int, device: str) -> None:
    assert_triton_matches(make_latents(rows, heads, (32, 8), padding=2, block_size=block_size), 32, device)


@pytest.mark.parametrize("sizes", [(512, 64), (96, 32), (24, 10)], ids=str)
@pytest.mark.parametrize("query_len", [1, 3], ids=["small tile", "large tile"])
def test_sizes_of_entries_match_whether_or_not_powers_of_two(
    sizes: tuple[int, int], query_len: int, device: str
) -> None:
    assert_triton_matches(make_latents([(query_len, 70)], 16, sizes), sizes[0], device)


@given(data=st.data())
@settings(max_examples=4)
def test_random_mixtures_match(data: st.DataObject, device: str) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 200)), min_size=1, max_size=3))
    padding = data.draw(st.integers(sum(n for n, _ in rows) == 0, 3))
    heads, seed = data.draw(st.sampled_from([1, 3, 16, 20, 40])), data.draw(st.integers(0, 2**16))
    batch = make_latents(rows, heads, (16, 8), padding=padding, seed=seed)
    assert_triton_matches(batch, 16, device, geometry_of(batch, data.draw(st.integers(1, 4))))


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float8_e4m3fn),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_16_and_8_bits_match(rows: Rows, dtype: torch.dtype, cache_dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter keeps bfloat16 as integers, which its dot multiplies as such")
    assert_triton_matches(make_latents(rows, 16, (32, 16), dtype=dtype, cache_dtype=cache_dtype), 32, device)


SPLIT: dict[str, Rows] = {"decode": [(1, 300), (1, 64), (1, 0)], "chunk": [(5, 300), (2, 130)]}


@pytest.mark.parametrize("rows", SPLIT.values(), ids=SPLIT.keys())
def test_rows_split_over_their_keys_are_combined_in_whatever_order_they_were_done(rows: Rows, device: str) -> None:
    batch = make_latents(rows, 16, (32, 8)).to(device)
    geometry = geometry_of(batch, 8)
    plan = assert_triton_matches(batch, 32, device, geometry)
    num_items = int(plan.header[0])
    assert (plan.items[:num_items, 5] >= 2).any()  # the case is about splits
    out = attend(batch, 32, plan, geometry)
    plan.items[:num_items] = plan.items[:num_items].flip(0)
    assert torch.equal(attend(batch, 32, plan, replace(geometry, num_programs=1)), out)


@pytest.mark.parametrize("multiprocessors", [1, 8], ids=["whole", "split"])
def test_of_the_context_alone_all_tokens_see_all_and_the_sum_is_told(multiprocessors: int, device: str) -> None:
    """Log-sum-exps are in units of log 2; what a row without a context gets is left open."""
    rows = [(6, 200), (4, 0), (1, 65), (0, 40)]
    batch = make_latents(rows, 16, (32, 8), padding=1).to(device)
    query_len = batch.query_start.diff()
    context_len = batch.kv_len - query_len
    geometry = geometry_of(batch, multiprocessors)
    plan = plan_of(batch, 32, geometry, context_len)
    out, lse = kernels.mla_context_attention(
        *inputs(batch)[:-1], context_len, *plan[:3], 32, SCALE, geometry.tile, geometry.num_programs
    )
    q, cache, *others = inputs(batch.to("cpu"))
    expected = reference.mla_context_attention(
        q.double(), cache.double(), *others[:-1], context_len.cpu(), *plan[:3], 32, SCALE, 0, 0
    )
    has_context = (context_len > 0).repeat_interleave(query_len).cpu()
    for found, wanted in zip((out, lse), expected, strict=True):
        found, wanted = (tensor[: batch.num_real_tokens].cpu().double()[has_context] for tensor in (found, wanted))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def partitions(total: int) -> list[tuple[int, ...]]:
    """All 2,214 ways to write 160 as a sum of up to three lengths, if that is the total."""
    two = [(a, total - a) for a in range(1, total // 2 + 1)]
    three = [(a, b, total - a - b) for a in range(1, total) for b in range(a, total) if total - a - b >= b]
    return [(total,), *two, *three]


HEADS, TOKENS = 3, 160
"""160 tokens of 3 heads need 8 tiles of 64 pairs as one row, up to 9 as rows of equal lengths, and 10 at most."""


def tiles_of(lengths: Sequence[int]) -> int:
    return sum(-(-n * HEADS // 64) for n in lengths)


EVERY = partitions(TOKENS)
WORST = max(EVERY, key=tiles_of)


def partition(lengths: tuple[int, ...], seed: int, device: str) -> Batch:
    rng = Random(seed)
    rows = [(n, rng.choice((0, rng.randint(0, 40)))) for n in lengths] + [(0, 0)] * (3 - len(lengths))
    return make_latents(rows, HEADS, (16, 4), seed=seed).to(device)


def test_partitions_of_160_tokens_into_up_to_3_rows_match_with_one_geometry(device: str) -> None:
    assert len(EVERY) == 2214
    geometries = set()
    for seed, lengths in enumerate([WORST, *Random(0).sample(EVERY, 59)]):
        batch = partition(lengths, seed, device)
        geometries.add(replace(geometry_of(batch, 1), max_partials=0))
        assert_triton_matches(batch, 16, device, *geometries)
    assert len(geometries) == 1


def test_a_bound_of_rows_of_equal_lengths_loses_a_tile(device: str) -> None:
    """The mutant."""
    equal = max(tiles_of(lengths) for lengths in EVERY if max(lengths) - min(lengths) <= 1)
    batch = partition(WORST, 0, device)
    geometry = replace(geometry_of(batch, 1), max_partials=0)
    assert geometry.tile == 64
    plan = plan_of(batch, 16, geometry)
    assert int(plan.header[0]) == tiles_of(WORST) == max_tiles(TOKENS, 3, HEADS, 64) > equal
    assert_matches(attend(batch, 16, plan, geometry), batch, 16)

    plan.header[0] = equal
    torch.use_deterministic_algorithms(True)  # fills what the kernel does not write with NaN
    try:
        out = attend(batch, 16, plan, geometry)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isnan().any()


LENGTH = 75
CHUNKS = [[75], [3, 30, 42], [70, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_deterministic_geometry_gives_a_token_the_same_bits_in_every_step(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in several chunkings, each chunk beside rows that differ from step to step."""
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter keeps bfloat16 as integers, which its dot multiplies as such")
    make_rows_of_products_independent(monkeypatch)
    whole = make_latents([(LENGTH, 0)], 5, (16, 8), dtype=dtype)
    found = {}
    for deterministic in (True, False):
        outputs = []
        for lengths in CHUNKS:
            done, parts = 0, []
            for seed, n in enumerate(lengths):
                others = make_latents([(1 + seed, 0), (n, done), (3, 64 * seed)], 5, (16, 8), dtype=dtype, padding=seed)
                q, cache = others.q.clone(), others.k_cache.clone()
                start, slot = 1 + seed, int(others.row_slot[1])
                q[start : start + n] = whole.q[done : done + n]
                position = torch.arange(done + n)
                target = others.block_table[slot, position // 8].long(), position % 8
                cache[target] = whole.k_cache[whole.block_table[1, position // 8].long(), position % 8]
                batch = replace(others, q=q, k_cache=cache).to(device)
                geometry = geometry_of(batch, 5, deterministic=deterministic)
                parts.append(attend(batch, 16, plan_of(batch, 16, geometry), geometry)[start : start + n])
                done += n
            outputs.append(torch.cat(parts))
        found[deterministic] = all(torch.equal(outputs[0], other) for other in outputs)
        assert_matches(outputs[0], whole, 16)
    assert found == {True: True, False: False}  # else the test would prove nothing
