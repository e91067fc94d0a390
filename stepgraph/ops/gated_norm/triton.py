"""Triton kernel of `gated_norm`: one program per token and block of heads. Shapes: H heads of a block, D head size."""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

_NUMBERS = 1024
"""Of a program, if heads are not larger."""


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
    NORMALISES: tl.constexpr,
    OF_HEADS: tl.constexpr,  # whether each has weights of its own
    GATE_FIRST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    entry_D = tl.arange(0, BLOCK_D)
    mask_HD = (head_H < HEADS)[:, None] & (entry_D < D)[None, :]
    place_HD = head_H[:, None] * D + entry_D[None, :]
    if NORMALISES:
        weight_HD = weight_ptr + place_HD if OF_HEADS else weight_ptr + entry_D[None, :] + head_H[:, None] * 0
        weight_HD = tl.load(weight_HD, mask=mask_HD, other=0.0).to(tl.float32)
    wait_for_previous()
    x_HD = tl.load(x_ptr + token * (HEADS * D) + place_HD, mask=mask_HD, other=0.0).to(tl.float32)
    gate_HD = tl.load(gate_ptr + token * gate_stride + place_HD, mask=mask_HD, other=0.0).to(tl.float32)
    silu_HD = gate_HD / (1.0 + tl.exp(-gate_HD))
    if GATE_FIRST or not NORMALISES:
        x_HD *= silu_HD
    if NORMALISES:
        scale_H = tl.rsqrt(tl.sum(x_HD * x_HD, axis=1) / D + eps)
        x_HD = x_HD * scale_H[:, None] * weight_HD
        if not GATE_FIRST:
            x_HD *= silu_HD
    tl.store(out_ptr + token * (HEADS * D) + place_HD, x_HD.to(out_ptr.dtype.element_ty), mask=mask_HD)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, size: int, gate_first: bool) -> Tensor:
    """See `stepgraph.ops.gated_norm.gated_norm`."""
    num_tokens, width = x.shape
    assert x.is_contiguous()
    assert gate.stride(1) == 1
    out = x.new_empty(num_tokens, width)
    heads, block_d = width // size, triton.next_power_of_2(size)
    block_h = max(1, min(triton.next_power_of_2(heads), _NUMBERS // block_d))
    _gated_norm_kernel[(num_tokens, triton.cdiv(heads, block_h))](
        x,
        gate,
        x if weight is None else weight,
        out,
        gate.stride(0),
        eps,
        HEADS=heads,
        D=size,
        NORMALISES=weight is not None,
        OF_HEADS=weight is not None and weight.shape[0] > size,
        GATE_FIRST=gate_first,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4 if block_d <= 2 * _NUMBERS else 8,
        **LAUNCH,
    )
    return out
