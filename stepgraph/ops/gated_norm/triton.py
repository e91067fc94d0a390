"""Triton kernel of `gated_norm`: one program per token and block of heads. Shapes: H heads of a block, D head size."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.launched import launched

_NUMBERS = 1024
"""Of a program."""


@launched
@triton.jit
def _gated_norm_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    gate_stride,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    entry_D = tl.arange(0, BLOCK_D)
    mask_HD = (head_H < HEADS)[:, None] & (entry_D < D)[None, :]
    place_HD = head_H[:, None] * D + entry_D[None, :]
    x_HD = tl.load(x_ptr + token * (HEADS * D) + place_HD, mask=mask_HD, other=0.0).to(tl.float32)
    gate_HD = tl.load(gate_ptr + token * gate_stride + place_HD, mask=mask_HD, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + entry_D, mask=entry_D < D, other=0.0).to(tl.float32)
    scale_H = tl.rsqrt(tl.sum(x_HD * x_HD, axis=1) / D + eps)
    out_HD = x_HD * scale_H[:, None] * weight_D[None, :] * (gate_HD / (1.0 + tl.exp(-gate_HD)))
    tl.store(out_ptr + token * (HEADS * D) + place_HD, out_HD.to(out_ptr.dtype.element_ty), mask=mask_HD)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.gated_norm.gated_norm`."""
    (num_tokens, width), head_dim = x.shape, weight.shape[0]
    assert x.is_contiguous()
    assert gate.stride(1) == 1
    out = x.new_empty(num_tokens, width)
    heads, block_d = width // head_dim, triton.next_power_of_2(head_dim)
    block_h = max(1, min(triton.next_power_of_2(heads), _NUMBERS // block_d))
    _gated_norm_kernel[(num_tokens, triton.cdiv(heads, block_h))](
        x,
        gate,
        weight,
        out,
        gate.stride(0),
        eps,
        HEADS=heads,
        D=head_dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out
