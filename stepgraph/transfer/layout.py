"""What a KV block is, so that two engines can tell whether one's are the other's, and which parts of them go where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import NamedTuple

import torch

from stepgraph.parallel.shard import Cut
from stepgraph.step.memory import CacheLayout


@dataclass(frozen=True)
class TensorLayout:
    """What a token has in one of the tensors of a layer's cache, of all ranks together."""

    shape: tuple[int, ...]
    dtype: str
    has_heads: bool
    """Whether the first dimension is of heads, which ranks may share."""


@dataclass(frozen=True)
class BlockLayout:
    """What a block is, of all ranks together: the same of engines that may take each other's blocks."""

    block_size: int
    """Tokens."""
    lookahead: int
    """Tokens after a block that its content depends on."""
    num_model_layers: int
    layers: tuple[tuple[TensorLayout, ...], ...]
    """Of each layer that has a cache of its own, the model's and then the drafter's."""
    owners: tuple[int, ...]
    """Of each of these, its place among all layers."""

    @classmethod
    def of(cls, layout: CacheLayout) -> BlockLayout:
        """That of an engine, as any of its ranks has it."""
        owners = tuple(index for index, spec in enumerate(layout.specs) if spec.shares is None)
        layers = []
        for spec in (layout.specs[index] for index in owners):
            items = [(item.shape[1:], str(item.dtype)) for item in spec.per_block(layout.block_size)]
            heads = spec.heads
            layers.append(
                tuple(
                    TensorLayout(shape if heads is None else (heads.size, *shape[1:]), dtype, heads is not None)
                    for shape, dtype in items
                )
            )
        return cls(layout.block_size, layout.lookahead, len(layout.model_specs), tuple(layers), owners)

    @property
    def digest(self) -> str:
        """Names it: equal of equal layouts, and of others never."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def block_bytes(self) -> int:
        """Of a block, in all layers and of all heads."""
        tokens = [item for items in self.layers for item in items]
        return sum(
            self.block_size * prod(item.shape) * getattr(torch, item.dtype.removeprefix("torch.")).itemsize
            for item in tokens
        )

    def signal_of(self, layer: int) -> int:
        """Which of `KVSignals`' numbers says that entry `layer` of `layers` has been written: the layer's own, and of a drafter's
        the whole step's."""
        return min(self.owners[layer], self.num_model_layers)


class Piece(NamedTuple):
    """Neighbouring heads that go from a rank of the source to one of the sink."""

    rank: int  # of the source
    source: int  # first head, among those that rank has
    target: int  # likewise, of the sink's rank
    length: int  # heads


def pieces(sources: Sequence[Cut], target: Cut, rank: int) -> list[Piece]:
    """Where the heads of a rank of the sink come from. Each comes once; of several ranks that have it, ranks of the sink take
    turns.

    Args:
        sources: of each rank of the source, the heads that it has.
        target: those that the sink's rank has.
        rank: the sink's rank.
    """
    found: list[Piece] = []
    end = target.begin + target.length
    head = target.begin
    while head < end:
        holders = [i for i, cut in enumerate(sources) if cut.begin <= head < cut.begin + cut.length]
        assert holders, (sources, target)
        holder = holders[rank % len(holders)]
        cut = sources[holder]
        length = min(end, cut.begin + cut.length) - head
        found.append(Piece(holder, head - cut.begin, head - target.begin, length))
        head += length
    return found
