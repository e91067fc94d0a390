"""What differs between a checkpoint's tensors and the parameters that hold them, undone while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepgraph.layers.formats.target import Target, part_of, quantization_of, takes_values, values_part_of


class Converted:
    """A target that holds a function, of the same shape, of the checkpoint's tensor or of the part of it that the rank keeps.
    Only rows of stored bytes can be moved."""

    def __init__(self, target: Target, convert: Callable[[Tensor], Tensor]) -> None:
        self._target, self.convert = target, convert
        self.shape, self.dtype, self.device = target.shape, target.dtype, target.device
        self.quantization, self.takes_values = quantization_of(target), takes_values(target)
        self.part, self.values_part = part_of(target), values_part_of(target)

    def copy_(self, values: Tensor) -> None:
        """See `Target.copy_`."""
        self._target.copy_(self.convert(values))


def with_offset(target: Target, offset: float) -> Target:
    """A target that holds the checkpoint's values plus `offset`."""
    return Converted(target, lambda values: values + offset)


def with_factor(target: Target, factor: float) -> Target:
    """A target that holds the checkpoint's values times `factor`."""
    return Converted(target, lambda values: values * factor)


def with_row_order(target: Target, rows: Tensor) -> Target:
    """A target that holds, row by row, those of the checkpoint's rows, or of the part of them that the rank keeps."""
    return Converted(target, lambda values: values[rows.to(values.device)])


def with_head_order(target: Target, order_D: Tensor, num_heads: int) -> Target:
    """A target whose first `num_heads` heads, D rows each, hold the checkpoint's rows of that head in the order `order_D`.

    Args:
        target: of a projection's tensor, or of a norm's.
        order_D: see `stepgraph.layers.rotary.rotary_order`.
        num_heads: that the rank keeps.
    """
    head_dim = len(order_D)
    start_H1 = torch.arange(num_heads).unsqueeze(1) * head_dim
    index = (start_H1 + order_D).flatten()

    def reorder(values: Tensor) -> Tensor:
        rest = torch.arange(num_heads * head_dim, len(values))
        return values[torch.cat((index, rest)).to(values.device)]

    return Converted(target, reorder)
