"""Gated feed-forward layer. Shapes: T tokens, E hidden size, M intermediate size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops import geglu, norm_gated_linear, packed_norm_swiglu, swiglu
from stepgraph.ops.packed import BLOCK

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
        self.activation = activation

    def hidden(self, norm: RMSNorm, x_TE: Tensor) -> Tensor:
        """Return `activation(gate(norm(x))) · up(norm(x))`: [T, M], dtype of `x_TE`. What is left is `down_proj`."""
        gate_up, gelu = self.gate_up_proj, self.activation == "gelu_tanh"
        if gate_up.is_plain and gate_up.bias is None:
            return norm_gated_linear(x_TE, norm.weight, norm.eps, gate_up.weight, gelu=gelu)
        if gate_up.is_packed and not gelu and gate_up.out_features % (2 * BLOCK) == 0:
            return packed_norm_swiglu(x_TE, norm.weight, norm.eps, gate_up.weight, exact=gate_up.exact)
        return (geglu if gelu else swiglu)(gate_up.after_norm(norm, x_TE))
