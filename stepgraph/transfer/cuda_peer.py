"""Back end for engines of one machine whose caches lie in GPUs' memory: the sink's GPU maps the source's, and gathers blocks.

Physical memory goes from process to process as a file descriptor, which only a socket between processes can carry. So each rank
that has something to give listens on one, whose name its `Hello` tells, and gives to processes of the same user. The sink maps
the memory for its own GPU. There is a direct way between the two then, or the driver refuses: nothing goes through the host.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.ops import copy_blocks
from stepgraph.platforms.cuda_memory import Exported, ImportedMemory, SleepableMemory
from stepgraph.platforms.shared_memory import SharedMemoryError
from stepgraph.step.signals import has_written
from stepgraph.transfer.base import BlockCopy, RemoteMemory, TransferError
from stepgraph.transfer.described import describe, lay_out, read_description
from stepgraph.transfer.messages import Hello
from stepgraph.transfer.mover import Heads, heads_of
from stepgraph.transfer.rank_cache import RankCache
from stepgraph.transfer.shared_memory import map_words

logger = logging.getLogger(__name__)

NUM_PROGRAMS = 16
"""Thread blocks that copy, see `stepgraph.ops.copy_blocks`. Within an H200 they bring 516 GB/s, and half as many 285 (see
benchmarks/transfer.md): where a link doubles what a read takes to come, these still bring 200, which a prompt is copied at faster
than it is computed. Each of them takes a multiprocessor from the sink's steps, of 132."""
_TIMEOUT_S = 10.0
_CREDENTIALS = struct.Struct("3i")
"""Of `SO_PEERCRED`: process, user, group."""


class CudaBackend:
    """See `stepgraph.transfer.base.Backend`.

    Args:
        cache: of this rank, in a GPU's memory.
    """

    name = "cuda"

    def __init__(self, cache: RankCache) -> None:
        self._cache = cache
        self._device = cache.tensors[0][0].device
        self._stream = torch.cuda.Stream(self._device)
        self._numbers = lru_cache(maxsize=16)(self._on_device)  # those of a move serve all its layers
        self._door: _Door | None = None
        for tensor in {
            (tensor.shape, tensor.dtype): tensor for tensors in cache.tensors for tensor in tensors
        }.values():
            self.copy([BlockCopy(tensor, (0,), tensor, (0,))])  # compiles the kernel before anybody waits for it

    def describe(self) -> str:
        """See `Backend.describe`; "" if the cache is not to be mapped by others. To be called once."""
        memory, signals = self._cache.memory, self._cache.signals
        if signals is None or not isinstance(memory, SleepableMemory):
            return ""
        assert self._door is None, self._door
        descriptor, num_bytes = memory.export()
        os.close(descriptor)  # while one is open, the memory stays, and the engine may sleep

        def export() -> int:
            self._enter()
            return memory.export().descriptor

        self._door = _Door(export)
        return describe(self._cache, (self._door.name, num_bytes), signals.file.address, memory.offset)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """See `Backend.copy`. Beside the work of the engine's thread, and in no order with it."""
        with torch.cuda.stream(self._stream):
            for run in _runs(copies):
                first, count = run.first, run.num_tensors
                copy_blocks(
                    _extended(first.source, run.source_step, count),
                    self._numbers(first.source_blocks, run.source_step, count),
                    _extended(first.target, run.target_step, count),
                    self._numbers(first.target_blocks, run.target_step, count),
                    NUM_PROGRAMS,
                )
        self._stream.synchronize()

    def attach(self, peer: Hello) -> RemoteMemory:
        """See `Backend.attach`."""
        if self.name not in peer.backends:
            raise TransferError(f"engine {peer.engine} moves bytes by {', '.join(peer.backends)}, not by {self.name}")
        self._enter()
        with ExitStack() as undo:
            ranks = []
            for text, heads in zip(peer.ranks, heads_of(peer), strict=True):
                ranks.append(self._map(text, heads))
                undo.callback(ranks[-1].memory.close)
            undo.pop_all()
        return _PeerMemory(ranks, self)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._door is not None:
            self._door.close()
            self._door = None
        self._numbers.cache_clear()

    def let_go(self, memory: ImportedMemory) -> None:
        """Map memory of another engine no more."""
        self._enter()
        memory.close()

    def _map(self, text: str, heads: Heads) -> _PeerRank:
        said = read_description(text, self._cache.layout, (str, int))
        name, num_bytes = said.memory
        descriptor = _fetch_descriptor(name)
        try:
            memory = ImportedMemory(Exported(descriptor, num_bytes), self._device)
        except (RuntimeError, OverflowError) as error:
            raise TransferError(
                f"{self._device} cannot map another engine's memory ({error}); is there a direct way between the two GPUs?"
            ) from error
        finally:
            os.close(descriptor)
        try:
            return _PeerRank(memory, lay_out(said, self._cache.layout, heads, memory.tensor), map_words(said.words))
        except SharedMemoryError as error:
            memory.close()
            raise TransferError(str(error)) from error
        except BaseException:
            memory.close()
            raise

    def _enter(self) -> None:
        """Make the device's context that of this thread."""
        torch.cuda.set_device(self._device)
        self._stream.synchronize()

    def _on_device(self, blocks: tuple[int, ...], step: int, count: int) -> Tensor:
        numbers = torch.tensor(blocks, dtype=torch.int32) + step * torch.arange(count, dtype=torch.int32).unsqueeze(1)
        return numbers.flatten().to(self._device)


