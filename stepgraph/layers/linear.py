"""Matrix products with weights in the checkpoint's [out, in] layout.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.layers.lora import LoRA
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.packing import Packing
from stepgraph.ops.packed import BLOCK


class Linear(nn.Module):
    """`x @ weight.T + bias`. May run inside a graph."""

    bias: nn.Parameter | None
    deterministic = False
    """Whether a token's result may not depend on the tokens beside it; set at load, see `ops.linear_by_row`."""
    lora: LoRA | None = None
    """Updates of the requests' adapters; set at load, if the engine takes adapters."""
    packing: Packing | None = None
    """How `weight` is packed, if it is; set at load."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device), False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O], dtype of `x_TI`."""
        if self.packing is not None:
            out_TO = ops.packed_linear(x_TI, self.weight, exact_tokens=self.exact_tokens)
            if self.bias is not None:
                out_TO.add_(self.bias)
        else:
            product = ops.linear_by_row if self.deterministic else ops.linear
            out_TO = product(x_TI, self.weight, self.bias)
        if self.lora is not None:
            self.lora.update(x_TI, out_TO, deterministic=self.deterministic)
        return out_TO

    @property
    def is_plain(self) -> bool:
        """Whether it is the product of its parameters and nothing else, so that it may be fused with what is around it."""
        return self.lora is None and self.packing is None and not self.deterministic

    @property
    def is_packed(self) -> bool:
        """Whether it is the product of packed weights and nothing else, so that it may be fused with what is around it."""
        return self.packing is not None and self.lora is None and self.bias is None

    @property
    def exact_tokens(self) -> int | None:
        """Most tokens whose product with packed weights may not round its operands; None if no product may."""
        return None if self.packing is None or self.deterministic else self.packing.exact_tokens

    def after_norm(self, norm: RMSNorm, x_TI: Tensor) -> Tensor:
        """Return the product with `norm(x_TI)`: [T, O], dtype of `x_TI`."""
        if self.is_plain:
            return ops.norm_linear(x_TI, norm.weight, norm.eps, self.weight, self.bias)
        if self.is_packed:
            return ops.packed_norm_linear(x_TI, norm.weight, norm.eps, self.weight, exact_tokens=self.exact_tokens)
        return self(norm(x_TI))

    def gated_after_norm(self, norm: RMSNorm, x_TI: Tensor, *, gelu: bool) -> Tensor:
        """Return the gated activation of the product with `norm(x_TI)`, see `ops.swiglu`: [T, O / 2], dtype of `x_TI`."""
        if self.is_plain and self.bias is None:
            return ops.norm_gated_linear(x_TI, norm.weight, norm.eps, self.weight, gelu=gelu)
        if self.is_packed and not gelu and self.out_features % (2 * BLOCK) == 0:
            return ops.packed_norm_swiglu(x_TI, norm.weight, norm.eps, self.weight, exact_tokens=self.exact_tokens)
        return (ops.geglu if gelu else ops.swiglu)(self.after_norm(norm, x_TI))

    def add_to(self, residual_TO: Tensor, x_TI: Tensor, multiplier: float = 1.0) -> None:
        """Add the product, times `multiplier`, to the residual stream in place."""
        if self.is_plain:
            ops.linear_add(x_TI, self.weight, self.bias, residual_TO, multiplier)
        elif self.is_packed:
            ops.packed_linear_add(x_TI, self.weight, residual_TO, multiplier, exact_tokens=self.exact_tokens)
        else:
            out_TO = self(x_TI)
            # `alpha` of 16 bits rounds by position.
            residual_TO.add_(out_TO if multiplier == 1.0 else out_TO.float() * multiplier)


class MergedLinear(Linear):
    """Projections of one input, kept by checkpoints as several matrices and computed here as one product."""

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        in_features: I.
        parts: outputs of each projection by its checkpoint name, in the order in which they are stacked.
        bias: whether every projection has one.
        """
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype, device=device)
        self.parts = parts

    def named_parts(self) -> dict[str, Tensor]:
        """Views into the merged parameters, by checkpoint name (``"q_proj.weight"``, ``"q_proj.bias"``, …)."""
        sizes = list(self.parts.values())
        return {
            f"{part}.{name}": view
            for name, parameter in self.named_parameters()
            for part, view in zip(self.parts, parameter.split(sizes), strict=True)
        }
