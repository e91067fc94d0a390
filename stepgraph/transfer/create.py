"""From settings to how an engine has to do with others."""

from __future__ import annotations

from collections.abc import Callable

from stepgraph.config.transfer import TransferConfig
from stepgraph.errors import ConfigError
from stepgraph.transfer import nixl
from stepgraph.transfer.base import Backend
from stepgraph.transfer.cuda_peer import CudaBackend
from stepgraph.transfer.leases import Leases
from stepgraph.transfer.local_movers import LocalMovers
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


def export_cache(name: str, cache: RankCache) -> ExportedCache:
    """A rank's cache, in the process that has it, for others to take from and to be filled.

    Args:
        name: of the back end.
        cache: of the rank.

    Raises:
        ConfigError: the cache does not lie where that needs it, or something is not installed.
    """
    if name == nixl.NAME:
        pushing = nixl.NixlMovers(cache)
        return ExportedCache(cache.layout, is_cut=False, ranks=("",), movers=pushing, receive=pushing.receive)
    needed, there = "cuda" if name == CudaBackend.name else "cpu", cache.tensors[0][0].device.type
    if there != needed:
        raise ConfigError(
            f"kv_transfer_backend={name!r} moves what lies in memory of device {needed!r}, and the cache is on {there!r}; use "
            "auto",
            param="kv_transfer_backend",
        )
    backend = create_backend(name, cache)
    movers = LocalMovers(cache, backend)
    return ExportedCache(cache.layout, is_cut=cache.shard.size > 1, ranks=(backend.describe(),), movers=movers)


def create_transfers(
    config: TransferConfig, export: Callable[[str], ExportedCache], platform: str, model: str
) -> EngineTransfers:
    """How an engine has to do with others, as `config` says.

    Args:
        config: what it does for others, and how.
        export: see `stepgraph.executor.base.Executor.export_cache`.
        platform: name of that where the cache is.
        model: digest of the weights, see `stepgraph.transfer.messages.Hello.model`.

    Raises:
        ConfigError: its cache does not lie where others reach it, or it cannot listen for them.
    """
    backend = config.kv_transfer_backend or "auto"
    if backend == "auto":
        backend = (CudaBackend if platform == "cuda" else SharedMemoryBackend).name
    return EngineTransfers(
        export(backend),
        model,
        backend,
        Leases(config.kv_lease, GRACE_S),
        config.secret(),
        address=(config.kv_transfer_host, config.kv_transfer_port) if config.gives else None,
        hosts=AllowedHosts(config.kv_transfer_peers) if config.takes else None,
        patience=Patience(config.kv_lease, config.kv_transfer_timeout),
    )