class _Run(NamedTuple):
    """The same blocks of several tensors that lie at equal distances, at both ends. One launch copies them, for it takes the host
    as long as a layer's copy takes the device."""

    first: BlockCopy
    num_tensors: int
    source_step: int
    """From tensor to tensor, in blocks; any, if there is but one."""
    target_step: int


def _runs(copies: Sequence[BlockCopy]) -> list[_Run]:
    """All copies, those that follow each other in as few runs as may be."""
    runs: list[_Run] = []
    last: BlockCopy | None = None
    for copy in copies:
        if last is not None and (last.source_blocks, last.target_blocks) == (copy.source_blocks, copy.target_blocks):
            run, of_source, of_target = runs[-1], _step(last.source, copy.source), _step(last.target, copy.target)
            goes_on = run.num_tensors == 1 or (of_source, of_target) == (run.source_step, run.target_step)
            if of_source is not None and of_target is not None and goes_on:
                runs[-1], last = _Run(run.first, run.num_tensors + 1, of_source, of_target), copy
                continue
        runs.append(_Run(copy, 1, 0, 0))
        last = copy
    return runs


def _step(tensor: Tensor, following: Tensor) -> int | None:
    """Blocks from a tensor to one behind it that is laid out alike; None if there is no such number."""
    if (tensor.shape, tensor.stride(), tensor.dtype) != (following.shape, following.stride(), following.dtype):
        return None
    step, rest = divmod(following.data_ptr() - tensor.data_ptr(), tensor.stride(0) * tensor.itemsize)
    return step if step >= len(tensor) and not rest else None


def _extended(tensor: Tensor, step: int, count: int) -> Tensor:
    """The memory from a tensor on, as one with the blocks of `count` tensors, `step` blocks from each to the next."""
    if count == 1:
        return tensor
    shape = (step * (count - 1) + len(tensor), *tensor.shape[1:])
    num_bytes = tensor.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(shape, tensor.stride(), strict=True)))
    storage = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), tensor.device, num_bytes)
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, shape, tensor.stride())


class _PeerRank:
    """Memory of a rank of another engine, as it is mapped here."""

    def __init__(self, memory: ImportedMemory, tensors: list[list[Tensor]], words: memoryview[int]) -> None:
        self.memory, self.tensors, self.words = memory, tensors, words


class _PeerMemory:
    """See `stepgraph.transfer.base.RemoteMemory`."""

    def __init__(self, ranks: list[_PeerRank], backend: CudaBackend) -> None:
        self._ranks, self._backend = ranks, backend

    def tensors(self, rank: int) -> Sequence[Sequence[Tensor]]:
        return self._ranks[rank].tensors

    def has_written(self, rank: int, signal: int, step: int) -> bool:
        return has_written(self._ranks[rank].words, signal, step)

    def close(self) -> None:
        while self._ranks:
            self._backend.let_go(self._ranks.pop().memory)


class _Door:
    """Gives a file descriptor to every process of this user that asks.

    Args:
        export: opens one, which the door closes; RuntimeError if there is nothing to give.
    """

    def __init__(self, export: Callable[[], int]) -> None:
        self._export = export
        self.name = f"stepgraph-kv-{secrets.token_hex(16)}"
        """Of the socket, which is in no folder."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, name="stepgraph-kv-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give to nobody any more."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                other, _ = self._socket.accept()
            except OSError:  # it is closed
                return
            with other, suppress(OSError):  # whoever asks may be gone
                credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(credentials)[1] == os.getuid():
                    self._give(other)

    def _give(self, other: socket.socket) -> None:
        try:
            descriptor = self._export()
        except RuntimeError as error:
            logger.info("no memory is given to another engine now: %s", error)
            return
        try:
            socket.send_fds(other, [b"\0"], [descriptor])
        finally:
            os.close(descriptor)


def _fetch_descriptor(name: str) -> int:
    """What the door of that name gives."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(_TIMEOUT_S)
            asking.connect(f"\0{name}")
            _, descriptors, *_ = socket.recv_fds(asking, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except (OSError, ValueError) as error:
        raise TransferError(f"another engine's memory is not to be had ({error}); is it on this machine?") from error
    if not descriptors:
        raise TransferError("another engine does not give its memory; does it sleep, or is it another user's?")
    return descriptors[0]
