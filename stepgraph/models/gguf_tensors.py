"""Tensors of GGUF files, as a loader sees them.

Shapes: H heads, N dimensions of a head's keys that are not rotated, V of its values, R rank of the latent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.parallel.shard import Cut, Part


class GGUFTensor(CheckpointTensor):
    """A tensor of a file, or what one expert has in it."""

    def __init__(self, name: str, tensor: Any, *, permuted_heads: int | None = None, expert: int | None = None) -> None:
        """Args:
        name: in transformers' checkpoints.
        tensor: of gguf's reader, whose values are a view of the file.
        permuted_heads: whose rows are reordered for llama.cpp's rotation of adjacent pairs.
        expert: whose matrix it is, of a tensor of all.
        """
        self.name = name
        shape, self._data = tuple(int(size) for size in reversed(tensor.shape)), tensor.data
        if expert is not None:
            shape, self._data = shape[1:], self._data[expert]
        elif name.endswith(".shared_expert_gate.weight") and len(shape) == 1:
            shape, self._data = (1, *shape), self._data[None]
        self.shape, self.nbytes = shape, self._data.nbytes
        self.quantization = None if tensor.tensor_type.name in ("F32", "F16", "BF16") else tensor.tensor_type.name
        self._type, self._permuted_heads = tensor.tensor_type, permuted_heads

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        import gguf

        block, _ = gguf.GGML_QUANT_SIZES[self._type]
        if part is None or part.columns is None:
            values = _to_torch(gguf.quants.dequantize(self._rows(part), self._type))
        else:
            widened = part.widened(block)
            values = take(_to_torch(gguf.quants.dequantize(self._rows(widened), self._type)), part.within(widened))
        return values.to(device).to(dtype)

    def packed(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.packed`."""
        return _to_torch(self._rows(part)) if self.quantization else super().packed(part)

    def _rows(self, part: Part | None) -> np.ndarray:
        """The stored rows, or those of a part that begins and ends with blocks, queries and keys back in the order in which
        transformers rotates them.

        Per head, llama.cpp interleaves the two halves of the rows; blocks of quantisation never span rows, so that rows
        can be moved while packed. A part holds whole heads.
        """
        rows: np.ndarray = self._data if part is None else self._part(part)
        if self._permuted_heads is None:
            return rows
        halves = self.shape[0] // self._permuted_heads // 2
        return rows.reshape(-1, halves, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def _part(self, part: Part) -> np.ndarray:
        import gguf

        if part.columns is not None and self._data.dtype == np.uint8:
            block, nbytes = gguf.GGML_QUANT_SIZES[self._type]
            begin, length = part.columns.begin, part.columns.length
            assert begin % block == length % block == 0, part
            row = Cut(self._data.shape[1], begin // block * nbytes, length // block * nbytes)
            part = Part(part.rows, row)
        return np.concatenate([self._data[index] for index in part.slices])


def _to_torch(array: np.ndarray) -> Tensor:
    """Wrap an array, copied if it is a view of the read-only file, which torch must not own."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class KeysAndValues(CheckpointTensor):
    """What makes a latent's keys and values, [H (N + V), R], of the tensors that hold those of all heads: [H, R, N], as llama.cpp
    multiplies queries with it, and [H, V, R]."""

    def __init__(self, name: str, keys: GGUFTensor, values: GGUFTensor) -> None:
        """Args:
        name: in transformers' checkpoints.
        keys, values: the two, of the same heads and latents.
        """
        (H, R, N), V = keys.shape, values.shape[1]
        self.name, self.shape = name, (H * (N + V), R)
        self._keys, self._values = keys, values

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        keys_HNR = self._keys.load(dtype, device).transpose(1, 2)
        return take(torch.cat((keys_HNR, self._values.load(dtype, device)), 1).flatten(0, 1), part)
