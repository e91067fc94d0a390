"""What a loader sees of a checkpoint, whatever file format it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from stepgraph.parallel.shard import Part


class CheckpointTensor(ABC):
    """One stored tensor. Nothing is read before `load` or `packed`."""

    name: str
    """In the naming of transformers' checkpoints, e.g. ``model.layers.0.self_attn.q_proj.weight``."""
    shape: tuple[int, ...]
    """Of the tensor that `load` returns."""
    quantization: str | None = None
    """Name of the block format that `packed` returns (``"Q4_1"``, …); None for plain floating point."""
    nbytes: int = 0
    """What it takes in the file, if it has a `quantization`."""
    is_e4m3: bool = False
    """Whether values are stored in 8 bits; their scales are then in a tensor of their own, see `fp8_checkpoint`."""

    @abstractmethod
    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """Return the values, dequantised if need be, as `dtype` on `device`.

        Args:
            dtype, device: of the result.
            part: of the tensor, which alone is read; None: all of it.

        Raises:
            ModelError: the file cannot be read.
        """

    def stored(self, part: Part | None = None) -> Tensor:
        """Return the values in the type that loses none, without a copy where that can be.

        Args:
            part: as of `load`.

        Raises:
            ModelError: the file cannot be read.
        """
        return self.load(torch.float32, torch.device("cpu"), part)

    def packed(self, part: Part | None = None) -> Tensor:
        """Return the stored bytes of a quantised tensor: [rows, bytes per row] uint8 on the CPU, rows as in `shape`.

        Args:
            part: of the tensor, which alone is read; its columns begin and end where scales do. None: all of it.
        """
        raise AssertionError(f"{self.name} is not quantised")


def take(stored: Any, part: Part | None) -> Tensor:
    """A part of a tensor, or of anything that is indexed like one and gives tensors; a view of it, where that can be."""
    if part is None:
        taken: Tensor = stored[...]
        return taken
    pieces = [stored[index] for index in part.slices]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def keep_rows(rows: Tensor, begin: int, part: Part, kept: Tensor) -> None:
    """Copy what a part has of some rows of a tensor to where it belongs.

    Args:
        rows: those from `begin` on, whole.
        begin: number of the first.
        part: of the tensor.
        kept: the part, of which rows are overwritten.
    """
    columns = () if part.columns is None else (slice(part.columns.begin, part.columns.begin + part.columns.length),)
    place = 0
    for cut in part.row_cuts:
        first = max(cut.begin, begin)
        count = min(cut.begin + cut.length, begin + len(rows)) - first
        if count > 0:
            source = rows[(slice(first - begin, first - begin + count), *columns)]
            kept[place + first - cut.begin :][:count].copy_(source)
        place += cut.length
