"""LocalMovers: the mover of one rank, in the process that has its cache."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence

from stepgraph.transfer.base import Backend, RemoteMemory
from stepgraph.transfer.messages import Hello
from stepgraph.transfer.mover import Heads, Mover, Moving, heads_of
from stepgraph.transfer.rank_cache import RankCache

_NAP_S = 1e-4
"""Between two looks whether a copy has ended."""


class LocalMovers:
    """See `stepgraph.transfer.base.Movers`.

    Args:
        cache: of the rank.
        backend: over it, which is closed with this.
    """

    def __init__(self, cache: RankCache, backend: Backend) -> None:
        self._backend = backend
        self._mover = Mover(cache.layout, cache.tensors, cache.shard.heads, cache.shard.rank, backend.copy)
        self._sources: list[LocalSource] = []
        self._is_closed = False

    def attach(self, peer: Hello) -> LocalSource:
        """See `Movers.attach`."""
        source = LocalSource(self._mover, self._backend.attach(peer), heads_of(peer))
        self._sources = [*(source for source in self._sources if not source.is_closed), source]
        return source

    def close(self) -> None:
        """See `Movers.close`. Sources are closed too. Can be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._mover.close()
            for source in self._sources:
                source.close()
            self._backend.close()


class LocalSource:
    """See `stepgraph.transfer.base.SourceCaches`.

    Args:
        mover: copies.
        memory: of the source; closed with this.
        heads: what each of its ranks has.
    """

    def __init__(self, mover: Mover, memory: RemoteMemory, heads: Sequence[Heads]) -> None:
        self.num_blocks = next(len(tensor) for tensors in memory.tensors(0) for tensor in tensors)
        self._mover, self._memory, self._heads = mover, memory, heads
        self._begun: weakref.WeakSet[Moving] = weakref.WeakSet()  # the mover keeps those that it has to do with
        self.is_closed = False

    def begin(self) -> Moving:
        """See `SourceCaches.begin`."""
        moving = self._mover.begin(self._memory, self._heads)
        self._begun.add(moving)
        return moving

    def close(self) -> None:
        """See `SourceCaches.close`. Can be called again."""
        if self.is_closed:
            return
        self.is_closed = True
        for moving in list(self._begun):
            moving.cancel()
            while not moving.done():
                time.sleep(_NAP_S)
        self._memory.close()
