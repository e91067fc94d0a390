"""`four_bit_linear` on the CPU: dequantised at every call, so slower than weights of 32 bits. For trying it without a GPU."""

import torch
from torch import Tensor

from stepgraph.ops.four_bit_linear import reference
from stepgraph.ops.four_bit_linear.reference import FourBitWeight
from stepgraph.ops.linear.cpu import linear_by_row
from stepgraph.ops.rms_norm.reference import rms_norm
from stepgraph.ops.swiglu.reference import geglu, swiglu


def four_bit_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    bias: Tensor | None,
    by_row: bool,
) -> Tensor:
    """See `stepgraph.ops.four_bit_linear.four_bit_linear`."""
    weight = FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1)
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    if not by_row:
        return reference.four_bit_linear(x, weight, bias)
    out, values_NK = torch.empty(x.shape[0], codes.shape[0]), reference.dequantize(weight, x.shape[1])
    linear_by_row(x.float(), values_NK, None if bias is None else bias.float(), out)
    return out.to(x.dtype)


def four_bit_linear_add(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    bias: Tensor | None,
    residual: Tensor,
    multiplier: float,
) -> None:
    """See `stepgraph.ops.four_bit_linear.four_bit_linear_add`."""
    weight = FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1)
    residual.add_(reference.four_bit_linear(x, weight, bias).float() * multiplier)


def four_bit_gated_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    gelu: bool,
) -> Tensor:
    """See `stepgraph.ops.four_bit_linear.four_bit_gated_linear`."""
    weight = codes, scale, zero, factor, group_size, is_e2m1
    return (geglu if gelu else swiglu)(four_bit_linear(x, norm_weight, eps, *weight, None, False))
