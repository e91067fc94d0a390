"""From settings to how an engine has to do with others."""

from __future__ import annotations

from stepgraph.transfer.base import Backend
from stepgraph.transfer.cuda_peer import CudaBackend
from stepgraph.transfer.rank_cache import RankCache
from stepgraph.transfer.shared_memory import SharedMemoryBackend


def create_backend(name: str, cache: RankCache) -> Backend:
    """The back end `name` of a rank, in the process that has its cache.

    Raises:
        ConfigError: the cache does not lie where it needs it.
    """
    return {made.name: made for made in (SharedMemoryBackend, CudaBackend)}[name](cache)
