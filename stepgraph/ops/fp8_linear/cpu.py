"""`fp8_linear` on the CPU: widened at every call, so slower than weights of 32 bits. For trying it without a GPU."""

import torch
from torch import Tensor

from stepgraph.ops.fp8_linear import reference
from stepgraph.ops.linear.cpu import linear_by_row
from stepgraph.ops.rms_norm.reference import rms_norm
from stepgraph.ops.swiglu.reference import geglu, swiglu


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, by_row: bool) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_linear`."""
    if not by_row:
        return reference.fp8_linear(x, weight, scale, bias)
    out = torch.empty(x.shape[0], weight.shape[0])
    linear_by_row(x.float(), reference.dequantize(weight, scale), None if bias is None else bias.float(), out)
    return out.to(x.dtype)


def fp8_linear_add(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float
) -> None:
    """See `stepgraph.ops.fp8_linear.fp8_linear_add`."""
    residual.add_(reference.fp8_linear(x, weight, scale, bias).float() * multiplier)


def fp8_gated_linear(x: Tensor, weight: Tensor, scale: Tensor, gelu: bool) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_gated_linear`."""
    return (geglu if gelu else swiglu)(reference.fp8_linear(x, weight, scale, None))


def fp8_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_norm_linear`."""
    return reference.fp8_linear(rms_norm(x, norm_weight, eps), weight, scale, bias)


def fp8_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor, gelu: bool
) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_norm_gated_linear`."""
    return fp8_gated_linear(rms_norm(x, norm_weight, eps), weight, scale, gelu)
