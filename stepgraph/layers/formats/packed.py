"""Weights that stay in a GGUF file's own blocks, where kernels multiply them; see `stepgraph.ops.packed`.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepgraph import native, ops
from stepgraph.layers.formats.base import End, FormatOptions, ParameterSpec, WeightFormat, Weights
from stepgraph.layers.formats.target import Target
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops.packed import BLOCK, BLOCK_BYTES
from stepgraph.ops.swiglu import Clamp


@dataclass(frozen=True)
class Packed(WeightFormat):
    """[O, bytes of a row] uint8, for products in float32 on the CPU."""

    blocks: str  # a key of `BLOCK_BYTES`
    exact_tokens: int | None  # products of more tokens may round their operands; None: none may
    takes_values: bool = (
        False  # blocks of Q8_0 that can be filled with numbers, which are rounded; else with blocks only
    )
    deterministic: bool = False  # no product may round its operands either

    @property
    def input_unit(self) -> int:
        """See `WeightFormat.input_unit`."""
        return BLOCK

    @property
    def rounds_above(self) -> int | None:
        """See `WeightFormat.rounds_above`."""
        return None if self.deterministic else self.exact_tokens

    @classmethod
    def keeping(cls, encoding: str, inputs: int, options: FormatOptions) -> WeightFormat | None:
        """See `WeightFormat.keeping`. Logits are never rounded."""
        if not options.packed or encoding not in BLOCK_BYTES or inputs % BLOCK != 0 or not native.available():
            return None
        exact_tokens = options.exact_tokens if options.in_layers else None
        return cls(encoding, exact_tokens, deterministic=options.deterministic)

    def parameters(self, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, ParameterSpec]:
        """See `WeightFormat.parameters`."""
        return {"weight": ParameterSpec((outputs, inputs // BLOCK * BLOCK_BYTES[self.blocks]), torch.uint8)}

    def targets(self, weights: Weights, inputs: int) -> dict[str, Target]:
        """See `WeightFormat.targets`."""
        return {**weights, "weight": PackedTarget(weights["weight"], inputs, self)}

    def fused_product(
        self, weights: Weights, x_TI: Tensor, norm: RMSNorm | None, end: End, out: Tensor | None, multiplier: float
    ) -> Tensor | None:
        """See `WeightFormat.fused_product`."""
        if "bias" in weights:
            return None
        codes, exact_tokens = weights["weight"], self.rounds_above
        if norm is None and end is End.ADD and out is not None:
            ops.packed_linear_add(x_TI, codes, out, multiplier, exact_tokens=exact_tokens)
            return out
        if norm is not None and end is End.STORE and out is None:
            return ops.packed_norm_linear(x_TI, norm.weight, norm.eps, codes, exact_tokens=exact_tokens)
        if norm is not None and end is End.SWIGLU and codes.shape[0] % (2 * BLOCK) == 0:
            return ops.packed_norm_swiglu(x_TI, norm.weight, norm.eps, codes, exact_tokens=exact_tokens)
        return None

    def plain_product(self, weights: Weights, x_TI: Tensor, out: Tensor | None) -> Tensor:
        """See `WeightFormat.plain_product`."""
        out_TO = ops.packed_linear(x_TI, weights["weight"], exact_tokens=self.rounds_above, out=out)
        if (bias := weights.get("bias")) is not None:
            out_TO.add_(bias)
        return out_TO

    def gated_experts(
        self, weights: Weights, x_TE: Tensor, work: ops.ExpertWork, end: End, clamp: Clamp | None = None
    ) -> Tensor:
        """See `WeightFormat.gated_experts`."""
        assert clamp is None, "no file has blocks of such experts"
        assert "bias" not in weights
        return ops.packed_gated_experts(
            x_TE, weights["weight"], work, gelu=end is End.GEGLU, exact_tokens=self.rounds_above
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
        ops.packed_sum_experts(
            hidden_PM,
            weights["weight"],
            work,
            out,
            add=add_to is not None,
            multiplier=multiplier,
            exact_tokens=self.rounds_above,
        )
        return out

    def rows(self, weights: Weights, index_T: Tensor) -> Tensor:
        """See `WeightFormat.rows`."""
        return ops.packed_rows(weights["weight"], index_T, self._inputs(weights))

    def values(self, weights: Weights, inputs: int) -> Tensor:
        """See `WeightFormat.values`; float32."""
        return self.rows(weights, torch.arange(len(weights["weight"]), dtype=torch.int32))

    def _inputs(self, weights: Weights) -> int:
        return weights["weight"].shape[1] // BLOCK_BYTES[self.blocks] * BLOCK


class PackedTarget:
    """A `Target` that is filled with a tensor's stored bytes or, if its format says so, with values, which are rounded."""

    def __init__(self, codes: Tensor, inputs: int, format: Packed) -> None:
        """Args:
        codes: [rows, bytes of a row] uint8, a parameter or a view into one.
        inputs: that a row stands for.
        format: of the layer.
        """
        self.quantization, self.takes_values = format.blocks, format.takes_values
        self.shape, self.dtype, self.device = torch.Size((codes.shape[0], inputs)), torch.float32, codes.device
        self._codes = codes

    def copy_(self, values: Tensor) -> None:
        """Take [rows, bytes of a row] uint8, or [rows, inputs] values."""
        self._codes.copy_(values if values.dtype == torch.uint8 else round_to_q8_0(values))


def round_to_q8_0(values_OI: Tensor) -> Tensor:
    """Blocks of Q8_0 nearest to some values: 32 codes of 8 bits after their scale, a float16. I is a multiple of 32.

    Returns:
        [O, I / 32 · 34] uint8.
    """
    block_OB32 = values_OI.float().unflatten(1, (-1, BLOCK))
    scale_OB1 = (block_OB32.abs().amax(2, keepdim=True) / 127).half()
    code_OB32 = (block_OB32 / scale_OB1.float()).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((scale_OB1.view(torch.uint8), code_OB32.view(torch.uint8)), 2).flatten(1)
