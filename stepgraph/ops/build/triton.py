"""Triton kernels of `build_step`: one program lays out the rows, then one program per block of tokens fills them in.

Two launches, because the tokens need every row's start and the block-table deltas that the first kernel applied.

Shapes: T tokens, R rows, S samples, E deltas.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.launched import launched

BLOCK_TOKENS = 256
"""Tokens per program."""

_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_COMPUTED = tl.constexpr(line.COMPUTED)
_ACTIVE = tl.constexpr(line.ACTIVE)
_NUM_DRAFTS = tl.constexpr(line.NUM_DRAFTS)
_ROW_WIDTH = tl.constexpr(line.ROW_WIDTH)
_DELTA_WIDTH = tl.constexpr(line.DELTA_WIDTH)

_BLOCK_DELTAS = tl.constexpr(256)


@launched
@triton.jit(do_not_specialize=["R", "E"])
def _rows_kernel(
    plan_ptr,
    lines_ptr,
    block_table_ptr,
    row_slot_ptr,
    query_start_ptr,
    kv_len_ptr,
    sample_start_ptr,
    R,
    E,
    MAX_BLOCKS,
    BLOCK_R: tl.constexpr,
):
    """A single program: block-table deltas, and the prefix sum over all rows."""
    deltas_ptr = plan_ptr + _ROW_WIDTH * R
    start = 0
    while start < E:
        delta_E = start + tl.arange(0, _BLOCK_DELTAS)
        inside_E = delta_E < E
        slot_E = tl.load(deltas_ptr + delta_E * _DELTA_WIDTH, mask=inside_E, other=0)
        index_E = tl.load(deltas_ptr + delta_E * _DELTA_WIDTH + 1, mask=inside_E, other=0)
        block_E = tl.load(deltas_ptr + delta_E * _DELTA_WIDTH + 2, mask=inside_E, other=0)
        tl.store(block_table_ptr + slot_E.to(tl.int64) * MAX_BLOCKS + index_E, block_E, mask=inside_E)
        start += _BLOCK_DELTAS

    row_R = tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    slot_R = tl.load(plan_ptr + row_R * _ROW_WIDTH, mask=inside_R, other=0)
    bound_R = tl.load(plan_ptr + row_R * _ROW_WIDTH + 1, mask=inside_R, other=0)
    line_R = lines_ptr + slot_R * _LINE_WIDTH
    length_R = tl.load(line_R + _LENGTH, mask=inside_R, other=0)
    computed_R = tl.load(line_R + _COMPUTED, mask=inside_R, other=0)
    active_R = tl.load(line_R + _ACTIVE, mask=inside_R, other=0)
    drafts_R = tl.load(line_R + _NUM_DRAFTS, mask=inside_R, other=0)
    query_len_R = tl.maximum(tl.minimum(bound_R, length_R + drafts_R - computed_R), 0) * active_R
    query_end_R = tl.cumsum(query_len_R, 0)
    kv_len_R = computed_R + query_len_R
    num_samples_R = tl.where(query_len_R > 0, tl.maximum(kv_len_R - length_R + 1, 0), 0)

    tl.store(row_slot_ptr + row_R, slot_R, mask=inside_R)
    tl.store(query_start_ptr, 0)
    tl.store(query_start_ptr + 1 + row_R, query_end_R, mask=inside_R)
    tl.store(kv_len_ptr + row_R, kv_len_R, mask=inside_R)
    tl.store(sample_start_ptr, 0)
    tl.store(sample_start_ptr + 1 + row_R, tl.cumsum(num_samples_R, 0), mask=inside_R)


@triton.jit
def row_of(query_start_ptr, token_T, real_T, R, SEARCH_STEPS: tl.constexpr):
    """The first row that ends after each real token; empty rows end where they start and are passed over. SEARCH_STEPS halvings
    reduce 0 … R to one row."""
    low_T = tl.zeros_like(token_T)
    high_T = low_T + R
    for _ in tl.static_range(SEARCH_STEPS):
        middle_T = (low_T + high_T) // 2
        searching_T = real_T & (low_T < high_T)
        before_T = tl.load(query_start_ptr + 1 + middle_T, mask=searching_T, other=0) <= token_T
        low_T = tl.where(searching_T & before_T, middle_T + 1, low_T)
        high_T = tl.where(searching_T & (before_T == 0), middle_T, high_T)
    return low_T


@launched
@triton.jit(do_not_specialize=["T", "R", "S"])
def _tokens_kernel(
    lines_ptr,
    tokens_ptr,
    block_table_ptr,
    row_slot_ptr,
    query_start_ptr,
    sample_start_ptr,
    token_ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    sample_slot_ptr,
    sample_offset_ptr,
    sample_index_ptr,
    T,
    R,
    S,
    MAX_LEN,
    MAX_BLOCKS,
    BLOCK_SIZE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # halvings that reduce 0 … R to one row
    BLOCK_T: tl.constexpr,
):
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T = token_T < T
    real_T = token_T < tl.load(query_start_ptr + R)

    row_T = row_of(query_start_ptr, token_T, real_T, R, SEARCH_STEPS)

    slot_T = tl.load(row_slot_ptr + row_T, mask=real_T, other=0).to(tl.int64)
    start_T = tl.load(query_start_ptr + row_T, mask=real_T, other=0)
    computed_T = tl.load(lines_ptr + slot_T * _LINE_WIDTH + _COMPUTED, mask=real_T, other=0)
    position_T = tl.where(real_T, computed_T + token_T - start_T, 0)
    token_id_T = tl.load(tokens_ptr + slot_T * MAX_LEN + position_T, mask=inside_T, other=0)
    block_T = tl.load(block_table_ptr + slot_T * MAX_BLOCKS + position_T // BLOCK_SIZE, mask=inside_T, other=0)

    tl.store(token_ids_ptr + token_T, token_id_T, mask=inside_T)
    tl.store(positions_ptr + token_T, position_T, mask=inside_T)
    tl.store(kv_slots_ptr + token_T, block_T * BLOCK_SIZE + position_T % BLOCK_SIZE, mask=inside_T)

    length_T = tl.load(lines_ptr + slot_T * _LINE_WIDTH + _LENGTH, mask=real_T, other=0)
    offset_T = position_T - length_T + 1
    samples_T = real_T & (offset_T >= 0)
    sample_T = tl.load(sample_start_ptr + row_T, mask=samples_T, other=0) + offset_T
    tl.store(sample_slot_ptr + sample_T, slot_T.to(tl.int32), mask=samples_T)
    tl.store(sample_offset_ptr + sample_T, offset_T, mask=samples_T)
    tl.store(sample_index_ptr + sample_T, token_T, mask=samples_T)
    padding_T = (token_T < S) & (
        token_T >= tl.load(sample_start_ptr + R)
    )  # as many programs as tokens, of which S are fewer
    zero_T = tl.zeros_like(token_T)
    tl.store(sample_slot_ptr + token_T, zero_T, mask=padding_T)
    tl.store(sample_offset_ptr + token_T, zero_T, mask=padding_T)
    tl.store(sample_index_ptr + token_T, zero_T, mask=padding_T)


def build_step(
    plan: Tensor,
    lines: Tensor,
    tokens: Tensor,
    block_table: Tensor,
    num_tokens: int,
    num_rows: int,
    num_samples: int,
    num_deltas: int,
    block_size: int,
) -> tuple[Tensor, ...]:
    """See `stepgraph.ops.build.build_step`."""
    T, R, S = num_tokens, num_rows, num_samples
    (
        token_ids,
        positions,
        kv_slots,
        row_slot,
        query_start,
        kv_len,
        sample_start,
        sample_slot,
        sample_offset,
        sample_index,
    ) = (plan.new_empty(size) for size in (T, T, T, R, R + 1, R, R + 1, S, S, S))
    block_rows = row_capacity(R)
    _rows_kernel[(1,)](
        plan,
        lines,
        block_table,
        row_slot,
        query_start,
        kv_len,
        sample_start,
        R,
        num_deltas,
        block_table.stride(0),
        BLOCK_R=block_rows,
        num_warps=max(4, block_rows // 32),
    )
    _tokens_kernel[(triton.cdiv(T, BLOCK_TOKENS),)](
        lines,
        tokens,
        block_table,
        row_slot,
        query_start,
        sample_start,
        token_ids,
        positions,
        kv_slots,
        sample_slot,
        sample_offset,
        sample_index,
        T,
        R,
        S,
        tokens.stride(0),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        SEARCH_STEPS=block_rows.bit_length(),
        BLOCK_T=BLOCK_TOKENS,
    )
    return (
        token_ids,
        positions,
        kv_slots,
        row_slot,
        query_start,
        kv_len,
        sample_start,
        sample_slot,
        sample_offset,
        sample_index,
    )
