"""Triton kernels of the drafting operators. Shapes: T tokens, R rows, K proposals of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.build.triton import row_of
from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.launched import launched

BLOCK_TOKENS = 256
"""Tokens per program."""

_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_COMPUTED = tl.constexpr(line.COMPUTED)
_ACTIVE = tl.constexpr(line.ACTIVE)
_MAX_LENGTH = tl.constexpr(line.MAX_LENGTH)
_NUM_DRAFTS = tl.constexpr(line.NUM_DRAFTS)
_MAX_NUM_DRAFTS = tl.constexpr(line.MAX_NUM_DRAFTS)
_OUTPUT_WIDTH = tl.constexpr(line.OUTPUT_WIDTH)
_OUT_NUM_DRAFTS = tl.constexpr(line.OUT_NUM_DRAFTS)
_OUT_DRAFTS = tl.constexpr(line.OUT_DRAFTS)


@triton.jit
def _room(line_R, inside_R):
    """Proposals the rows' requests take now, their length and what is computed of them: [R] int32 each."""
    length_R = tl.load(line_R + _LENGTH, mask=inside_R, other=0)
    computed_R = tl.load(line_R + _COMPUTED, mask=inside_R, other=0)
    active_R = tl.load(line_R + _ACTIVE, mask=inside_R, other=0)
    max_length_R = tl.load(line_R + _MAX_LENGTH, mask=inside_R, other=0)
    room_R = tl.minimum(tl.load(line_R + _MAX_NUM_DRAFTS, mask=inside_R, other=0), max_length_R - length_R - 1)
    drafts_R = (active_R != 0) & (computed_R == length_R - 1)
    return tl.where(drafts_R, tl.maximum(room_R, 0), 0), length_R, computed_R


@launched
@triton.jit(do_not_specialize=["T", "R"])
def _inputs_kernel(
    lines_ptr,
    tokens_ptr,
    row_slot_ptr,
    query_start_ptr,
    kv_len_ptr,
    positions_ptr,
    next_ids_ptr,
    slot_ptr,
    index_ptr,
    T,
    R,
    MAX_LEN,
    SEARCH_STEPS: tl.constexpr,  # halvings that reduce 0 … R to one row
    BLOCK_T: tl.constexpr,
):
    """One program per BLOCK_T tokens; there are no more rows than tokens, so the same programs do those."""
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_T = token_T < tl.load(query_start_ptr + R)
    row_T = row_of(query_start_ptr, token_T, real_T, R, SEARCH_STEPS)
    slot_T = tl.load(row_slot_ptr + row_T, mask=real_T, other=0).to(tl.int64)
    position_T = tl.load(positions_ptr + token_T, mask=real_T, other=-1)
    next_T = tl.load(tokens_ptr + slot_T * MAX_LEN + position_T + 1, mask=token_T < T, other=0)
    tl.store(next_ids_ptr + token_T, next_T, mask=token_T < T)

    inside_R = token_T < R
    slot_R = tl.load(row_slot_ptr + token_T, mask=inside_R, other=0)
    start_R = tl.load(query_start_ptr + token_T, mask=inside_R, other=0)
    end_R = tl.load(query_start_ptr + 1 + token_T, mask=inside_R, other=0)
    kv_len_R = tl.load(kv_len_ptr + token_T, mask=inside_R, other=0)
    room_R, _, computed_R = _room(lines_ptr + slot_R * _LINE_WIDTH, inside_R)
    drafts_R = (room_R > 0) & (end_R > start_R)
    tl.store(slot_ptr + token_T, tl.where(drafts_R, slot_R, 0), mask=inside_R)
    tl.store(index_ptr + token_T, tl.where(drafts_R, end_R - 1 - (kv_len_R - computed_R), 0), mask=inside_R)


