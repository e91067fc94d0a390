"""Plain torch definition of `rms_norm` and `add_rms_norm`; also their CPU kernels."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.rms_norm.rms_norm`."""
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float) -> Tensor:
    """See `stepgraph.ops.rms_norm.add_rms_norm`."""
    residual.add_(x if multiplier == 1.0 else x.float() * multiplier)  # `alpha` of 16 bits rounds by position
    return rms_norm(residual, weight, eps)
