"""From settings to how an engine has to do with others."""

from __future__ import annotations

from collections.abc import Callable

from stepgraph.config.transfer import TransferConfig
from stepgraph.transfer.base import Backend
from stepgraph.transfer.cuda_peer import CudaBackend
from stepgraph.transfer.leases import Leases
from stepgraph.transfer.mover import CopyBlocks, copy_blocks
from stepgraph.transfer.peer import Patience
from stepgraph.transfer.rank_cache import ExportedCache, RankCache
from stepgraph.transfer.shared_memory import SharedMemoryBackend
from stepgraph.transfer.sockets import AllowedHosts
from stepgraph.transfer.transfers import EngineTransfers

GRACE_S = 2.0
"""After which blocks of a lease that has expired while it was read go back."""


_BACKENDS = {made.name: made for made in (SharedMemoryBackend, CudaBackend)}


def create_backend(name: str, cache: RankCache) -> Backend:
    """The back end `name` of a rank, in the process that has its cache.

    Raises:
        ConfigError: the cache does not lie where it needs it.
    """
    return _BACKENDS[name](cache)


def copy_for(cache: RankCache) -> CopyBlocks:
    """What copies blocks between a rank's cache and host memory that its device reaches."""
    return CudaBackend(cache).copy if cache.tensors[0][0].is_cuda else copy_blocks


def create_transfers(
    config: TransferConfig, export_cache: Callable[[str], ExportedCache], platform: str, model: str
) -> EngineTransfers:
    """How an engine has to do with others, as `config` says.

    Args:
        config: what it does for others, and how.
        export_cache: see `stepgraph.executor.base.Executor.export_cache`.
        platform: name of that where the cache is.
        model: digest of the weights, see `stepgraph.transfer.messages.Hello.model`.

    Raises:
        ConfigError: its cache does not lie where others reach it, or it cannot listen for them.
    """
    backend = config.kv_transfer_backend or "auto"
    if backend == "auto":
        backend = (CudaBackend if platform == "cuda" else SharedMemoryBackend).name
    return EngineTransfers(
        export_cache(backend),
        model,
        backend,
        _BACKENDS[backend].moves,
        Leases(config.kv_lease, GRACE_S),
        config.secret(),
        address=(config.kv_transfer_host, config.kv_transfer_port) if config.gives else None,
        hosts=AllowedHosts(config.kv_transfer_peers) if config.takes else None,
        patience=Patience(config.kv_lease, config.kv_transfer_timeout),
    )
