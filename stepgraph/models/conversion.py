"""What differs between a checkpoint's tensors and the parameters that hold them, undone while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepgraph.layers.formats import Target


def quantization_of(target: Target) -> str | None:
    """Block format whose stored bytes `copy_` takes beside values, see `CheckpointTensor.packed`; None if it takes none."""
    return getattr(target, "quantization", None)


def takes_values(target: Target) -> bool:
    """Whether a target can be filled with values; else only with the stored bytes of its `quantization_of`."""
    return getattr(target, "takes_values", True)


class Converted:
    """A target that holds a function of the checkpoint's tensor, of the same shape. Only rows of stored bytes can be moved."""

    def __init__(self, target: Target, convert: Callable[[Tensor], Tensor]) -> None:
        self._target, self.convert = target, convert
        self.shape, self.dtype, self.device = target.shape, target.dtype, target.device
        self.quantization, self.takes_values = quantization_of(target), takes_values(target)

    def copy_(self, values: Tensor) -> None:
        """See `Target.copy_`."""
        self._target.copy_(self.convert(values))


def with_offset(target: Target, offset: float) -> Target:
    """A target that holds the checkpoint's values plus `offset`."""
    return Converted(target, lambda values: values + offset)


def with_head_order(target: Target, order_D: Tensor, num_heads: int) -> Target:
    """A target whose first `num_heads` heads, D rows each, hold the checkpoint's rows of that head in the order `order_D`."""
    head_dim = len(order_D)
    start_H1 = torch.arange(num_heads).unsqueeze(1) * head_dim
    rest = torch.arange(num_heads * head_dim, target.shape[0])
    index = torch.cat(((start_H1 + order_D).flatten(), rest))
    return Converted(target, lambda values: values[index.to(values.device)])
