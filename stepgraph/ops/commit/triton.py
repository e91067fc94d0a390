"""Triton kernel of `commit`: a single program over all rows, as every row reads the step counter and one writes it."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops import slot_line as line
from stepgraph.ops.capacity import row_capacity

_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_COMPUTED = tl.constexpr(line.COMPUTED)
_ACTIVE = tl.constexpr(line.ACTIVE)
_GENERATION = tl.constexpr(line.GENERATION)
_MAX_LENGTH = tl.constexpr(line.MAX_LENGTH)
_STOP_TOKENS = tl.constexpr(line.STOP_TOKENS)
_MAX_STOP_TOKENS = tl.constexpr(line.MAX_STOP_TOKENS)
_OUTPUT_WIDTH = tl.constexpr(line.OUTPUT_WIDTH)
_NO_TOKEN = tl.constexpr(line.NO_TOKEN)
_RUNNING = tl.constexpr(line.RUNNING)
_FINISHED_STOP = tl.constexpr(line.FINISHED_STOP)
_FINISHED_LENGTH = tl.constexpr(line.FINISHED_LENGTH)
_FINISHED_ERROR = tl.constexpr(line.FINISHED_ERROR)


@triton.jit(do_not_specialize=["R"])
def _commit_kernel(
    lines_ptr,
    tokens_ptr,
    counter_ptr,
    ring_ptr,
    row_slot_ptr,
    query_start_ptr,
    kv_len_ptr,
    sampled_ptr,
    R,
    MAX_LEN,
    DEPTH,
    RING_STRIDE,
    BLOCK_R: tl.constexpr,
):
    row_R = tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    step = tl.load(counter_ptr)
    slot_R = tl.load(row_slot_ptr + row_R, mask=inside_R, other=0)
    query_start_R = tl.load(query_start_ptr + row_R, mask=inside_R, other=0)
    query_end_R = tl.load(query_start_ptr + 1 + row_R, mask=inside_R, other=0)
    kv_len_R = tl.load(kv_len_ptr + row_R, mask=inside_R, other=0)
    sampled_R = tl.load(sampled_ptr + row_R, mask=inside_R, other=0)

    line_R = lines_ptr + slot_R * _LINE_WIDTH
    length_R = tl.load(line_R + _LENGTH, mask=inside_R, other=0)
    generation_R = tl.load(line_R + _GENERATION, mask=inside_R, other=0)
    max_length_R = tl.load(line_R + _MAX_LENGTH, mask=inside_R, other=0)
    stopped_R = row_R < 0
    for i in tl.static_range(_MAX_STOP_TOKENS):
        stopped_R |= tl.load(line_R + _STOP_TOKENS + i, mask=inside_R, other=_NO_TOKEN) == sampled_R

    ran_R = query_end_R > query_start_R
    emits_R = ran_R & (kv_len_R == length_R)
    appends_R = emits_R & (sampled_R != _NO_TOKEN)
    new_length_R = length_R + appends_R.to(tl.int32)
    finish_R = tl.where(new_length_R >= max_length_R, _FINISHED_LENGTH, _RUNNING)
    finish_R = tl.where(stopped_R, _FINISHED_STOP, finish_R)
    finish_R = tl.where(appends_R, finish_R, _FINISHED_ERROR)
    finish_R = tl.where(emits_R, finish_R, _RUNNING)

    # A value may be loaded by several threads and is stored by one: all must have read before any writes.
    tl.debug_barrier()
    tl.store(tokens_ptr + slot_R.to(tl.int64) * MAX_LEN + length_R, sampled_R, mask=appends_R)
    tl.store(line_R + _LENGTH, new_length_R, mask=appends_R)
    tl.store(line_R + _COMPUTED, kv_len_R, mask=ran_R)
    tl.store(line_R + _ACTIVE, tl.zeros_like(slot_R), mask=finish_R != _RUNNING)

    output_R = ring_ptr + (step % DEPTH) * RING_STRIDE + row_R * _OUTPUT_WIDTH
    tl.store(output_R, slot_R, mask=inside_R)
    tl.store(output_R + 1, generation_R, mask=inside_R)
    tl.store(output_R + 2, tl.where(emits_R, sampled_R, _NO_TOKEN), mask=inside_R)
    tl.store(output_R + 3, finish_R, mask=inside_R)
    tl.store(counter_ptr, (step + 1) % DEPTH)


def commit(
    lines: Tensor,
    tokens: Tensor,
    counter: Tensor,
    ring: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    sampled: Tensor,
) -> None:
    """See `stepgraph.ops.commit.commit`."""
    block_rows = row_capacity(row_slot.shape[0])
    _commit_kernel[(1,)](
        lines,
        tokens,
        counter,
        ring,
        row_slot,
        query_start,
        kv_len,
        sampled,
        row_slot.shape[0],
        tokens.stride(0),
        ring.shape[0],
        ring.stride(0),
        BLOCK_R=block_rows,
        num_warps=max(1, block_rows // 32),
    )
