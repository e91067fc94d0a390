"""Plain torch definition of `rms_norm`, also its CPU kernel, and of `rms_norm_add`."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.rms_norm.rms_norm`."""
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor | None = None) -> None:
    """See `stepgraph.ops.rms_norm.rms_norm_add`."""
    residual.add_(rms_norm(x, weight, eps))
    if scale is not None:
        residual.mul_(scale)
