"""Back end for engines of several machines: NIXL carries the bytes, and sources write into the memory of sinks.

A sink cannot see a source's signals there, so the source moves. Both ends of a link have an agent of their own for it: whatever a
source is up to, it can write nothing into the sink's memory once the sink's agent has ended.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepgraph.errors import ConfigError
from stepgraph.transfer.base import BlockCopy, TransferError
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.messages import Hello
from stepgraph.transfer.mover import Mover, Moving
from stepgraph.transfer.rank_cache import RankCache

NAME = "nixl"
_NAP_S = 5e-5
"""Between two looks at a transfer."""
_DIRECT = {"cma", "knem", "xpmem"}
"""Of UCX's ways between processes of a machine, those by which one writes into another's memory without any help of it, even when
its agent has ended."""
_DIRECT_TOO = _DIRECT | {"all", "sm", "shm"}
"""With names that stand for several."""


class NixlMovers:
    """See `stepgraph.transfer.base.Movers`: those of a source.

    Args:
        cache: of the only rank, in host memory.

    Raises:
        ConfigError: it is not, or NIXL cannot be used.
    """

    def __init__(self, cache: RankCache) -> None:
        if cache.shard.size > 1:
            raise ConfigError(
                f"kv_transfer_backend='nixl' serves engines of one rank, and this one has {cache.shard.size}; use one, or "
                "another back end",
                param="kv_transfer_backend",
            )
        if any(tensor.device.type != "cpu" for tensors in cache.tensors for tensor in tensors):
            raise ConfigError(
                "kv_transfer_backend='nixl' moves host memory, and the cache is in a GPU's, whose mapped pages it would move "
                "slowly or not at all; use cuda between GPUs of one machine",
                param="kv_transfer_backend",
            )
        self._cache, self._nixl = cache, _load()
        self._sinks: list[_Sink] = []

    def attach(self, peer: Hello) -> _Sink:
        """See `Movers.attach`: reach a sink's caches."""
        if NAME not in peer.backends:
            raise TransferError(f"engine {peer.engine} moves bytes by {', '.join(peer.backends)}, not by {NAME}")
        if len(peer.ranks) != 1:
            raise TransferError(f"engine {peer.engine} has {len(peer.ranks)} ranks, and {NAME} serves those of one")
        self._sinks = [sink for sink in self._sinks if not sink.is_closed]
        self._sinks.append(_Sink(self._nixl, self._cache, peer.ranks[0]))
        return self._sinks[-1]

    def receive(self) -> NixlInbox:
        """See `ExportedCache.receive`."""
        return NixlInbox(self._nixl, self._cache)

    def close(self) -> None:
        """See `Movers.close`. Can be called again."""
        for sink in self._sinks:
            sink.close()


class NixlInbox:
    """See `stepgraph.transfer.base.Inbox`.

    Raises:
        TransferError: the memory cannot be written by others.
    """

    def __init__(self, nixl: Any, cache: RankCache) -> None:
        self._agent = _Agent(nixl, cache)
        said = {
            "agent": base64.b64encode(self._agent.metadata).decode(),
            "num_blocks": next(len(tensor) for tensors in cache.tensors for tensor in tensors),
            "addresses": [[tensor.data_ptr() for tensor in tensors] for tensors in cache.tensors],
        }
        self.ranks: tuple[str, ...] = (json.dumps(said),)

    def close(self) -> None:
        """See `Inbox.close`."""
        self._agent.close()


class _Agent:
    """An agent of NIXL that may read and write the cache of this rank."""

    def __init__(self, nixl: Any, cache: RankCache) -> None:
        memory = [(tensor.data_ptr(), tensor.nbytes, 0, "") for tensors in cache.tensors for tensor in tensors]
        try:
            self.agent: Any = nixl.nixl_agent(secrets.token_hex(16), nixl.nixl_agent_config(backends=["UCX"]))
            self._registered = self.agent.register_memory(memory, "DRAM")
            self.metadata: bytes = self.agent.get_agent_metadata()
        except Exception as error:  # of many kinds
            raise TransferError(f"NIXL cannot be given the cache ({error})") from error

    def close(self) -> None:
        """Nothing is moved by it any more, nor by others that it has told of its memory."""
        self.agent.deregister_memory(self._registered)
        self._registered = self.agent = None  # and with the last that knows of it, it ends


