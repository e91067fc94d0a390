"""Embeddings that a token has for each layer, beside the one that the first layer takes.

Shapes: T tokens, V vocabulary, E hidden size, L layers, P width of a layer's input, F = L·P.

Source: Gemma Team, "Gemma 3n" (2025), which calls them per-layer embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.layers.embedding import Embedding
from stepgraph.layers.linear import Linear
from stepgraph.layers.mlp import Activation
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.residual import ResidualStream


@dataclass(frozen=True)
class PerLayerSizes:
    """Of the inputs that layers have beside the residual stream."""

    vocab_size: int
    width: int
    """P."""


class PerLayerInputs(nn.Module):
    """What all layers take beside the residual stream: of each token, a row of a table and a projection of its embedding,
    normalised. Every rank has all of it. May run inside a graph."""

    def __init__(
        self,
        sizes: PerLayerSizes,
        num_layers: int,
        hidden_size: int,
        *,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        sizes: V and P.
        num_layers: L.
        hidden_size: E.
        eps: of the norm.
        dtype, device: of the parameters.
        """
        super().__init__()
        self.width, total = sizes.width, num_layers * sizes.width
        self.embedding = Embedding(sizes.vocab_size, total, multiplier=sizes.width**0.5, dtype=dtype, device=device)
        self.projection = Linear(hidden_size, total, dtype=dtype, device=device)
        self.norm = RMSNorm(sizes.width, eps, rounds_once=True, dtype=dtype, device=device)
        self._factor = hidden_size**-0.5

    def forward(self, token_ids_T: Tensor, x_TE: Tensor) -> tuple[Tensor, ...]:
        """The layers' inputs, [T, P] each, which share memory.

        Args:
            token_ids_T: of the tokens.
            x_TE: their embeddings, as the first layer takes them.
        """
        projected_TF = self.projection(x_TE).mul_(self._factor)
        inputs_TF = self.norm(projected_TF.view(-1, self.width)).view(projected_TF.shape)
        return inputs_TF.add_(self.embedding(token_ids_T)).mul_(2**-0.5).split(self.width, dim=1)


class PerLayerGate(nn.Module):
    """What a layer makes of its own input: a gate of the residual stream decides how much of it is added there."""

    def __init__(
        self,
        sizes: PerLayerSizes,
        hidden_size: int,
        *,
        activation: Activation,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        sizes: of the inputs.
        hidden_size: E.
        activation: of the gate.
        eps: of the norm.
        dtype, device: of the parameters.
        """
        super().__init__()
        self.gate = Linear(hidden_size, sizes.width, dtype=dtype, device=device)
        self.projection = Linear(sizes.width, hidden_size, dtype=dtype, device=device)
        self.post_norm = RMSNorm(hidden_size, eps, rounds_once=True, dtype=dtype, device=device)
        self._gated = ops.geglu if activation == "gelu_tanh" else ops.swiglu

    def add_to(self, stream: ResidualStream, input_TP: Tensor, scale_1: Tensor | None = None) -> None:
        """Add it to the residual stream, the same on every rank; `scale_1` as of `ResidualStream.add`. May run inside a graph."""
        gated_TP = self._gated(self.gate(stream.residual_TE), input_TP)
        stream.add_whole(self.projection(gated_TP), self.post_norm, scale_1)
