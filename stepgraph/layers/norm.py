"""RMS normalisation of the residual stream. Shapes: T tokens, E width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepgraph.ops import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """See `stepgraph.ops.rms_norm`. May run inside a graph."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device), False)
        self.eps = eps

    def forward(self, x_TE: Tensor, residual_TE: Tensor | None = None) -> Tensor:
        """Normalise `x_TE`; or, given the residual stream, add `x_TE` to it in place and normalise the sum."""
        if residual_TE is None:
            return rms_norm(x_TE, self.weight, self.eps)
        return add_rms_norm(x_TE, residual_TE, self.weight, self.eps)