class _Sink:
    """See `stepgraph.transfer.base.SourceCaches`: the caches of a sink, as its source reaches them.

    Raises:
        TransferError: what it said makes no sense, or cannot be reached.
    """

    def __init__(self, nixl: Any, cache: RankCache, text: str) -> None:
        metadata, self.num_blocks, targets = _read(text, cache.layout)
        self._cache, self._agent = cache, _Agent(nixl, cache)
        try:
            self._remote = self._agent.agent.add_remote_agent(metadata)
        except Exception as error:
            self._agent.close()
            raise TransferError(f"NIXL cannot reach another engine ({error})") from error
        self.is_closed = False
        self._mover = Mover(cache.layout, targets, cache.shard.heads, 0, self._copy)

    def begin(self) -> Moving:
        """See `SourceCaches.begin`."""
        return self._mover.begin(_Own(self._cache), [self._cache.shard.heads])

    def close(self) -> None:
        """See `SourceCaches.close`. Can be called again."""
        if not self.is_closed:
            self.is_closed = True
            self._mover.close()
            self._agent.agent.remove_remote_agent(self._remote)
            self._agent.close()

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        """See `stepgraph.transfer.mover.CopyBlocks`: to what lies in the sink's memory."""
        agent = self._agent.agent
        pieces = [
            [_pieces(copy.source, copy.source.data_ptr(), copy.source_blocks) for copy in copies],
            [_pieces(copy.target, _address(copy.target), copy.target_blocks) for copy in copies],
        ]
        source, target = (agent.get_xfer_descs(np.concatenate(of), "DRAM") for of in pieces)
        handle = agent.initialize_xfer("WRITE", source, target, self._remote)
        try:
            state = agent.transfer(handle)
            while state == "PROC":
                time.sleep(_NAP_S)
                state = agent.check_xfer_state(handle)
        finally:
            agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TransferError(f"NIXL could not move {len(copies)} pieces: {state}")


class _Own:
    """See `stepgraph.transfer.base.RemoteMemory`: this rank's own."""

    def __init__(self, cache: RankCache) -> None:
        assert cache.signals is not None
        self._tensors, self._signals = cache.tensors, cache.signals

    def tensors(self, rank: int) -> Sequence[Sequence[Tensor]]:
        return self._tensors

    def has_written(self, rank: int, signal: int, step: int) -> bool:
        return self._signals.has_written(signal, step)

    def close(self) -> None:
        """It stays."""


def _pieces(tensor: Tensor, address: int, blocks: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Where blocks of a tensor lie that begins at an address: [blocks, 3], address, bytes and number of the device."""
    block = tensor[0]
    assert block.is_contiguous(), (tensor.shape, tensor.stride())
    found = np.zeros((len(blocks), 3), np.uint64)
    found[:, 0] = address + np.asarray(blocks, np.uint64) * np.uint64(tensor.stride(0) * tensor.itemsize)
    found[:, 1] = block.numel() * tensor.itemsize
    return found


def _read(text: str, layout: BlockLayout) -> tuple[bytes, int, list[list[Tensor]]]:
    """What a sink said of itself: its agent, its number of blocks, and its caches, of which only the addresses are there.

    Raises:
        TransferError: it makes no sense.
    """
    try:
        said = json.loads(text)
        metadata, num_blocks, addresses = base64.b64decode(said["agent"]), said["num_blocks"], said["addresses"]
        good = type(num_blocks) is int and 0 < num_blocks < 1 << 40
        good = good and [len(of) for of in addresses] == [len(of) for of in layout.layers]
        good = good and all(type(address) is int and 0 < address < 1 << 60 for of in addresses for address in of)
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise TransferError(f"another engine's memory is described by {text[:200]!r}, which makes no sense here")
    targets: list[list[Tensor]] = []
    for items, of in zip(layout.layers, addresses, strict=True):
        targets.append([])
        for item, address in zip(items, of, strict=True):
            dtype = getattr(torch, item.dtype.removeprefix("torch."))
            if address % dtype.itemsize:
                raise TransferError(f"a tensor of another engine is at {address}, where {dtype} is not")
            shape = (num_blocks, layout.block_size, *item.shape)
            # All addresses that there are, as one tensor without content: views of it know where they are.
            space = torch.empty((1 << 61) // dtype.itemsize, dtype=dtype, device="meta")
            strides = torch.empty(shape, device="meta").stride()
            targets[-1].append(space.as_strided(shape, strides, address // dtype.itemsize))
    return metadata, num_blocks, targets


def _address(target: Tensor) -> int:
    """Of a tensor that `_read` made, or a view of it."""
    return int(target.storage_offset()) * target.itemsize


def _load() -> Any:
    """NIXL's Python interface, with UCX told to go no way that leads past an agent.

    Raises:
        ConfigError: it is not installed, or UCX is told otherwise.
    """
    ways = os.environ.setdefault("UCX_TLS", "^" + ",".join(sorted(_DIRECT)))
    names = set(ways.lower().removeprefix("^").split(","))
    if not names >= _DIRECT if ways.startswith("^") else _DIRECT_TOO & names:
        raise ConfigError(
            f"UCX_TLS={ways!r} lets processes of a machine write into each other's memory when nobody looks; leave "
            f"{', '.join(sorted(_DIRECT))} out, e.g. UCX_TLS=rc,tcp, or do not set it"
        )
    try:
        return importlib.import_module("nixl._api")
    except ImportError as error:
        raise ConfigError(
            f"kv_transfer_backend='nixl' needs NIXL, which cannot be imported ({error}); pip install nixl, or choose another",
            param="kv_transfer_backend",
        ) from error
