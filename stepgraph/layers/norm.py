"""RMS normalisation of the residual stream. Shapes: T tokens, E width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepgraph.ops import rms_norm, rms_norm_add


class RMSNorm(nn.Module):
    """See `stepgraph.ops.rms_norm`. May run inside a graph."""

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        weight_offset: float = 0.0,
        weight_factor: float = 1.0,
        rounds_once: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        width: E.
        eps: added to the mean square.
        weight_offset: what the checkpoint's weights lack (1 in Gemma 3). `weight` holds the sum, then in float32, where it
            loses nothing; so the result is rounded once, as Gemma does.
        weight_factor: what they are multiplied by, if they lack nothing.
        rounds_once: `weight` is in float32 whatever it lacks.
        dtype: of the activations.
        device: of the weight.
        """
        super().__init__()
        in_float32 = rounds_once or weight_offset != 0.0
        weight = torch.empty(width, dtype=torch.float32 if in_float32 else dtype, device=device)
        self.weight = nn.Parameter(weight, False)
        self.eps, self.weight_offset, self.weight_factor = eps, weight_offset, weight_factor

    def forward(self, x_TE: Tensor) -> Tensor:
        """Return [T, E] normalised, dtype of `x_TE`."""
        return rms_norm(x_TE, self.weight, self.eps)

    def add_to(self, residual_TE: Tensor, x_TE: Tensor, scale_1: Tensor | None = None) -> None:
        """Add `x_TE`, [T, E], normalised, to the residual stream of its dtype, which is updated, and then multiplied by [1] if
        there is a scale."""
        rms_norm_add(x_TE, self.weight, self.eps, residual_TE, scale_1)
