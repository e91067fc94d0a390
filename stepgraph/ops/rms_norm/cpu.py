"""`rms_norm` on the CPU: our own kernel for float32, else the reference."""

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.rms_norm import reference

_rms_norm = native.declare("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.rms_norm.rms_norm`."""
    x = x.contiguous()
    if x.dtype == weight.dtype == torch.float32 and x.shape[1] % native.LANES == 0 and native.available():
        return _rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor | None = None) -> None:
    """See `stepgraph.ops.rms_norm.rms_norm_add`."""
    residual.add_(rms_norm(x, weight, eps))
    if scale is not None:
        residual.mul_(scale)
