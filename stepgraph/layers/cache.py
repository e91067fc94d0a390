"""What a layer keeps of requests between steps.

A model lists one `CacheSpec` per layer, a drafter its own. Whoever is above the layers adds up bytes, allocates, and hands each
layer its cache, without looking inside: only a layer and the operators of its kind do that.

Memory comes in two forms. *Blocks* are granted to requests as they grow, and hold an entry for each of `block_size` tokens.
A *line* holds what a layer knows of a request as a whole: each that runs writes one, and goes on to another where the one it had
is kept for others (`LineRows`). Block 0 and line 0 are null: padding reads and writes there. Layers with and without a window may
be in block groups of their own, which share that memory: a block is of one group at a time, and of fewer tokens in layers that
keep more of each (see `stepgraph.abi.block_groups`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stepgraph.layers.inputs import AttentionSpec
from stepgraph.parallel.shard import Cut


class Item(NamedTuple):
    """What one block, or one line, has in one tensor of a cache."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class LayerCache(Protocol):
    """The tensors of one layer, at addresses that stay. For those that check them all; what they mean, the layer knows."""

    @property
    def block_tensors(self) -> tuple[Tensor, ...]:
        """Each [blocks, block_size, …]."""

    @property
    def line_tensors(self) -> tuple[Tensor, ...]:
        """Each [lines, …]."""

    def lay_out(self, line: int, computed: int, generator: torch.Generator) -> None:
        """Fill a line at random with what earlier steps may have left there of a request of `computed` tokens. For checks;
        not inside a graph."""

    def line_content(self, line: int, end: int) -> tuple[Tensor, ...]:
        """What a line says after a step that ran a request's tokens up to position `end`, exclusive: all that a later
        step may read. For checks."""


class CacheSpec(ABC):
    """What one layer keeps. A kind of cache is a subclass, and the class of its tensors."""

    shares: int | None = None
    """An earlier layer whose cache this layer uses too; counted through the model's layers and on through the drafter's."""

    heads: Cut | None = None
    """Where the second dimension of its items is of heads: which of the model's this rank has; None: it has all there is."""

    starts_from_blocks: bool = True
    """Whether a request can start behind tokens of which it has the blocks and nothing else."""

    @property
    @abstractmethod
    def reach(self) -> int | None:
        """The last positions whose blocks a token reads, its own included; 0: all; None: it reads no blocks."""

    @abstractmethod
    def per_block(self, block_size: int) -> tuple[Item, ...]:
        """What a block of `block_size` tokens has in each of `LayerCache.block_tensors`; shapes begin with `block_size`."""

    @abstractmethod
    def per_line(self, num_drafts: int) -> tuple[Item, ...]:
        """What a line has in each of `LayerCache.line_tensors`, where a step verifies up to `num_drafts` proposals of a row."""

    @abstractmethod
    def cache(self, block_tensors: Sequence[Tensor], line_tensors: Sequence[Tensor]) -> LayerCache:
        """The layer's cache over tensors that were made for it."""


@dataclass(frozen=True)
class PagedSpec(CacheSpec):
    """Keys and values of grouped-query attention, in blocks."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int = 0  # last keys a token sees, its own included; 0: all
    shares: int | None = None
    heads: Cut | None = None  # which of the model's key/value heads they are; None: all

    @classmethod
    def of(cls, attention: AttentionSpec, dtype: torch.dtype, heads: Cut | None = None) -> PagedSpec:
        """What a layer of such attention keeps in `dtype`."""
        return cls(attention.num_kv_heads, attention.head_dim, dtype, attention.window, heads=heads)

    @property
    def reach(self) -> int:
        """See `CacheSpec.reach`."""
        return self.window

    def per_block(self, block_size: int) -> tuple[Item, ...]:
        """See `CacheSpec.per_block`."""
        return (Item((block_size, self.num_kv_heads, self.head_dim), self.dtype),) * 2

    def per_line(self, num_drafts: int) -> tuple[Item, ...]:
        """See `CacheSpec.per_line`."""
        return ()

    def cache(self, block_tensors: Sequence[Tensor], line_tensors: Sequence[Tensor]) -> PagedCache:
        """See `CacheSpec.cache`."""
        keys, values = block_tensors
        return PagedCache(keys, values)


class PagedCache(NamedTuple):
    """Of a `PagedSpec`. Entry i of block b belongs to token i of those that b holds."""

    keys: Tensor  # [blocks, block_size, G, D]
    values: Tensor  # likewise
    group: int = 0  # its block group: whose table says where its blocks are

    @property
    def block_tensors(self) -> tuple[Tensor, ...]:
        """See `LayerCache.block_tensors`."""
        return self.keys, self.values

    @property
    def line_tensors(self) -> tuple[Tensor, ...]:
        """See `LayerCache.line_tensors`."""
        return ()

    def lay_out(self, line: int, computed: int, generator: torch.Generator) -> None:
        """See `LayerCache.lay_out`."""

    def line_content(self, line: int, end: int) -> tuple[Tensor, ...]:
        """See `LayerCache.line_content`."""
        return ()


@dataclass(frozen=True)
class LatentSpec(CacheSpec):
    """One entry per token for all heads of multi-head latent attention, in blocks; the same on all ranks."""

    size: int  # of an entry: the latent, and the rotated part of the keys
    dtype: torch.dtype
    shares: int | None = None

    @property
    def reach(self) -> int:
        """See `CacheSpec.reach`."""
        return 0

    def per_block(self, block_size: int) -> tuple[Item, ...]:
        """See `CacheSpec.per_block`."""
        return (Item((block_size, self.size), self.dtype),)

    def per_line(self, num_drafts: int) -> tuple[Item, ...]:
        """See `CacheSpec.per_line`."""
        return ()

    def cache(self, block_tensors: Sequence[Tensor], line_tensors: Sequence[Tensor]) -> LatentCache:
        """See `CacheSpec.cache`."""
        (entries,) = block_tensors
        return LatentCache(entries)


class LatentCache(NamedTuple):
    """Of a `LatentSpec`. Entry i of block b belongs to token i of those that b holds."""

    entries: Tensor  # [blocks, block_size, L]
    group: int = 0  # likewise

    @property
    def block_tensors(self) -> tuple[Tensor, ...]:
        """See `LayerCache.block_tensors`."""
        return (self.entries,)

    @property
    def line_tensors(self) -> tuple[Tensor, ...]:
        """See `LayerCache.line_tensors`."""
        return ()

    def lay_out(self, line: int, computed: int, generator: torch.Generator) -> None:
        """See `LayerCache.lay_out`."""

    def line_content(self, line: int, end: int) -> tuple[Tensor, ...]:
        """See `LayerCache.line_content`."""
        return ()
