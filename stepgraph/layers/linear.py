"""Matrix products with weights in the checkpoint's [out, in] layout.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepgraph import ops


class Linear(nn.Module):
    """`x @ weight.T + bias`. May run inside a graph."""

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device), False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O], dtype of `x_TI`."""
        return ops.linear(x_TI, self.weight, self.bias)


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
        self._parts = parts

    def named_parts(self) -> dict[str, Tensor]:
        """Views into the merged parameters, by checkpoint name (``"q_proj.weight"``, ``"q_proj.bias"``, …)."""
        sizes = list(self._parts.values())
        return {
            f"{part}.{name}": view
            for name, parameter in self.named_parameters()
            for part, view in zip(self._parts, parameter.split(sizes), strict=True)
        }
