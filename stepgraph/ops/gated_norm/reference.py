"""Plain torch definition of `gated_norm`; also its CPU kernel."""

import torch
from torch import Tensor


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, size: int, gate_first: bool) -> Tensor:
    """See `stepgraph.ops.gated_norm.gated_norm`."""
    x_THD, gate_THD = x.unflatten(1, (-1, size)).float(), gate.unflatten(1, (-1, size)).float()
    silu_THD = gate_THD / (1 + torch.exp(-gate_THD))
    if weight is None:
        return (x_THD * silu_THD).flatten(1).to(x.dtype)
    if gate_first:
        x_THD = x_THD * silu_THD
    scale_TH1 = torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + eps)
    normalised_THD = x_THD * scale_TH1 * weight.unflatten(0, (-1, size)).float()
    return (normalised_THD if gate_first else normalised_THD * silu_THD).flatten(1).to(x.dtype)
