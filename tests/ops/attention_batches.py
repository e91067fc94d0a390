"""Batches of rows over a paged cache, and what attention over them is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepgraph.ops.attention import AttentionGeometry, AttentionPlan, attention_geometry, cpu, plan_triton, reference
from stepgraph.ops.attention import triton as kernels
from stepgraph.ops.attention.geometry import KV_BLOCK, TALL_TILE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HAS_HOPPER, reason="this kernel is for Hopper GPUs")
MULTIPROCESSORS = 3  # few programs, so that each loops over many items and long rows are split


@dataclass(frozen=True)
class Batch:
    """Inputs of `paged_attention`, and which of the T tokens are real."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    row_slot: Tensor
    query_start: Tensor
    kv_len: Tensor
    window: int = 0
    sinks: Tensor | None = None
    softcap: float = 0.0

    @property
    def num_real_tokens(self) -> int:
        return int(self.query_start[-1])

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.q, self.k_cache, self.v_cache, self.block_table, self.row_slot, self.query_start, self.kv_len
        )  # fmt: skip

    def to(self, device: str) -> Batch:
        sinks = None if self.sinks is None else self.sinks.to(device)
        return Batch(*(tensor.to(device) for tensor in self.inputs()), self.window, sinks, self.softcap)

    def expected(self) -> Tensor:
        """The reference in float64, real tokens only."""
        batch = self.to("cpu")
        q, k_cache, v_cache, *rows = batch.inputs()
        exact, scoring = (q.double(), k_cache.double(), v_cache.double()), (batch.sinks, batch.softcap)
        out = reference.paged_attention(*exact, *rows, self.scale, self.window, *scoring)
        return out[: self.num_real_tokens]


def make_batch(
    rows: Sequence[tuple[int, int]],
    *,
    num_tokens: int,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
    sinks: bool = False,
    softcap: float = 0.0,
    poisoned: bool = False,
    seed: int = 0,
) -> Batch:
    """A batch of rows (query length, keys cached before this step) over a shuffled cache, padded to `num_tokens`.

    Cache positions of no row, the null block among them, hold NaN if `poisoned`. Under a window this includes all keys before
    a row's first window, and blocks wholly before it are freed: the table has the null block in their place.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_len = [computed + query_len for query_len, computed in rows]
    blocks_of_row = [-(-m // block_size) for m in kv_len]
    num_blocks = 1 + sum(blocks_of_row)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator) for _ in range(2))
    free = iter((1 + torch.randperm(num_blocks - 1, generator=generator)).tolist())
    row_slot = 1 + torch.randperm(len(rows), generator=generator)
    block_table = torch.zeros(1 + len(rows), max(blocks_of_row) + 1, dtype=torch.int32)
    owned = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    query_first = dict(zip(row_slot.tolist(), (computed for _, computed in rows), strict=True))
    for slot, m, count in zip(row_slot.tolist(), kv_len, blocks_of_row, strict=True):
        first_key = max(0, query_first[slot] - window + 1) if window else 0
        for index in range(first_key // block_size, count):
            block = next(free)
            block_table[slot, index] = block
            owned[block, max(0, first_key - index * block_size) : m - index * block_size] = True
    if poisoned:
        k_cache[~owned] = float("nan")
        v_cache[~owned] = float("nan")
    query_start = torch.tensor([0] + [query_len for query_len, _ in rows]).cumsum(0)
    return Batch(
        q=torch.randn(num_tokens, num_kv_heads * group, head_dim, generator=generator).to(dtype),
        k_cache=k_cache.to(cache_dtype or dtype),
        v_cache=v_cache.to(cache_dtype or dtype),
        block_table=block_table,
        row_slot=row_slot.int(),
        query_start=query_start.int(),
        kv_len=torch.tensor(kv_len, dtype=torch.int32),
        window=window,
        sinks=torch.randn(num_kv_heads * group, generator=generator) if sinks else None,
        softcap=softcap,
    )


def geometry_of(
    batch: Batch,
    multiprocessors: int = MULTIPROCESSORS,
    *,
    deterministic: bool = False,
    tall_tile: int = TALL_TILE,
) -> AttentionGeometry:
    T, H, _ = batch.q.shape
    geometry = attention_geometry(
        T,
        len(batch.kv_len),
        H,
        batch.k_cache.shape[2],
        multiprocessors,
        deterministic=deterministic,
        tall_tile=tall_tile,
    )
    return (
        geometry if deterministic else replace(geometry, min_split_keys=KV_BLOCK)
    )  # short rows are split too, which the interpreter can afford


def plan_of(batch: Batch, geometry: AttentionGeometry) -> AttentionPlan:
    _, H, D = batch.q.shape
    G = batch.k_cache.shape[2]
    sizes = (geometry.tile, geometry.min_split_keys, geometry.split_target, geometry.max_items, geometry.max_partials)
    return AttentionPlan(
        *plan_triton.attention_plan(batch.row_slot, batch.query_start, batch.kv_len, H, G, D, *sizes, batch.window)
    )


def settings_of(batch: Batch, geometry: AttentionGeometry) -> tuple[Any, ...]:
    sizes = geometry.tile, geometry.num_programs, batch.window, geometry.deterministic
    return batch.scale, *sizes, batch.sinks, batch.softcap


def attend(batch: Batch, plan: AttentionPlan, geometry: AttentionGeometry) -> Tensor:
    """The Triton kernel's output, real tokens only."""
    out = kernels.paged_attention(*batch.inputs(), *plan, *settings_of(batch, geometry))
    assert not plan.counters.any(), plan.counters
    return out[: batch.num_real_tokens]


def assert_matches(out: Tensor, batch: Batch) -> None:
    tolerance = TOLERANCE[batch.q.dtype]
    torch.testing.assert_close(out.cpu().double(), batch.expected(), atol=tolerance, rtol=tolerance)


def assert_triton_matches(batch: Batch, device: str, geometry: AttentionGeometry | None = None) -> None:
    batch, geometry = batch.to(device), geometry or geometry_of(batch)
    assert_matches(attend(batch, plan_of(batch, geometry), geometry), batch)


def attend_on_cpu(batch: Batch, geometry: AttentionGeometry) -> Tensor:
    """The CPU kernel's output, real tokens only."""
    nothing = cpu.attention_plan(batch.row_slot, batch.query_start, batch.kv_len, 0, 0, 0, 0, 0, 0, 0, 0, batch.window)
    out = cpu.paged_attention(*batch.inputs(), *nothing, *settings_of(batch, geometry))
    return out[: batch.num_real_tokens]


def attend_with_torch(batch: Batch, *, deterministic: bool) -> Tensor:
    """What the CPU gives without kernels of our own, real tokens only."""
    scoring = {"sinks": batch.sinks, "softcap": batch.softcap}
    out = cpu.torch_attention(*batch.inputs(), batch.scale, batch.window, deterministic=deterministic, **scoring)
    return out[: batch.num_real_tokens]


def assert_cpu_matches(batch: Batch) -> None:
    assert_matches(attend_on_cpu(batch, geometry_of(batch)), batch)
    for deterministic in (False, True):
        assert_matches(attend_with_torch(batch, deterministic=deterministic), batch)
