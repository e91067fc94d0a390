"""What a loader fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stepgraph.parallel.shard import Part


class Target(Protocol):
    """Where a tensor of a checkpoint goes: a parameter, a view into one, or what makes one of it."""

    @property
    def shape(self) -> torch.Size:
        """Of the checkpoint's tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """In which `copy_` loses nothing."""

    @property
    def device(self) -> torch.device:
        """On which `copy_` is fastest; it takes values on the CPU too."""

    def copy_(self, values: Tensor, /) -> Any:
        """Fill the target."""


class Sharded:
    """A target that holds a part of the checkpoint's tensor. `copy_` takes that part."""

    def __init__(self, target: Target, part: Part) -> None:
        self._target, self.part = target, part
        self.shape, self.dtype, self.device = torch.Size(part.shape), target.dtype, target.device
        self.quantization, self.takes_values = quantization_of(target), takes_values(target)

    def copy_(self, values: Tensor) -> None:
        """See `Target.copy_`."""
        self._target.copy_(values)


@dataclass(frozen=True)
class Skipped:
    """In place of a target: the checkpoint's tensor is another rank's to keep. It is not read."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def copy_(self, values: Tensor) -> None:
        """See `Target.copy_`."""


def part_of(target: Target) -> Part | None:
    """Which part of the checkpoint's tensor `copy_` takes; None: all of it."""
    return getattr(target, "part", None)


def quantization_of(target: Target) -> str | None:
    """Encoding whose stored bytes `copy_` takes beside values, see `CheckpointTensor.packed`; None if it takes none."""
    return getattr(target, "quantization", None)


def takes_values(target: Target) -> bool:
    """Whether a target can be filled with values; else only with the stored bytes of its `quantization_of`."""
    return getattr(target, "takes_values", True)
