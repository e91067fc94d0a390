"""HostCopies: a second, larger place for blocks of a cache, in host memory, and the copies there and back."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from stepgraph.errors import ConfigError
from stepgraph.platforms.shared_memory import pin
from stepgraph.transfer.base import Move, Moves
from stepgraph.transfer.mover import CopyBlocks, Mover
from stepgraph.transfer.rank_cache import RankCache

_ALIGNMENT = 256
"""Bytes."""


class _Tensors:
    """See `stepgraph.transfer.base.RemoteMemory`: of this process, with all in it written."""

    def __init__(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        self._tensors = tensors

    def tensors(self, rank: int) -> Sequence[Sequence[Tensor]]:
        return self._tensors

    def has_written(self, rank: int, signal: int, step: int) -> bool:
        return True

    def close(self) -> None:
        pass


class HostCopies:
    """Room for blocks in host memory, and two movers.

    Args:
        cache: of the only rank.
        num_bytes: of host memory, which the device reaches from now on.
        copy: copies blocks between the two.

    Raises:
        ConfigError: it has no room for a block, or there is not so much memory.
    """

    def __init__(self, cache: RankCache, num_bytes: int, copy: CopyBlocks) -> None:
        layout, shard = cache.layout, cache.shard
        self.num_blocks = num_bytes // layout.block_bytes
        self.block_bytes = layout.block_bytes
        if not self.num_blocks:
            raise ConfigError(
                f"kv_host_cache_gib={num_bytes / 2**30:g} has no room for a KV block, which takes {layout.block_bytes} bytes",
                param="kv_host_cache_gib",
            )
        shapes = [[(self.num_blocks, *tensor.shape[1:]) for tensor in tensors] for tensors in cache.tensors]
        sizes = [
            [torch.Size(shape).numel() * tensor.itemsize for shape, tensor in zip(of_layer, tensors, strict=True)]
            for of_layer, tensors in zip(shapes, cache.tensors, strict=True)
        ]
        try:
            memory = mmap.mmap(-1, sum(_aligned(size) for of_layer in sizes for size in of_layer))
        except OSError as error:
            raise ConfigError(
                f"kv_host_cache_gib={num_bytes / 2**30:g}: there is not so much host memory ({error}); lower it",
                param="kv_host_cache_gib",
            ) from error
        whole, begin, host = torch.frombuffer(memory, dtype=torch.uint8), 0, []
        for tensors, of_layer, bytes_of_layer in zip(cache.tensors, shapes, sizes, strict=True):
            parts = []
            for tensor, shape, size in zip(tensors, of_layer, bytes_of_layer, strict=True):
                parts.append(whole[begin : begin + size].view(tensor.dtype).view(shape))
                begin += _aligned(size)
            host.append(parts)
        self._unpin = pin(self, whole, cache.tensors[0][0].device)
        self._heads = [shard.heads]
        self._host, self._device = _Tensors(host), _Tensors(cache.tensors)
        self._out = Mover(layout, host, shard.heads, shard.rank, copy)
        self._back = Mover(layout, cache.tensors, shard.heads, shard.rank, copy)

    def put(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> Moves:
        """Copy blocks of the cache to host memory. No step under way writes them."""
        moves = self._out.begin(self._device, self._heads)
        moves.submit(Move(tuple(blocks), tuple(host_blocks), -1))
        return moves

    def get(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> Moves:
        """Copy blocks of host memory into the cache. No step under way touches them."""
        moves = self._back.begin(self._host, self._heads)
        moves.submit(Move(tuple(host_blocks), tuple(blocks), -1))
        return moves

    def close(self) -> None:
        """Copy nothing more, wait for the copies under way, and give the memory back."""
        self._out.close()
        self._back.close()
        self._unpin()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
