"""RMS normalisation of the residual stream. Shapes: T tokens, E width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepgraph.ops import rms_norm


class RMSNorm(nn.Module):
    """See `stepgraph.ops.rms_norm`. May run inside a graph."""

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        weight_offset: float = 0.0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        width: E.
        eps: added to the mean square.
        weight_offset: what the checkpoint's weights lack (1 in Gemma). `weight` holds the sum, then in float32, where it
            loses nothing; so the result is rounded once, as Gemma does.
        dtype: of the activations.
        device: of the weight.
        """
        super().__init__()
        weight = torch.empty(width, dtype=torch.float32 if weight_offset else dtype, device=device)
        self.weight = nn.Parameter(weight, False)
        self.eps, self.weight_offset = eps, weight_offset

    def forward(self, x_TE: Tensor) -> Tensor:
        """Return [T, E] normalised, dtype of `x_TE`."""
        return rms_norm(x_TE, self.weight, self.eps)
