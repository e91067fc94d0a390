"""Triton kernel of `swiglu`: one program per row and block of columns."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns per program: 128 threads load 16 bytes each of a 16-bit dtype."""


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_ptr = gate_up_ptr + row * (2 * WIDTH) + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0)
    up = tl.load(gate_ptr + WIDTH, mask=inside, other=0.0).to(tl.float32)
    gate32 = gate.to(tl.float32)
    silu = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype)
    tl.store(out_ptr + row * WIDTH + column, (silu.to(tl.float32) * up).to(gate.dtype), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `stepgraph.ops.swiglu.swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _swiglu_kernel[(rows, triton.cdiv(width, BLOCK))](gate_up, out, WIDTH=width, BLOCK=BLOCK, num_warps=4)
    return out
