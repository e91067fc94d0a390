"""Triton kernel of `rms_norm` and `rms_norm_add`: one program per row, the whole row in registers.

Arithmetic is in float32 whatever the dtype; a product of two 16-bit numbers is exact there, so rounding it once more to
the dtype gives what the reference's 16-bit product gives.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched


@triton.jit
def scale_rounded(x, inverse_rms, weight):
    """`x · inverse_rms` rounded to the weight's dtype, times `weight` rounded again: float32 [...] -> weight dtype."""
    dtype = weight.dtype
    return ((x * inverse_rms).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def normalise(x, weight, eps, WIDTH: tl.constexpr):
    """RMS norm of one row, [BLOCK] float32 with zeros beyond WIDTH, in the weight's dtype."""
    return scale_rounded(x, tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps), weight)


@launched
@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,  # None: the sum as it is
    out_ptr,
    row_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    wait_for_previous()
    x = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    out_column = out_ptr + row * WIDTH + column
    normed = normalise(x, weight, eps, WIDTH).to(out_ptr.dtype.element_ty)
    if ADD:
        residual = tl.load(out_column, mask=inside, other=0.0)
        normed = (residual.to(tl.float32) + normed.to(tl.float32)).to(out_ptr.dtype.element_ty)
        if scale_ptr is not None:
            normed = (normed.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_column, normed, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.rms_norm.rms_norm`."""
    out = x.new_empty(x.shape)
    _launch(x, weight, eps, out, None, add=False)
    return out


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor | None = None) -> None:
    """See `stepgraph.ops.rms_norm.rms_norm_add`."""
    _launch(x, weight, eps, residual, scale, add=True)


def _launch(x: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor | None, *, add: bool) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // 256, 1), 16)
    _norm_kernel[(rows,)](
        x, weight, scale, out, x.stride(0), eps, WIDTH=width, BLOCK=block, ADD=add, num_warps=num_warps, **LAUNCH
    )
