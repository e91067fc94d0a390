"""What a loader fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from stepgraph.parallel.shard import Cut, Part


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


class RoundsRows(Target, Protocol):
    """A target that rounds values, all of a row by one scale: that of a whole row, of which a rank may keep some."""

    def copy_columns(self, values: Tensor, columns: Cut) -> None:
        """Fill the target with some columns of `values`, which are whole rows."""


class Sharded:
    """A target that holds a part of the checkpoint's tensor. `copy_` takes that part; values, where they are rounded by scales of
    whole rows, with all columns."""

    def __init__(self, target: Target, part: Part) -> None:
        self._target, self.part = target, part
        self.shape = torch.Size((*part.shape, *target.shape[len(part.shape) :]))
        self.dtype, self.device = target.dtype, target.device
        self.quantization, self.takes_values = quantization_of(target), takes_values(target)
        self._rounds_rows = hasattr(target, "copy_columns")
        self.values_part = part.with_all_columns() if self._rounds_rows else part

    def copy_(self, values: Tensor) -> None:
        """See `Target.copy_`."""
        if self._rounds_rows and values.is_floating_point():
            cast(RoundsRows, self._target).copy_columns(values, cast(Cut, self.part.columns))
        else:
            self._target.copy_(values)


def sharded(target: Target, part: Part) -> Target:
    """A target that holds a part of the checkpoint's tensor, which may be all of it."""
    return target if part.is_whole else Sharded(target, part)


@dataclass(frozen=True)
class Skipped:
    """In place of a target: the checkpoint's tensor is another rank's to keep. It is not read."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def copy_(self, values: Tensor) -> None:
        """See `Target.copy_`."""


def part_of(target: Target) -> Part | None:
    """Which part of the checkpoint's tensor `copy_` takes as it is stored; None: all of it."""
    return getattr(target, "part", None)


def values_part_of(target: Target) -> Part | None:
    """Which part of the checkpoint's tensor `copy_` takes as values; None: all of it."""
    return getattr(target, "values_part", None)


def quantization_of(target: Target) -> str | None:
    """Encoding whose stored bytes `copy_` takes beside values, see `CheckpointTensor.packed`; None if it takes none."""
    return getattr(target, "quantization", None)


def takes_values(target: Target) -> bool:
    """Whether a target can be filled with values; else only with the stored bytes of its `quantization_of`."""
    return getattr(target, "takes_values", True)
