"""A mixture's tensors as native models take them: a matrix for each projection of each expert.

Most published checkpoints hold them so. transformers keeps those of all experts of a layer in one tensor while it runs a model,
and Granite's checkpoints do too, those of gpt-oss in another order (`stepgraph.models.interleaved_experts`).

Shapes: N experts, M width of an expert, E hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.models.interleaved_experts import split_interleaved
from stepgraph.parallel.shard import Cut, Part

_MERGED = re.compile(r"(.+\.(?:mlp|moe)\.experts)\.(gate_up_proj|up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_SHARED = re.compile(r"(.+\.mlp\.shared_experts)\.input_linear\.(\w+)")
_BIAS = ".mlp.gate.bias"


class _Piece(CheckpointTensor):
    """A tensor that is stored as a part of another, or in another shape."""

    def __init__(self, stored: CheckpointTensor, name: str, shape: tuple[int, ...], part: Part | None) -> None:
        self.name, self.shape = name, shape
        self._stored, self._part, self.is_e4m3 = stored, part, stored.is_e4m3 and len(stored.shape) == len(shape)

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        return take(self._stored.load(dtype, device, self._part).reshape(self.shape), part)

    def stored(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.stored`."""
        return take(self._stored.stored(self._part).reshape(self.shape), part)


def split_experts(tensors: Iterable[CheckpointTensor]) -> Iterator[CheckpointTensor]:
    """A checkpoint's tensors, by their names in native models: one tensor of all experts of a layer ([N, 2M, E], [N, M, E] or
    [N, E, M]) as those of each; the gate and up of what all tokens take likewise, which Granite stores as one matrix; and a
    router's bias, which ERNIE stores as [1, N], as one row.

    Raises:
        ModelError: a tensor of gates and ups cannot be halved, or blocks lack their scales.
    """
    tensors = list(tensors)  # some perhaps twice, which is for others to refuse
    interleaved, pieces = split_interleaved({tensor.name: tensor for tensor in tensors})
    yield from pieces
    for tensor in tensors:
        if tensor.name in interleaved:
            continue
        match = _MERGED.fullmatch(tensor.name)
        if match is not None and len(tensor.shape) == 3:
            yield from _of_each(tensor, match[1], _PARTS[match[2]])
        elif match := _SHARED.fullmatch(tensor.name):
            yield from _halves(tensor, match[1], match[2])
        elif tensor.name.endswith(_BIAS) and len(tensor.shape) == 2 and tensor.shape[0] == 1:
            yield _Piece(tensor, tensor.name, tensor.shape[1:], None)
        else:
            yield tensor


def _of_each(tensor: CheckpointTensor, path: str, parts: tuple[str, ...]) -> Iterator[CheckpointTensor]:
    num_experts, outputs, inputs = tensor.shape
    if outputs % len(parts):
        raise ModelError(
            f"{tensor.name} has shape {list(tensor.shape)}: of each expert, {outputs} rows are not {' and '.join(parts)} of "
            "equal length; config and weights are not of one model."
        )
    rows = outputs // len(parts)
    for expert in range(num_experts):
        for index, part in enumerate(parts):
            piece = Part((Cut(num_experts, expert, 1),), Cut(outputs, index * rows, rows))
            yield _Piece(tensor, f"{path}.{expert}.{part}.weight", (rows, inputs), piece)


def _halves(tensor: CheckpointTensor, path: str, kind: str) -> Iterator[CheckpointTensor]:
    """Gate and up, of a matrix that has the rows of both, or of its scales: one for all of it is that of either."""
    rows, *rest = tensor.shape or (1,)
    for index, part in enumerate(_PARTS["gate_up_proj"]):
        name = f"{path}.{part}.{kind}"
        if rows % 2:
            yield _Piece(tensor, name, tuple(tensor.shape), None)
        else:
            piece = Part((Cut(rows, index * (rows // 2), rows // 2),), Cut.whole(rest[0]) if rest else None)
            yield _Piece(tensor, name, (rows // 2, *rest), piece)
