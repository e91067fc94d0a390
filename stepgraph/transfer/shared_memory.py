"""Back end for engines of one machine whose caches lie in host memory: the sink maps the source's, and copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from stepgraph.platforms.shared_memory import Address, SharedMemory, SharedMemoryError, map_shared_file
from stepgraph.step.signals import has_written
from stepgraph.transfer.base import RemoteMemory, TransferError
from stepgraph.transfer.layout import BlockLayout, TensorLayout
from stepgraph.transfer.messages import Hello
from stepgraph.transfer.mover import Heads, copy_blocks, heads_of
from stepgraph.transfer.rank_cache import RankCache


class SharedMemoryBackend:
    """See `stepgraph.transfer.base.Backend`.

    Args:
        cache: of this rank, in host memory.
    """

    name = "shared_memory"
    moves: Literal["sink"] = "sink"
    copy = staticmethod(copy_blocks)

    def __init__(self, cache: RankCache) -> None:
        self._cache = cache

    def describe(self) -> str:
        """See `Backend.describe`; "" if the cache is not to be mapped by others."""
        memory, signals = self._cache.memory, self._cache.signals
        if signals is None or not isinstance(memory, SharedMemory):
            return ""
        offsets = [[memory.offset(tensor) for tensor in tensors] for tensors in self._cache.tensors]
        num_blocks = next(len(tensor) for tensors in self._cache.tensors for tensor in tensors)
        return json.dumps(
            {
                "memory": memory.file.address,
                "words": signals.file.address,
                "num_blocks": num_blocks,
                "offsets": offsets,
            }
        )

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
        try:
            said = json.loads(text)
            memory, words = (Address(*said[name]) for name in ("memory", "words"))
            num_blocks, offsets = said["num_blocks"], said["offsets"]
            good = all(
                type(value) is kind for address in (memory, words) for value, kind in zip(address, _KINDS, strict=True)
            )
            good = good and type(num_blocks) is int and [len(of) for of in offsets] == [len(of) for of in layout.layers]
            good = good and all(type(offset) is int for of in offsets for offset in of)
            good = good and words.num_bytes == 8 * (1 + layout.num_model_layers) and num_blocks > 0
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            raise TransferError(f"another engine's memory is described by {text[:200]!r}, which makes no sense here")
        try:
            mapped = map_shared_file(memory)
            self.words: memoryview[int] = memoryview(map_shared_file(words))[: words.num_bytes].cast("q")
        except SharedMemoryError as error:
            raise TransferError(str(error)) from error
        self.tensors: list[list[Tensor]] = []
        for items, of in zip(layout.layers, offsets, strict=True):
            self.tensors.append([])
            for item, offset in zip(items, of, strict=True):
                shape = (num_blocks, layout.block_size, *_shape(item, heads))
                dtype = getattr(torch, item.dtype.removeprefix("torch."))
                count = prod(shape)
                if not 0 <= offset <= memory.num_bytes - count * dtype.itemsize:
                    raise TransferError(
                        f"a tensor of {num_blocks} blocks at byte {offset} is beyond another engine's memory"
                    )
                self.tensors[-1].append(torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape))


_KINDS = (int, int, int, str)
"""Of the fields of an `Address`."""


def _shape(item: TensorLayout, heads: Heads) -> tuple[int, ...]:
    """What a rank has of a token in a tensor."""
    return (heads(item.shape[0]).length, *item.shape[1:]) if item.has_heads else item.shape
