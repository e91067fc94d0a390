"""Matrix products with weights in the checkpoint's [out, in] layout.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph.layers.formats import Plain, Target, WeightFormat
from stepgraph.layers.matrix import Matrix

_PLAIN = Plain()


class Linear(Matrix):
    """`x @ weight.T + bias`. May run inside a graph."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        format: WeightFormat = _PLAIN,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Arguments as of `Matrix`."""
        super().__init__(in_features, out_features, bias=bias, format=format, dtype=dtype, device=device)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O], dtype of `x_TI`."""
        return self.product(x_TI)


class MergedLinear(Linear):
    """Projections of one input, kept by checkpoints as several matrices and computed here as one product."""

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        format: WeightFormat = _PLAIN,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        in_features: I.
        parts: outputs of each projection by its checkpoint name, in the order in which they are stacked.
        bias: whether every projection has one.
        format, dtype, device: as of `Matrix`.
        """
        super().__init__(in_features, sum(parts.values()), bias=bias, format=format, dtype=dtype, device=device)
        self.parts = parts

    def part_targets(self) -> dict[str, Target]:
        """What a loader fills, by the names of the projections' tensors (``"q_proj.weight"``, ``"q_proj.bias"``, …)."""
        sizes = list(self.parts.values())
        views = {name: parameter.split(sizes) for name, parameter in self.parameters_by_name.items()}
        return {
            f"{part}.{name}": target
            for index, part in enumerate(self.parts)
            for name, target in self.format.targets({name: view[index] for name, view in views.items()}).items()
        }
