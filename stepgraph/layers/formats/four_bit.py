"""Weights of 4 bits, see `stepgraph.ops.four_bit_linear`.

Shapes: T tokens, I inputs, O outputs, G groups of inputs, P bytes of an output's codes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.layers.formats.base import End, FormatOptions, ParameterSpec, WeightFormat, Weights
from stepgraph.layers.formats.gguf_blocks import BLOCK_INPUTS, GROUP_SIZE, weight_of
from stepgraph.layers.formats.target import Target
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops.four_bit_linear import CHUNK, FourBitWeight, dequantize, quantize
from stepgraph.ops.swiglu import Clamp

_ENCODING = re.compile(r"(INT4|E2M1) in groups of (\d+), scales (\w+)(?:, zeros (\w+))?(, factors)?")
_NAMES = ("weight", "scale", "zero", "factor")


@dataclass(frozen=True)
class FourBit(WeightFormat):
    """Codes of 4 bits [O, P], their groups' scales [O, G] and, in some checkpoints, zeros [O, G] or factors [O, 1]."""

    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16
    zero_dtype: torch.dtype | None = None
    has_factor: bool = False
    is_e2m1: bool = False
    blocks: str | None = None
    """Type of the GGUF file's blocks that it is made of, of `BLOCK_INPUTS`."""
    deterministic: bool = False
    fills_in_place: ClassVar[bool] = False

    @classmethod
    def keeping(cls, encoding: str, inputs: int, options: FormatOptions) -> WeightFormat | None:
        """See `WeightFormat.keeping`. Embedding table and output head become numbers."""
        if not options.in_layers:
            return None
        if encoding in BLOCK_INPUTS:
            scale_dtype = torch.float32 if encoding == "Q4_K" else torch.float16
            zero_dtype = None if encoding == "Q4_0" else scale_dtype
            kept = cls(GROUP_SIZE, scale_dtype, zero_dtype, blocks=encoding, deterministic=options.deterministic)
            return kept if options.repacked else None
        match = _ENCODING.fullmatch(encoding)
        if match is None:
            return None
        kind, group_size, scale, zero, factor = match.groups()
        zero_dtype = None if zero is None else getattr(torch, zero)
        return cls(
            int(group_size),
            getattr(torch, scale),
            zero_dtype,
            factor is not None,
            kind == "E2M1",
            deterministic=options.deterministic,
        )

    @property
    def encoding(self) -> str:
        """Of tensors with such codes and scales, see `CheckpointTensor.quantization`."""
        if self.blocks is not None:
            return self.blocks
        kind, scale, zero = "E2M1" if self.is_e2m1 else "INT4", _name(self.scale_dtype), ""
        if self.zero_dtype is not None:
            zero = f", zeros {_name(self.zero_dtype)}"
        return f"{kind} in groups of {self.group_size}, scales {scale}{zero}{', factors' if self.has_factor else ''}"

    @property
    def input_unit(self) -> int:
        """See `WeightFormat.input_unit`."""
        return self.group_size if self.blocks is None else BLOCK_INPUTS[self.blocks]

    @property
    def takes_values(self) -> bool:
        """Whether a weight can be filled with numbers, which are rounded."""
        return not self.is_e2m1 and self.zero_dtype is None and not self.has_factor

    def parameters(self, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, ParameterSpec]:
        """See `WeightFormat.parameters`."""
        groups = -(-inputs // self.group_size)
        specs = {
            "weight": ParameterSpec((outputs, -(-inputs // CHUNK) * CHUNK // 2), torch.uint8),
            "scale": ParameterSpec((outputs, groups), self.scale_dtype),
        }
        if self.zero_dtype is not None:
            specs["zero"] = ParameterSpec((outputs, groups), self.zero_dtype)
        if self.has_factor:
            specs["factor"] = ParameterSpec((outputs, 1), torch.float32)
        return specs

    def targets(self, weights: Weights, inputs: int) -> dict[str, Target]:
        """See `WeightFormat.targets`."""
        others = {name: tensor for name, tensor in weights.items() if name not in _NAMES}
        return {"weight": FourBitTarget(self, [weights[name] for name in _NAMES if name in weights], inputs), **others}

    def fused_product(
        self, weights: Weights, x_TI: Tensor, norm: RMSNorm | None, end: End, out: Tensor | None, multiplier: float
    ) -> Tensor | None:
        """See `WeightFormat.fused_product`."""
        if self.deterministic:
            return None
        bias, before = weights.get("bias"), None if norm is None else (norm.weight, norm.eps)
        if norm is None and end is End.ADD and out is not None:
            ops.four_bit_linear_add(x_TI, self.weight(weights), bias, out, multiplier)
            return out
        if norm is not None and end is End.STORE and out is None:
            return ops.four_bit_linear(x_TI, self.weight(weights), bias, norm=before)
        if end in (End.SWIGLU, End.GEGLU) and bias is None:
            return ops.four_bit_gated_linear(x_TI, self.weight(weights), gelu=end is End.GEGLU, norm=before)
        return None

    def plain_product(self, weights: Weights, x_TI: Tensor, out: Tensor | None) -> Tensor:
        """See `WeightFormat.plain_product`."""
        assert out is None, "output heads, which have one, are not of 4 bits"
        return ops.four_bit_linear(x_TI, self.weight(weights), weights.get("bias"), by_row=self.deterministic)

    def gated_experts(
        self, weights: Weights, x_TE: Tensor, work: ops.ExpertWork, end: End, clamp: Clamp | None = None
    ) -> Tensor:
        """See `WeightFormat.gated_experts`."""
        return ops.four_bit_gated_experts(
            x_TE,
            self.weight(weights),
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
        ops.four_bit_sum_experts(
            hidden_PM,
            self.weight(weights),
            work,
            out,
            add=add_to is not None,
            multiplier=multiplier,
            by_row=self.deterministic,
            bias=weights.get("bias"),
        )
        return out

    def values(self, weights: Weights, inputs: int) -> Tensor:
        """See `WeightFormat.values`; float32."""
        return dequantize(self.weight(weights), inputs)

    def weight(self, weights: Weights) -> FourBitWeight:
        """The parameters as operators take them."""
        zero, factor = weights.get("zero"), weights.get("factor")
        return FourBitWeight(weights["weight"], weights["scale"], zero, factor, self.group_size, self.is_e2m1)


class FourBitTarget:
    """Codes and scales of a weight, or of some of its outputs, as what a loader fills; see `Target`."""

    dtype = torch.float32
    """Of values that are to be rounded: the scales come from them, so nothing is rounded twice."""

    def __init__(self, format: FourBit, parts: Sequence[Tensor], inputs: int) -> None:
        """Args:
        format: of the layer.
        parts: its parameters but for a bias, in the order of `FourBitWeight`, or views into them.
        inputs: I.
        """
        self._format, self._parts = format, parts
        self.shape, self.device = torch.Size((len(parts[0]), inputs)), parts[0].device
        self.quantization, self.takes_values = format.encoding, format.takes_values

    def copy_(self, values: Tensor) -> None:
        """Fill it with values [O, I], which are rounded, or with the bytes of `pack` or a file's blocks, uint8, which are not."""
        if values.dtype == torch.uint8 and self._format.blocks is not None:
            new = _parts(weight_of(self._format.blocks, values))
        elif values.dtype == torch.uint8:
            sizes = [part.shape[1] * part.itemsize for part in self._parts]
            new = [
                columns.contiguous().view(part.dtype)
                for part, columns in zip(self._parts, values.split(sizes, 1), strict=True)
            ]
        else:
            assert self.takes_values
            new = _parts(quantize(values, self._format.group_size, self._format.scale_dtype))
        for part, tensor in zip(self._parts, new, strict=True):
            part.copy_(tensor)


def pack(weight: FourBitWeight) -> Tensor:
    """All of a weight in one tensor whose rows are outputs, so that rows can be reordered: [O, bytes] uint8."""
    return torch.cat([part.contiguous().flatten().view(torch.uint8).view(len(part), -1) for part in _parts(weight)], 1)


def _parts(weight: FourBitWeight) -> list[Tensor]:
    """The tensors of a weight, in the order of `FourBitWeight`."""
    return [part for part in (weight.codes, weight.scale, weight.zero, weight.factor) if part is not None]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
