"""Weights of 8 bits, see `stepgraph.ops.fp8_linear`.

Shapes: T tokens, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.layers.formats.base import End, FormatOptions, ParameterSpec, WeightFormat, Weights
from stepgraph.layers.formats.number_format import NumberFormat
from stepgraph.layers.formats.target import Target
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops.fp8_linear import GROUP_SIZE, dequantize, num_groups, quantize
from stepgraph.parallel.shard import Cut


@dataclass(frozen=True)
class FP8(NumberFormat):
    """E4M3 codes [O, I] with float32 scales [O, G]. Bias and updates of adapters keep their dtype."""

    grouped: bool = False
    """Whether an output has a scale for every `GROUP_SIZE` inputs; else it has one."""
    deterministic: bool = False
    fills_in_place: ClassVar[bool] = False

    @classmethod
    def keeping(cls, encoding: str, inputs: int, options: FormatOptions) -> WeightFormat | None:
        """See `WeightFormat.keeping`. Embedding table and output head become numbers."""
        formats = (cls(grouped, options.deterministic) for grouped in (False, True))
        return next((format for format in formats if options.in_layers and format.encoding == encoding), None)

    @property
    def encoding(self) -> str:
        """Of tensors with such scales, see `CheckpointTensor.quantization`."""
        return f"FP8 in groups of {GROUP_SIZE}" if self.grouped else "FP8"

    @property
    def input_unit(self) -> int:
        """See `WeightFormat.input_unit`."""
        return GROUP_SIZE if self.grouped else 1

    def parameters(self, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, ParameterSpec]:
        """See `WeightFormat.parameters`."""
        groups = num_groups(inputs) if self.grouped else 1
        return {
            "weight": ParameterSpec((outputs, inputs), torch.float8_e4m3fn),
            "scale": ParameterSpec((outputs, groups), torch.float32),
        }

    def targets(self, weights: Weights, inputs: int) -> dict[str, Target]:
        """See `WeightFormat.targets`."""
        others = {name: tensor for name, tensor in weights.items() if name not in ("weight", "scale")}
        target = FP8Target if self.grouped else FP8RowTarget
        return {"weight": target(weights["weight"], weights["scale"], self.encoding), **others}

    def fused_product(
        self, weights: Weights, x_TI: Tensor, norm: RMSNorm | None, end: End, out: Tensor | None, multiplier: float
    ) -> Tensor | None:
        """See `WeightFormat.fused_product`."""
        if self.deterministic:
            return None
        weight, scale, bias = weights["weight"], weights["scale"], weights.get("bias")
        if norm is None and end is End.ADD and out is not None:
            ops.fp8_linear_add(x_TI, weight, scale, bias, out, multiplier)
            return out
        if norm is not None and end is End.STORE and out is None:
            return ops.fp8_norm_linear(x_TI, norm.weight, norm.eps, weight, scale, bias)
        if end in (End.SWIGLU, End.GEGLU) and bias is None:
            if norm is None:
                return ops.fp8_gated_linear(x_TI, weight, scale, gelu=end is End.GEGLU)
            return ops.fp8_norm_gated_linear(x_TI, norm.weight, norm.eps, weight, scale, gelu=end is End.GEGLU)
        return None

    def plain_product(self, weights: Weights, x_TI: Tensor, out: Tensor | None) -> Tensor:
        """See `WeightFormat.plain_product`."""
        assert out is None, "output heads, which have one, are not of 8 bits"
        return ops.fp8_linear(x_TI, weights["weight"], weights["scale"], weights.get("bias"), by_row=self.deterministic)

    def values(self, weights: Weights, inputs: int) -> Tensor:
        """See `WeightFormat.values`; float32."""
        return dequantize(weights["weight"], weights["scale"])


class FP8Target:
    """Codes and scales of a weight, or of some of its outputs, as what a loader fills; see `Target`."""

    dtype = torch.float32
    """Of values that are to be rounded: the scales come from them, so nothing is rounded twice."""

    def __init__(self, weight_OI: Tensor, scale_OG: Tensor, encoding: str) -> None:
        self._weight_OI, self._scale_OG = weight_OI, scale_OG
        self.shape, self.device = weight_OI.shape, weight_OI.device
        self.quantization = encoding

    def copy_(self, values: Tensor) -> None:
        """Fill it with values [O, I], which are rounded, or with the bytes of `pack`, uint8, which are not."""
        inputs = self._weight_OI.shape[1]
        if values.dtype == torch.uint8:
            codes_OI, scale_OG = values.split((inputs, values.shape[1] - inputs), 1)
            self._weight_OI.view(torch.uint8).copy_(codes_OI)
            self._scale_OG.copy_(scale_OG.contiguous().view(torch.float32))
        else:
            codes_OI, scale_OG = quantize(values, self._scale_OG.shape[1])
            self._weight_OI.copy_(codes_OI)
            self._scale_OG.copy_(scale_OG)


class FP8RowTarget(FP8Target):
    """One with a scale for each output: of all its inputs, so that what ranks keep of a weight has the codes of the whole."""

    def copy_columns(self, values: Tensor, columns: Cut) -> None:
        """See `RoundsRows.copy_columns`."""
        codes_OI, scale_O1 = quantize(values, 1)
        self._weight_OI.copy_(codes_OI[:, columns.begin : columns.begin + columns.length])
        self._scale_OG.copy_(scale_O1)


def pack(codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Codes and scales in one tensor whose rows are outputs, so that rows can be reordered: [O, I + 4G] uint8."""
    return torch.cat((codes_OI.view(torch.uint8), scale_OG.contiguous().view(torch.uint8)), 1)
