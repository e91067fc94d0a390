"""Triton kernel of `commit`: a single program over all rows, as every row reads the step counter and one writes it."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.launched import launched

_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_COMPUTED = tl.constexpr(line.COMPUTED)
_ACTIVE = tl.constexpr(line.ACTIVE)
_GENERATION = tl.constexpr(line.GENERATION)
_MAX_LENGTH = tl.constexpr(line.MAX_LENGTH)
_STOP_TOKENS = tl.constexpr(line.STOP_TOKENS)
_MAX_STOP_TOKENS = tl.constexpr(line.MAX_STOP_TOKENS)
_NUM_DRAFTS = tl.constexpr(line.NUM_DRAFTS)
_OUTPUT_WIDTH = tl.constexpr(line.OUTPUT_WIDTH)
_OUT_SLOT = tl.constexpr(line.OUT_SLOT)
_OUT_GENERATION = tl.constexpr(line.OUT_GENERATION)
_OUT_FINISH = tl.constexpr(line.OUT_FINISH)
_OUT_NUM_TOKENS = tl.constexpr(line.OUT_NUM_TOKENS)
_OUT_NUM_VERIFIED = tl.constexpr(line.OUT_NUM_VERIFIED)
_OUT_NUM_ACCEPTED = tl.constexpr(line.OUT_NUM_ACCEPTED)
_OUT_FIRST_SAMPLE = tl.constexpr(line.OUT_FIRST_SAMPLE)
_OUT_NUM_DRAFTS = tl.constexpr(line.OUT_NUM_DRAFTS)
_OUT_TOKENS = tl.constexpr(line.OUT_TOKENS)
_NO_TOKEN = tl.constexpr(line.NO_TOKEN)
_RUNNING = tl.constexpr(line.RUNNING)
_FINISHED_STOP = tl.constexpr(line.FINISHED_STOP)
_FINISHED_LENGTH = tl.constexpr(line.FINISHED_LENGTH)
_FINISHED_ERROR = tl.constexpr(line.FINISHED_ERROR)


@launched
@triton.jit(do_not_specialize=["R"])
def _commit_kernel(
    lines_ptr,
    tokens_ptr,
    counter_ptr,
    ring_ptr,
    row_slot_ptr,
    query_start_ptr,
    kv_len_ptr,
    sample_start_ptr,
    sampled_ptr,
    fault_ptr,
    R,
    MAX_LEN,
    DEPTH,
    RING_STRIDE,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OBEYS_FAULT: tl.constexpr,
):
    row_R = tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    step = tl.load(counter_ptr)
    slot_R = tl.load(row_slot_ptr + row_R, mask=inside_R, other=0)
    query_start_R = tl.load(query_start_ptr + row_R, mask=inside_R, other=0)
    query_end_R = tl.load(query_start_ptr + 1 + row_R, mask=inside_R, other=0)
    kv_len_R = tl.load(kv_len_ptr + row_R, mask=inside_R, other=0)
    first_sample_R = tl.load(sample_start_ptr + row_R, mask=inside_R, other=0)
    num_samples_R = tl.load(sample_start_ptr + 1 + row_R, mask=inside_R, other=0) - first_sample_R
    if OBEYS_FAULT:
        faultless = tl.load(fault_ptr) == 0
        query_end_R = tl.where(faultless, query_end_R, query_start_R)
        num_samples_R = tl.where(faultless, num_samples_R, 0)

    line_R = lines_ptr + slot_R * _LINE_WIDTH
    length_R = tl.load(line_R + _LENGTH, mask=inside_R, other=0)
    generation_R = tl.load(line_R + _GENERATION, mask=inside_R, other=0)
    max_length_R = tl.load(line_R + _MAX_LENGTH, mask=inside_R, other=0)
    history_R = tokens_ptr + slot_R.to(tl.int64) * MAX_LEN
    output_R = ring_ptr + (step % DEPTH) * RING_STRIDE + row_R * _OUTPUT_WIDTH

    zero_R = tl.zeros_like(slot_R)
    counts_R = num_samples_R > 0
    num_counting_R = zero_R
    num_tokens_R = zero_R
    num_accepted_R = zero_R
    last_token_R = zero_R
    finish_R = zero_R + _RUNNING
    for j in tl.static_range(K + 1):
        sampled_R = tl.load(sampled_ptr + first_sample_R + j, mask=j < num_samples_R, other=_NO_TOKEN)
        proposed_R = j + 1 < num_samples_R
        right_R = proposed_R & (tl.load(history_R + length_R + j, mask=proposed_R, other=_NO_TOKEN) == sampled_R)
        stopped_R = row_R < 0
        for i in tl.static_range(_MAX_STOP_TOKENS):
            stopped_R |= tl.load(line_R + _STOP_TOKENS + i, mask=inside_R, other=_NO_TOKEN) == sampled_R
        appends_R = counts_R & (sampled_R != _NO_TOKEN)
        end_R = tl.where(length_R + j + 1 >= max_length_R, _FINISHED_LENGTH, _RUNNING)
        end_R = tl.where(stopped_R, _FINISHED_STOP, end_R)
        end_R = tl.where(appends_R, end_R, _FINISHED_ERROR)
        finish_R = tl.where(counts_R, end_R, finish_R)
        last_token_R = tl.where(appends_R, sampled_R, last_token_R)
        num_counting_R += counts_R.to(tl.int32)
        num_tokens_R += appends_R.to(tl.int32)
        num_accepted_R += (counts_R & right_R).to(tl.int32)
        tl.store(output_R + _OUT_TOKENS + j, sampled_R, mask=inside_R)
        counts_R &= right_R & (end_R == _RUNNING)

    # A value may be loaded by several threads and is stored by one: all must have read before any writes.
    tl.debug_barrier()
    ran_R = query_end_R > query_start_R
    emits_R = num_counting_R > 0
    # The tokens before the last are the proposals that lie there already.
    tl.store(history_R + length_R + num_tokens_R - 1, last_token_R, mask=num_tokens_R > 0)
    tl.store(line_R + _LENGTH, length_R + num_tokens_R, mask=ran_R)
    tl.store(line_R + _COMPUTED, tl.where(emits_R, length_R + num_counting_R - 1, kv_len_R), mask=ran_R)
    tl.store(line_R + _ACTIVE, zero_R, mask=finish_R != _RUNNING)
    tl.store(line_R + _NUM_DRAFTS, zero_R, mask=inside_R)

    tl.store(output_R + _OUT_SLOT, slot_R, mask=inside_R)
    tl.store(output_R + _OUT_GENERATION, generation_R, mask=inside_R)
    tl.store(output_R + _OUT_FINISH, finish_R, mask=inside_R)
    tl.store(output_R + _OUT_NUM_TOKENS, num_tokens_R, mask=inside_R)
    tl.store(output_R + _OUT_NUM_VERIFIED, tl.maximum(num_samples_R - 1, 0), mask=inside_R)
    tl.store(output_R + _OUT_NUM_ACCEPTED, num_accepted_R, mask=inside_R)
    tl.store(output_R + _OUT_FIRST_SAMPLE, first_sample_R, mask=inside_R)
    tl.store(output_R + _OUT_NUM_DRAFTS, zero_R, mask=inside_R)
    tl.store(counter_ptr, (step + 1) % DEPTH)


def commit(
    lines: Tensor,
    tokens: Tensor,
    counter: Tensor,
    ring: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    sample_start: Tensor,
    sampled: Tensor,
    num_drafts: int,
    fault: Tensor | None = None,
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
        sample_start,
        sampled,
        counter if fault is None else fault,
        row_slot.shape[0],
        tokens.stride(0),
        ring.shape[0],
        ring.stride(0),
        K=num_drafts,
        BLOCK_R=block_rows,
        OBEYS_FAULT=fault is not None,
        num_warps=max(1, block_rows // 32),
    )
