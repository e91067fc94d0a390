"""Triton kernel of `relu2`: one program per row and block of columns."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.swiglu.triton import BLOCK


@triton.jit
def squared_relu(x):
    """max(x, 0)², in its dtype."""
    positive = tl.maximum(x.to(tl.float32), 0.0)
    return (positive * positive).to(x.dtype)


@launched
@triton.jit
def _relu2_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    wait_for_previous()
    x = tl.load(x_ptr + row * WIDTH + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, squared_relu(x), mask=inside)


def relu2(x: Tensor) -> Tensor:
    """See `stepgraph.ops.relu2.relu2`."""
    assert x.is_contiguous()
    rows, width = x.shape
    out = x.new_empty(rows, width)
    _relu2_kernel[(rows, triton.cdiv(width, BLOCK))](x, out, WIDTH=width, BLOCK=BLOCK, num_warps=4, **LAUNCH)
    return out
