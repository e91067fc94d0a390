"""Triton kernel of `copy_blocks`: a few programs take turns at parts of blocks, in words as wide as all addresses allow.

A program has a whole part of `_PART_BYTES` under way before it stores anything: between devices it is the bytes under way that
make the speed, and a few programs are to have many of them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.launched import launched

_PART_BYTES = 32 << 10
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""By their bytes. A thread loads two neighbouring ones of 8 bytes at once."""


@launched
@triton.jit(do_not_specialize=["num_blocks"])
def _copy_blocks_kernel(
    source_ptr,
    source_blocks_ptr,
    target_ptr,
    target_blocks_ptr,
    num_blocks,
    source_block_stride,
    source_row_stride,
    target_block_stride,
    target_row_stride,
    ROWS: tl.constexpr,  # of a block
    WIDTH: tl.constexpr,  # words of a row
    PART: tl.constexpr,  # words
):
    PARTS: tl.constexpr = (ROWS * WIDTH + PART - 1) // PART
    for item in range(tl.program_id(0), num_blocks * PARTS, tl.num_programs(0)):
        pair = item // PARTS
        source_block = tl.load(source_blocks_ptr + pair).to(tl.int64)
        target_block = tl.load(target_blocks_ptr + pair).to(tl.int64)
        word = item % PARTS * PART + tl.arange(0, PART)
        row, column, inside = word // WIDTH, word % WIDTH, word < ROWS * WIDTH
        source = source_ptr + source_block * source_block_stride + row * source_row_stride + column
        target = target_ptr + target_block * target_block_stride + row * target_row_stride + column
        tl.store(target, tl.load(source, mask=inside), mask=inside)


def copy_blocks(
    source: Tensor, source_blocks: Tensor, target: Tensor, target_blocks: Tensor, num_programs: int
) -> None:
    """See `stepgraph.ops.copy_blocks.copy_blocks`."""
    source, target = _as_words(source, target)
    rows = 1 if source[0].is_contiguous() and target[0].is_contiguous() else source.shape[1]
    width = math.prod(source.shape[1:]) // rows
    _copy_blocks_kernel[(num_programs,)](
        source,
        source_blocks,
        target,
        target_blocks,
        source_blocks.shape[0],
        *source.stride()[:2],
        *target.stride()[:2],
        ROWS=rows,
        WIDTH=width,
        PART=min(_PART_BYTES // source.itemsize, triton.next_power_of_2(rows * width)),
        num_warps=16,
    )


def _as_words(*tensors: Tensor) -> list[Tensor]:
    """The tensors, in numbers as wide as their addresses, strides and entries are all multiples of."""
    bytes_of = [tensor.view(torch.uint8) for tensor in tensors]
    widths = [n for t in bytes_of for n in (t.data_ptr(), *t.stride()[:-1], t.shape[-1])]
    return [tensor.view(_WORDS[math.gcd(8, *widths)]) for tensor in bytes_of]
