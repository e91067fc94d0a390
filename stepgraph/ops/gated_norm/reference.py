"""Plain torch definition of `gated_norm`; also its CPU kernel."""

import torch
from torch import Tensor


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.gated_norm.gated_norm`."""
    D = weight.shape[0]
    x_THD, gate_THD = x.unflatten(1, (-1, D)).float(), gate.unflatten(1, (-1, D)).float()
    normalised_THD = x_THD * torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normalised_THD * (gate_THD / (1 + torch.exp(-gate_THD)))).flatten(1).to(x.dtype)
