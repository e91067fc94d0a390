"""Triton kernel of `swiglu` and `geglu`: one program per row and block of columns."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

BLOCK = 1024
"""Columns per program: 128 threads load 16 bytes each of a 16-bit dtype."""


@triton.jit
def gated(gate, up, GELU: tl.constexpr, LIMIT: tl.constexpr = 0.0, ALPHA: tl.constexpr = 1.0):
    """activation(gate) · up, in their dtype; with a limit, see `stepgraph.ops.swiglu.Clamp`."""
    gate32 = gate.to(tl.float32)
    if LIMIT > 0:
        gate32 = tl.minimum(gate32, LIMIT)
        up32 = tl.maximum(tl.minimum(up.to(tl.float32), LIMIT), -LIMIT)
        return ((up32 + 1.0) * (gate32 / (1.0 + tl.exp(-ALPHA * gate32)))).to(gate.dtype)
    slope = gate32
    if GELU:  # (1 + tanh(u)) / 2 is the sigmoid of 2u; the factor is 2 · sqrt(2 / pi)
        slope = 1.5957691216057308 * (gate32 + 0.044715 * gate32 * gate32 * gate32)
    activated = (gate32 / (1.0 + tl.exp(-slope))).to(gate.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@launched
@triton.jit
def _gated_kernel(
    gate_ptr,
    up_ptr,  # None: behind the gate, in its rows
    out_ptr,
    gate_stride,
    up_stride,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_column = gate_ptr + row * gate_stride + column
    up_column = gate_column + WIDTH if up_ptr is None else up_ptr + row * up_stride + column
    wait_for_previous()
    gate = tl.load(gate_column, mask=inside, other=0.0)
    up = tl.load(up_column, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, gated(gate, up, GELU), mask=inside)


def _launch(gate: Tensor, up: Tensor | None, gelu: bool) -> Tensor:
    rows, width = gate.shape[0], gate.shape[1] // 2 if up is None else up.shape[1]
    out = gate.new_empty(rows, width)
    strides = gate.stride(0), 0 if up is None else up.stride(0)
    grid = (rows, triton.cdiv(width, BLOCK))
    _gated_kernel[grid](gate, up, out, *strides, GELU=gelu, WIDTH=width, BLOCK=BLOCK, num_warps=4, **LAUNCH)
    return out


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `stepgraph.ops.swiglu.swiglu`."""
    return _launch(gate, up, gelu=False)


def geglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `stepgraph.ops.swiglu.geglu`."""
    return _launch(gate, up, gelu=True)
