"""Triton kernel of `group_slots`: one program per block of tokens and group, one launch per size of blocks.

Shapes: T tokens, R rows, S slots.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.build.triton import row_of
from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.group_slots.reference import runs
from stepgraph.ops.launched import launched

BLOCK_TOKENS = 256
"""Tokens per program."""


@launched
@triton.jit(do_not_specialize=["T", "R", "S"])
def _group_slots_kernel(
    block_table_ptr,
    row_slot_ptr,
    query_start_ptr,
    positions_ptr,
    kv_slots_ptr,
    T,
    R,
    S,
    MAX_BLOCKS,
    FIRST: tl.constexpr,  # of the launch's groups
    BLOCK_SIZE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # halvings that reduce 0 … R to one row
    BLOCK_T: tl.constexpr,
):
    other = FIRST + tl.program_id(1)  # group, the first not counted
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T = token_T < T
    real_T = token_T < tl.load(query_start_ptr + R)
    row_T = row_of(query_start_ptr, token_T, real_T, R, SEARCH_STEPS)
    slot_T = tl.load(row_slot_ptr + row_T, mask=real_T, other=0).to(tl.int64)
    position_T = tl.load(positions_ptr + token_T, mask=inside_T, other=0)
    line_T = ((other + 1) * S + slot_T) * MAX_BLOCKS
    block_T = tl.load(block_table_ptr + line_T + position_T // BLOCK_SIZE, mask=inside_T, other=0)
    tl.store(kv_slots_ptr + other * T + token_T, block_T * BLOCK_SIZE + position_T % BLOCK_SIZE, mask=inside_T)


def group_slots(
    block_table: Tensor, row_slot: Tensor, query_start: Tensor, positions: Tensor, block_sizes: Sequence[int]
) -> Tensor:
    """See `stepgraph.ops.group_slots.group_slots`."""
    T, R = positions.shape[0], row_slot.shape[0]
    kv_slots = positions.new_empty(len(block_sizes) - 1, T)
    for run, size in runs(block_sizes):
        _group_slots_kernel[(triton.cdiv(T, BLOCK_TOKENS), run.stop - run.start)](
            block_table,
            row_slot,
            query_start,
            positions,
            kv_slots,
            T,
            R,
            block_table.shape[0] // len(block_sizes),
            block_table.stride(0),
            FIRST=run.start,
            BLOCK_SIZE=size,
            SEARCH_STEPS=row_capacity(R).bit_length(),
            BLOCK_T=BLOCK_TOKENS,
        )
    return kv_slots
