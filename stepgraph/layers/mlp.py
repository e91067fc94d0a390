"""Gated feed-forward layer. Shapes: T tokens, E hidden size, M intermediate size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.ops import swiglu


class MLP(nn.Module):
    """`down(silu(gate(x)) · up(x))`. May run inside a graph.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            bias=bias,
            dtype=dtype,
            device=device,
        )
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x_TE: Tensor) -> Tensor:
        """Return [T, E], dtype of `x_TE`."""
        return self.down_proj(swiglu(self.gate_up_proj(x_TE)))
