"""Back end for engines of one machine whose caches lie in host memory: the sink maps the source's, and copies."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from stepgraph.platforms.shared_memory import Address, SharedMemory, SharedMemoryError, map_shared_file
from stepgraph.step.signals import has_written
from stepgraph.transfer.base import RemoteMemory, TransferError
from stepgraph.transfer.described import describe, lay_out, read_description
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.messages import Hello
from stepgraph.transfer.mover import Heads, copy_blocks, heads_of
from stepgraph.transfer.rank_cache import RankCache


class SharedMemoryBackend:
    """See `stepgraph.transfer.base.Backend`.

    Args:
        cache: of this rank, in host memory.
    """

    name = "shared_memory"
    copy = staticmethod(copy_blocks)

    def __init__(self, cache: RankCache) -> None:
        self._cache = cache

    def describe(self) -> str:
        """See `Backend.describe`; "" if the cache is not to be mapped by others."""
        memory, signals = self._cache.memory, self._cache.signals
        if signals is None or not isinstance(memory, SharedMemory):
            return ""
        return describe(self._cache, memory.file.address, signals.file.address, memory.offset)

    def attach(self, peer: Hello) -> RemoteMemory:
        """See `Backend.attach`."""
        if self.name not in peer.backends:
            raise TransferError(f"engine {peer.engine} moves bytes by {', '.join(peer.backends)}, not by {self.name}")
        heads = heads_of(peer)
        return _MappedMemory([_MappedRank(*rank, self._cache.layout) for rank in zip(peer.ranks, heads, strict=True)])

    def close(self) -> None:
        """See `Backend.close`. The memory is its owners'."""


class _MappedMemory:
    """See `stepgraph.transfer.base.RemoteMemory`. What is mapped goes with the last tensor in it."""

    def __init__(self, ranks: Sequence[_MappedRank]) -> None:
        self._ranks = list(ranks)

    def tensors(self, rank: int) -> Sequence[Sequence[Tensor]]:
        return self._ranks[rank].tensors

    def has_written(self, rank: int, signal: int, step: int) -> bool:
        return has_written(self._ranks[rank].words, signal, step)

    def close(self) -> None:
        self._ranks.clear()


class _MappedRank:
    """What a rank of another engine described, mapped.

    Raises:
        TransferError: it makes no sense, or cannot be mapped.
    """

    def __init__(self, text: str, heads: Heads, layout: BlockLayout) -> None:
        said = read_description(text, layout, (int, int, int, str))
        memory = Address(*said.memory)
        try:
            mapped = map_shared_file(memory)
            self.words = map_words(said.words)
        except SharedMemoryError as error:
            raise TransferError(str(error)) from error

        def view(offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            count = prod(shape)
            if not 0 <= offset <= memory.num_bytes - count * dtype.itemsize:
                raise ValueError(offset)
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)

        self.tensors = lay_out(said, layout, heads, view)


def map_words(words: Address) -> memoryview[int]:
    """Another engine's signals, as `has_written` reads them; SharedMemoryError if they cannot be mapped."""
    return memoryview(map_shared_file(words))[: words.num_bytes].cast("q")
