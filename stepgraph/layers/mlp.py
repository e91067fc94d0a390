"""Gated feed-forward layer. Shapes: T tokens, E hidden size, M intermediate size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.ops import geglu, swiglu

Activation = Literal["silu", "gelu_tanh"]

_GATED = {"silu": swiglu, "gelu_tanh": geglu}


class MLP(nn.Module):
    """`down(activation(gate(x)) · up(x))`. May run inside a graph.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
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
        self.gated = _GATED[activation]

    def forward(self, x_TE: Tensor) -> Tensor:
        """Return [T, E], dtype of `x_TE`."""
        return self.down_proj(self.gated(self.gate_up_proj(x_TE)))
