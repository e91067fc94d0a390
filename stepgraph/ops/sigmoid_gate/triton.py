"""Triton kernel of `sigmoid_gate`: one program per row and block of columns."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

BLOCK = 1024
"""Columns per program: 128 threads load 16 bytes each of a 16-bit dtype."""


@launched
@triton.jit
def _sigmoid_gate_kernel(
    x_ptr, gate_ptr, out_ptr, gate_stride, PER_ENTRY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    wait_for_previous()
    x = tl.load(x_ptr + row * WIDTH + column, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + row * gate_stride + column * PER_ENTRY, mask=inside, other=0.0)
    opened = (1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))).to(x.dtype)
    tl.store(out_ptr + row * WIDTH + column, (x.to(tl.float32) * opened.to(tl.float32)).to(x.dtype), mask=inside)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """See `stepgraph.ops.sigmoid_gate.sigmoid_gate`."""
    rows, width = x.shape
    assert x.is_contiguous()
    assert gate.stride(1) == 1 or gate.shape[1] == 1
    out = x.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, BLOCK))
    _sigmoid_gate_kernel[grid](
        x,
        gate,
        out,
        gate.stride(0),
        PER_ENTRY=int(gate.shape[1] == width),
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=4,
        **LAUNCH,
    )
    return out