def draft_inputs(
    lines: Tensor, tokens: Tensor, row_slot: Tensor, query_start: Tensor, kv_len: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `stepgraph.ops.draft.draft_inputs`."""
    num_tokens, num_rows = positions.shape[0], row_slot.shape[0]
    next_ids, slot, index = torch.empty_like(positions), torch.empty_like(row_slot), torch.empty_like(row_slot)
    _inputs_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
        lines,
        tokens,
        row_slot,
        query_start,
        kv_len,
        positions,
        next_ids,
        slot,
        index,
        num_tokens,
        num_rows,
        tokens.stride(0),
        SEARCH_STEPS=row_capacity(num_rows).bit_length(),
        BLOCK_T=BLOCK_TOKENS,
    )
    return next_ids, slot, index


@launched
@triton.jit(do_not_specialize=["R", "PLACE"])
def _row_tokens_kernel(
    lines_ptr,
    block_table_ptr,
    slot_ptr,
    positions_ptr,
    kv_slots_ptr,
    row_slot_ptr,
    query_start_ptr,
    kv_len_ptr,
    R,
    PLACE,
    MAX_BLOCKS,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row_R = tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    slot_R = tl.load(slot_ptr + row_R, mask=inside_R, other=0)
    room_R, _, computed_R = _room(lines_ptr + slot_R * _LINE_WIDTH, inside_R)
    runs_R = room_R > PLACE
    slot_R = tl.where(runs_R, slot_R, 0)
    position_R = tl.where(runs_R, computed_R - 1 + PLACE, 0)
    block_R = tl.load(
        block_table_ptr + slot_R.to(tl.int64) * MAX_BLOCKS + position_R // BLOCK_SIZE, mask=inside_R, other=0
    )
    tl.store(positions_ptr + row_R, position_R, mask=inside_R)
    tl.store(kv_slots_ptr + row_R, block_R * BLOCK_SIZE + position_R % BLOCK_SIZE, mask=inside_R)
    tl.store(row_slot_ptr + row_R, slot_R, mask=inside_R)
    tl.store(kv_len_ptr + row_R, position_R + 1, mask=inside_R)
    tl.store(query_start_ptr, 0)
    tl.store(query_start_ptr + 1 + row_R, row_R + 1, mask=inside_R)


def draft_row_tokens(
    lines: Tensor, block_table: Tensor, slot: Tensor, place: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `stepgraph.ops.draft.draft_row_tokens`."""
    num_rows = slot.shape[0]
    positions, kv_slots, row_slot, kv_len = (torch.empty_like(slot) for _ in range(4))
    query_start = slot.new_empty(num_rows + 1)
    block_rows = row_capacity(num_rows)
    _row_tokens_kernel[(1,)](
        lines,
        block_table,
        slot,
        positions,
        kv_slots,
        row_slot,
        query_start,
        kv_len,
        num_rows,
        place,
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK_R=block_rows,
        num_warps=max(1, block_rows // 32),
    )
    return positions, kv_slots, row_slot, query_start, kv_len


@launched
@triton.jit(do_not_specialize=["R"])
def _propose_kernel(
    lines_ptr,
    tokens_ptr,
    counter_ptr,
    ring_ptr,
    row_slot_ptr,
    drafts_ptr,
    count_ptr,
    R,
    MAX_LEN,
    DEPTH,
    RING_STRIDE,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row_R = tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    entry = (tl.load(counter_ptr) + DEPTH - 1) % DEPTH
    slot_R = tl.load(row_slot_ptr + row_R, mask=inside_R, other=0)
    line_R = lines_ptr + slot_R * _LINE_WIDTH
    room_R, length_R, _ = _room(line_R, inside_R)
    count_R = tl.minimum(tl.load(count_ptr + row_R, mask=inside_R, other=0), K)
    count_R = tl.minimum(tl.maximum(count_R, 0), room_R)
    output_R = ring_ptr + entry * RING_STRIDE + row_R * _OUTPUT_WIDTH
    history_R = tokens_ptr + slot_R.to(tl.int64) * MAX_LEN + length_R
    for k in tl.static_range(K):
        draft_R = tl.load(drafts_ptr + row_R * K + k, mask=inside_R, other=0)
        tl.store(history_R + k, draft_R, mask=k < count_R)
        tl.store(output_R + _OUT_DRAFTS + k, draft_R, mask=inside_R)
    tl.debug_barrier()
    tl.store(line_R + _NUM_DRAFTS, count_R, mask=inside_R)
    tl.store(output_R + _OUT_NUM_DRAFTS, count_R, mask=inside_R)


def propose(
    lines: Tensor, tokens: Tensor, counter: Tensor, ring: Tensor, row_slot: Tensor, drafts: Tensor, count: Tensor
) -> None:
    """See `stepgraph.ops.draft.propose`."""
    num_rows, num_drafts = drafts.shape
    block_rows = row_capacity(num_rows)
    _propose_kernel[(1,)](
        lines,
        tokens,
        counter,
        ring,
        row_slot,
        drafts,
        count,
        num_rows,
        tokens.stride(0),
        ring.shape[0],
        ring.stride(0),
        K=num_drafts,
        BLOCK_R=block_rows,
        num_warps=max(1, block_rows // 32),
    )
