"""The products of another format, with what adapters add to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepgraph.layers.formats.base import ParameterSpec, WeightFormat, Weights
from stepgraph.layers.formats.target import Target
from stepgraph.layers.lora import LoRA


@dataclass(frozen=True, eq=False)
class Adapted(WeightFormat):
    """A weight in another format, and updates of the requests' adapters beside it. Its products are computed in parts, as an
    update needs the normalised inputs, and the outputs before anything is made of them."""

    wrapped: WeightFormat
    lora: LoRA

    @property
    def base(self) -> WeightFormat:
        """See `WeightFormat.base`."""
        return self.wrapped.base

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        """See `WeightFormat.deterministic`."""
        return self.wrapped.deterministic

    @property
    def input_unit(self) -> int:
        """See `WeightFormat.input_unit`."""
        return self.wrapped.input_unit

    @property
    def rounds_above(self) -> int | None:
        """See `WeightFormat.rounds_above`."""
        return self.wrapped.rounds_above

    def parameters(self, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, ParameterSpec]:
        """See `WeightFormat.parameters`."""
        return self.wrapped.parameters(outputs, inputs, dtype)

    def targets(self, weights: Weights, inputs: int) -> dict[str, Target]:
        """See `WeightFormat.targets`."""
        return self.wrapped.targets(weights, inputs)

    def plain_product(self, weights: Weights, x_TI: Tensor, out: Tensor | None) -> Tensor:
        """See `WeightFormat.plain_product`."""
        out_TO = self.wrapped.plain_product(weights, x_TI, out)
        self.lora.update(x_TI, out_TO, deterministic=self.deterministic)
        return out_TO

    def values(self, weights: Weights, inputs: int) -> Tensor:
        """See `WeightFormat.values`; of the weight alone."""
        return self.wrapped.values(weights, inputs)
