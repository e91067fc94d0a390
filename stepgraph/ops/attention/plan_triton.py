"""Triton kernel of `attention_plan`.

Shapes in the kernel: R rows, I items, C candidates for a split's keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.attention.geometry import ITEM_SIZE, KV_BLOCK
from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.launched import launched


@triton.jit
def _up_to_blocks(keys, KV_BLOCK: tl.constexpr):
    return tl.cdiv(keys, KV_BLOCK) * KV_BLOCK


@triton.jit
def _keys_per_split(
    tiles_R, span_R, split_target, KV_BLOCK: tl.constexpr, MIN_SPLIT_KEYS: tl.constexpr, CANDIDATES: tl.constexpr
):
    """See `stepgraph.ops.attention.attention_plan`."""
    work = tl.sum(tiles_R.to(tl.int64) * span_R, axis=0)
    share = _up_to_blocks(tl.cdiv(work, split_target).to(tl.int32), KV_BLOCK)
    low = tl.maximum(share, MIN_SPLIT_KEYS)
    spare = split_target - tl.sum(tiles_R, axis=0)
    if spare <= 0:
        return low
    # Each tile's last split is short: Σ tiles · (span / keys + 1) ≤ split_target certainly holds from here on.
    enough = tl.minimum(tl.cdiv(work, spare).to(tl.int32), tl.max(span_R, axis=0))
    high = tl.maximum(_up_to_blocks(enough, KV_BLOCK), low)
    candidate_C = tl.arange(0, CANDIDATES)
    keys_C = low + (high - low) // KV_BLOCK * candidate_C // (CANDIDATES - 1) * KV_BLOCK
    items_C = tl.sum(tiles_R[None, :] * tl.cdiv(span_R[None, :], keys_C[:, None]), axis=1)
    keys = tl.min(tl.where(items_C <= split_target, keys_C, high), axis=0)
    # As many splits of each row, of more equal length.
    even_R = tl.cdiv(span_R, tl.maximum(tl.cdiv(span_R, keys), 1))
    return tl.maximum(_up_to_blocks(tl.max(even_R, axis=0), KV_BLOCK), MIN_SPLIT_KEYS)


@launched
@triton.jit(do_not_specialize=["num_rows", "split_target", "num_counters"])
def _plan_kernel(
    row_slot_ptr,
    query_start_ptr,
    kv_len_ptr,
    items_ptr,
    header_ptr,
    counters_ptr,
    num_rows,
    split_target,
    num_counters,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    MIN_SPLIT_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: full attention
    ITEM: tl.constexpr,  # numbers per item
    ROWS: tl.constexpr,  # at least num_rows
    BLOCK: tl.constexpr,  # items or counters written at once
):
    """One program per row. Each looks at all rows, which spares it every exchange with the others."""
    row = tl.program_id(0)
    row_R = tl.arange(0, ROWS)
    real_R = row_R < num_rows
    start_R = tl.load(query_start_ptr + row_R, mask=real_R, other=0)
    end_R = tl.load(query_start_ptr + row_R + 1, mask=real_R, other=0)
    kv_len_R = tl.load(kv_len_ptr + row_R, mask=real_R, other=0)
    query_len_R = end_R - start_R
    tiles_R = tl.where(kv_len_R > 0, tl.cdiv(query_len_R * GROUP, TILE), 0)
    span_R = kv_len_R
    if WINDOW > 0:
        first_key_R = tl.maximum(kv_len_R - query_len_R - WINDOW + 1, 0) // KV_BLOCK * KV_BLOCK
        later_tokens_R = tl.minimum(query_len_R - 1, (TILE + GROUP - 2) // GROUP)  # of a tile, beside its first
        span_R = tl.minimum(kv_len_R - first_key_R, KV_BLOCK - 1 + WINDOW + later_tokens_R)
    keys_per_split = _keys_per_split(tiles_R, span_R, split_target, KV_BLOCK, MIN_SPLIT_KEYS, CANDIDATES=8)
    splits_R = tl.cdiv(span_R, keys_per_split)
    items_R = tiles_R * splits_R

    if row == 0:
        tl.store(header_ptr, tl.sum(items_R, axis=0))
        tl.store(header_ptr + 1, keys_per_split)
    for first in range(row * BLOCK, num_counters, tl.num_programs(0) * BLOCK):
        counter = first + tl.arange(0, BLOCK)
        tl.store(counters_ptr + counter, 0, mask=counter < num_counters)

    first_item = tl.sum(tl.where(row_R < row, items_R, 0), axis=0)
    first_partial = tl.sum(tl.where((row_R < row) & (splits_R > 1), items_R, 0), axis=0)
    tiles = tl.sum(tl.where(row_R == row, tiles_R, 0), axis=0)
    splits = tl.sum(tl.where(row_R == row, splits_R, 0), axis=0)
    slot = tl.load(row_slot_ptr + row)
    query_start = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - query_start
    kv_len = tl.load(kv_len_ptr + row)
    for first in range(0, tiles * splits, BLOCK):
        item_I = first + tl.arange(0, BLOCK)
        inside_I = item_I < tiles * splits
        # The last tile of a row sees the most keys: heaviest first.
        tile_I = item_I // splits
        partial_I = tl.where(splits > 1, first_partial + tile_I * splits, -1)
        target_I = items_ptr + (first_item + item_I) * ITEM
        tl.store(target_I, slot, mask=inside_I)
        tl.store(target_I + 1, query_start, mask=inside_I)
        tl.store(target_I + 2, query_len, mask=inside_I)
        tl.store(target_I + 3, kv_len, mask=inside_I)
        tl.store(target_I + 4, tiles - 1 - tile_I, mask=inside_I)
        tl.store(target_I + 5, item_I % splits, mask=inside_I)
        tl.store(target_I + 6, partial_I, mask=inside_I)


def attention_plan(
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tile: int,
    min_split_keys: int,
    split_target: int,
    max_items: int,
    max_partials: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `stepgraph.ops.attention.attention_plan`."""
    num_rows = kv_len.shape[0]
    items = kv_len.new_empty(max_items, ITEM_SIZE)
    header = kv_len.new_empty(2)
    partials = kv_len.new_empty(max_partials, num_kv_heads, tile, head_dim + 2, dtype=torch.float32)
    counters = kv_len.new_empty(max_partials, num_kv_heads)
    _plan_kernel[(num_rows,)](
        row_slot,
        query_start,
        kv_len,
        items,
        header,
        counters,
        num_rows,
        split_target,
        counters.numel(),
        GROUP=num_heads // num_kv_heads,
        TILE=tile,
        KV_BLOCK=KV_BLOCK,
        MIN_SPLIT_KEYS=min_split_keys,
        WINDOW=window,
        ITEM=ITEM_SIZE,
        ROWS=row_capacity(num_rows),
        BLOCK=128,
        num_warps=4,
    )
    return items, header, partials, counters
