"""Matrix products with weights of 8 bits, see `stepgraph.ops.fp8_linear`.

Shapes: T tokens, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops.fp8_linear import quantize


class FP8Linear(Linear):
    """A `Linear` whose weight is E4M3 codes with float32 scales. Bias and updates of adapters keep their dtype."""

    def __init__(self, linear: Linear, groups: int = 1) -> None:
        """Args:
        linear: to be replaced; gives the bias, and the weight its shape. On the meta device, neither takes memory.
        groups: G, see `ops.fp8_linear`.
        """
        outputs, inputs = linear.weight.shape
        Linear.__init__(self, inputs, outputs, dtype=linear.weight.dtype, device=torch.device("meta"))
        device = linear.weight.device
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=device), False)
        self.scale = nn.Parameter(torch.empty(outputs, groups, dtype=torch.float32, device=device), False)
        self.bias = linear.bias

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O], dtype of `x_TI`."""
        out_TO = ops.fp8_linear(x_TI, self.weight, self.scale, self.bias, by_row=self.deterministic)
        if self.lora is not None:
            self.lora.update(x_TI, out_TO, deterministic=self.deterministic)
        return out_TO

    def after_norm(self, norm: RMSNorm, x_TI: Tensor) -> Tensor:
        """See `Linear.after_norm`."""
        if self.is_plain:
            return ops.fp8_norm_linear(x_TI, norm.weight, norm.eps, self.weight, self.scale, self.bias)
        return self(norm(x_TI))

    def gated_after_norm(self, norm: RMSNorm, x_TI: Tensor, *, gelu: bool) -> Tensor:
        """See `Linear.gated_after_norm`."""
        if self.is_plain and self.bias is None:
            return ops.fp8_norm_gated_linear(x_TI, norm.weight, norm.eps, self.weight, self.scale, gelu=gelu)
        return (ops.geglu if gelu else ops.swiglu)(self.after_norm(norm, x_TI))

    def add_to(self, residual_TO: Tensor, x_TI: Tensor, multiplier: float = 1.0) -> None:
        """See `Linear.add_to`."""
        if self.is_plain:
            ops.fp8_linear_add(x_TI, self.weight, self.scale, self.bias, residual_TO, multiplier)
        else:
            super().add_to(residual_TO, x_TI, multiplier)


class FP8MergedLinear(FP8Linear, MergedLinear):
    """A `MergedLinear` whose weight is E4M3 codes with float32 scales."""

    def __init__(self, linear: MergedLinear, groups: int = 1) -> None:
        """Arguments as of `FP8Linear`."""
        super().__init__(linear, groups)
        self.parts = linear.parts


def fp8_linear(linear: Linear, groups: int = 1) -> FP8Linear:
    """The FP8 counterpart of a layer, uninitialised but for its bias."""
    return FP8MergedLinear(linear, groups) if isinstance(linear, MergedLinear) else FP8Linear(linear, groups)


class FP8Target:
    """A weight of an `FP8Linear`, or some of its outputs, as what a loader fills; see `stepgraph.models.conversion.Target`."""

    dtype = torch.float32
    """Of values that are to be rounded: the scales come from them, so nothing is rounded twice."""

    def __init__(self, weight_OI: Tensor, scale_OG: Tensor) -> None:
        self._weight_OI, self._scale_OG = weight_OI, scale_OG
        self.shape, self.device = weight_OI.shape, weight_OI.device
        self.quantization = quantization_name(scale_OG.shape[1])

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


def fp8_targets(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | FP8Target]:
    """Parameters of an `FP8Linear` by their names, or views into them by part, as a loader fills them: weights with scales."""
    scales = {name.removesuffix("scale") + "weight": tensor for name, tensor in tensors.items() if _is_scale(name)}
    return {
        name: FP8Target(tensor, scales[name]) if name in scales else tensor
        for name, tensor in tensors.items()
        if not _is_scale(name)
    }


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == "scale"


def pack(codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Codes and scales in one tensor whose rows are outputs, so that rows can be reordered: [O, I + 4G] uint8."""
    return torch.cat((codes_OI.view(torch.uint8), scale_OG.contiguous().view(torch.uint8)), 1)


def quantization_name(groups: int) -> str:
    """Of weights with so many scales per output, for `stepgraph.models.checkpoint.CheckpointTensor.quantization`."""
    return "FP8" if groups == 1 else f"FP8 in {groups} groups"
