"""Gated feed-forward layer. Shapes: T tokens, E hidden size, M intermediate size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stepgraph.layers.formats import End
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm

Activation = Literal["silu", "gelu_tanh"]


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
        self._end = End.GEGLU if activation == "gelu_tanh" else End.SWIGLU

    def hidden(self, norm: RMSNorm, x_TE: Tensor) -> Tensor:
        """Return `activation(gate(norm(x))) · up(norm(x))`: [T, M], dtype of `x_TE`. What is left is `down_proj`."""
        return self.gate_up_proj.product(x_TE, norm=norm, end=self._end)
