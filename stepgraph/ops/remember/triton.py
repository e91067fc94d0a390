"""Triton kernel of `remember`: a single program over all rows, as every answer starts where the one before it ends.

Few steps end a request, and few end several: the others cost one look at `finished`.

Shapes: R rows, B tokens of a block.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.launched import launched
from stepgraph.ops.remember.reference import SHARE

_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_PROMPT_LENGTH = tl.constexpr(line.PROMPT_LENGTH)
_MEMORY_KEY = tl.constexpr(line.MEMORY_KEY)
_NO_TOKEN = tl.constexpr(line.NO_TOKEN)
_BLOCK = tl.constexpr(2048)


@launched
@triton.jit(do_not_specialize=["R", "M", "MAX_LEN", "LONGEST"])
def _remember_kernel(
    memory_ptr,
    keys_ptr,
    cursor_ptr,
    lines_ptr,
    tokens_ptr,
    row_slot_ptr,
    finished_ptr,
    R,
    M,
    MAX_LEN,
    LONGEST,
    BLOCK_R: tl.constexpr,
):
    row_R = tl.arange(0, BLOCK_R)
    finished_R = tl.load(finished_ptr + row_R, mask=row_R < R, other=0) != 0
    row = tl.min(tl.where(finished_R, row_R, BLOCK_R), 0)
    if row < BLOCK_R:
        cursor = tl.load(cursor_ptr)
        while row < BLOCK_R:
            slot = tl.load(row_slot_ptr + row)
            line_ptr = lines_ptr + slot * _LINE_WIDTH
            end = tl.load(line_ptr + _LENGTH)
            start = tl.maximum(tl.load(line_ptr + _PROMPT_LENGTH), end - LONGEST)
            key_low = tl.load(line_ptr + _MEMORY_KEY)
            key_high = tl.load(line_ptr + _MEMORY_KEY + 1)
            history_ptr = tokens_ptr + slot.to(tl.int64) * MAX_LEN
            if start < end:
                for first in range(start, end + 1, _BLOCK):
                    index_B = first + tl.arange(0, _BLOCK)
                    token_B = tl.load(history_ptr + index_B, mask=index_B < end, other=_NO_TOKEN)
                    place_B = (cursor + index_B - start) % M
                    tl.store(memory_ptr + place_B, token_B, mask=index_B <= end)
                    tl.store(keys_ptr + 2 * place_B, key_low, mask=index_B <= end)
                    tl.store(keys_ptr + 2 * place_B + 1, key_high, mask=index_B <= end)
                cursor = (cursor + end - start + 1) % M
                tl.debug_barrier()  # the next answer may overwrite this one: in this order
            row = tl.min(tl.where(finished_R & (row_R > row), row_R, BLOCK_R), 0)
        tl.store(cursor_ptr, cursor)


def remember(
    memory: Tensor, keys: Tensor, cursor: Tensor, lines: Tensor, tokens: Tensor, row_slot: Tensor, finished: Tensor
) -> None:
    """See `stepgraph.ops.remember.remember`."""
    num_rows, memory_len = row_slot.shape[0], memory.shape[0]
    _remember_kernel[(1,)](
        memory,
        keys,
        cursor,
        lines,
        tokens,
        row_slot,
        finished,
        num_rows,
        memory_len,
        tokens.stride(0),
        memory_len // SHARE,
        BLOCK_R=row_capacity(num_rows),
        num_warps=8,
    )
