"""Triton kernels of `rms_norm` and `add_rms_norm`: one program per row, the whole row in registers.

Arithmetic is in float32 whatever the dtype; a product of two 16-bit numbers is exact there, so rounding it once more to
the dtype gives what the reference's 16-bit product gives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def scale_rounded(x, inverse_rms, weight):
    """`x · inverse_rms` rounded to the weight's dtype, times `weight` rounded again: float32 [...] -> weight dtype."""
    dtype = weight.dtype
    return ((x * inverse_rms).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,  # None: normalise x alone
    weight_ptr,
    out_ptr,
    eps,
    multiplier,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_start = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row_start + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row_start + column, mask=inside, other=0.0)
        total = (residual.to(tl.float32) + x * multiplier).to(residual.dtype)
        tl.store(residual_ptr + row_start + column, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    out = scale_rounded(x, inverse_rms, weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_start + column, out, mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, multiplier: float) -> Tensor:
    rows, width = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // 256, 1), 16)
    _norm_kernel[(rows,)](x, residual, weight, out, eps, multiplier, WIDTH=width, BLOCK=block, num_warps=num_warps)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.rms_norm.rms_norm`."""
    return _launch(x, None, weight, eps, 1.0)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float) -> Tensor:
    """See `stepgraph.ops.rms_norm.add_rms_norm`."""
    return _launch(x, residual, weight, eps, multiplier)
