"""Weights as the numbers that they are.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph import ops
from stepgraph.layers.formats.base import End, ParameterSpec, Weights
from stepgraph.layers.formats.number_format import NumberFormat
from stepgraph.layers.norm import RMSNorm


@dataclass(frozen=True)
class Plain(NumberFormat):
    """[O, I] in the dtype of the activations."""

    deterministic: bool = False

    def parameters(self, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, ParameterSpec]:
        """See `WeightFormat.parameters`."""
        return {"weight": ParameterSpec((outputs, inputs), dtype)}

    def fused_product(
        self, weights: Weights, x_TI: Tensor, norm: RMSNorm | None, end: End, out: Tensor | None, multiplier: float
    ) -> Tensor | None:
        """See `WeightFormat.fused_product`."""
        if self.deterministic:
            return None
        weight, bias = weights["weight"], weights.get("bias")
        if norm is None and end is End.ADD and out is not None:
            ops.linear_add(x_TI, weight, bias, out, multiplier)
            return out
        if norm is not None and end is End.STORE and out is None:
            return ops.norm_linear(x_TI, norm.weight, norm.eps, weight, bias)
        if end in (End.SWIGLU, End.GEGLU) and bias is None:
            if norm is None:
                return ops.gated_linear(x_TI, weight, gelu=end is End.GEGLU)
            return ops.norm_gated_linear(x_TI, norm.weight, norm.eps, weight, gelu=end is End.GEGLU)
        return None

    def plain_product(self, weights: Weights, x_TI: Tensor, out: Tensor | None) -> Tensor:
        """See `WeightFormat.plain_product`."""
        product = ops.linear_by_row if self.deterministic else ops.linear
        return product(x_TI, weights["weight"], weights.get("bias"), out)

    def rows(self, weights: Weights, index_T: Tensor) -> Tensor:
        """See `WeightFormat.rows`."""
        return F.embedding(index_T, weights["weight"])

    def values(self, weights: Weights, inputs: int) -> Tensor:
        """See `WeightFormat.values`."""
        return weights["weight"]
