"""Experts of formats that keep numbers.

Shapes: T tokens, P pairs of a token and an expert, N experts, E hidden size, M width of an expert, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.layers.formats.base import End, WeightFormat, Weights
from stepgraph.ops.swiglu import Clamp


class NumberFormat(WeightFormat):
    """A format of numbers, "weight", and of their "scale" if they have one: `ops.gated_experts` and `ops.sum_experts` take it."""

    deterministic: bool
    """Whether a token's result depends, bit for bit, on that token only."""

    def mixture_operands(self, weights: Weights) -> tuple[Tensor, Tensor | None] | None:
        """See `WeightFormat.mixture_operands`."""
        return None if self.deterministic else (weights["weight"], weights.get("scale"))

    def gated_experts(
        self, weights: Weights, x_TE: Tensor, work: ops.ExpertWork, end: End, clamp: Clamp | None = None
    ) -> Tensor:
        """See `WeightFormat.gated_experts`."""
        return ops.gated_experts(
            x_TE,
            weights["weight"],
            weights.get("scale"),
            work,
            gelu=end is End.GEGLU,
            by_row=self.deterministic,
            bias=weights.get("bias"),
            clamp=clamp,
            gated=end is not End.RELU2,
        )

    def sum_experts(
        self,
        weights: Weights,
        hidden_PM: Tensor,
        work: ops.ExpertWork,
        shape: torch.Size,
        add_to: Tensor | None,
        multiplier: float,
    ) -> Tensor:
        """See `WeightFormat.sum_experts`."""
        out = hidden_PM.new_empty(shape) if add_to is None else add_to
        ops.sum_experts(
            hidden_PM,
            weights["weight"],
            weights.get("scale"),
            work,
            out,
            add=add_to is not None,
            multiplier=multiplier,
            by_row=self.deterministic,
            bias=weights.get("bias"),
        )
        return out
