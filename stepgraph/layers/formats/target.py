"""What a loader fills."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


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
