"""Tensors that checkpoints keep in pieces: the convolutions of queries, keys and values of OLMo's hybrid models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.parallel.shard import Part

_PIECE = re.compile(r"(?P<layer>.+\.linear_attn)\.(?P<part>[qkv])_conv1d\.weight")


class _Joined(CheckpointTensor):
    """Pieces after each other. They are read whole, whatever part is asked for: they are small."""

    def __init__(self, name: str, pieces: Sequence[CheckpointTensor]) -> None:
        self.name, self.shape = name, (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        self._pieces = pieces

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        return take(torch.cat([piece.load(dtype, device) for piece in self._pieces]), part)

    def stored(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.stored`."""
        return take(torch.cat([piece.stored() for piece in self._pieces]), part)


def join_convolutions(tensors: Iterable[CheckpointTensor]) -> Iterator[CheckpointTensor]:
    """A checkpoint's tensors, with one convolution of a layer in place of those of queries, keys and values. Where one ends and
    the next begins is of no account: transformers, which joins them too, saves other pieces than it has read."""
    layers: dict[str, dict[str, CheckpointTensor]] = {}
    for tensor in tensors:
        if match := _PIECE.fullmatch(tensor.name):
            layers.setdefault(match["layer"], {})[match["part"]] = tensor
        else:
            yield tensor
    for layer, pieces in layers.items():
        if pieces.keys() == set("qkv") and len({piece.shape[1:] for piece in pieces.values()}) == 1:
            yield _Joined(f"{layer}.conv1d.weight", [pieces[part] for part in "qkv"])
        else:
            yield from pieces.values()  # which no model takes, and a refusal names
