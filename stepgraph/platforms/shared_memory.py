"""Memory of the host that other processes of the same user can map while its owner lives.

It has no name in any folder: others find it as an open file of the owner, so that nothing is left of it when the owner is killed.
Those who have mapped it keep it. Linux only.
"""

from __future__ import annotations

import mmap
import os
import secrets
import stat
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stepgraph.errors import ConfigError, StepgraphError
from stepgraph.platforms.torch_memory import TorchMemory

_ALIGNMENT = 512
"""Bytes; as in `stepgraph.platforms.cuda_memory`."""
_TOKEN_BYTES = 16
_PORTABLE = 1
"""Of `cudaHostRegister`."""

Owner = TypeVar("Owner")


class SharedMemoryError(StepgraphError):
    """Memory of another process cannot be mapped: why."""


class Address(NamedTuple):
    """Where others find memory, in plain values."""

    pid: int
    fd: int
    """Of that process."""
    num_bytes: int
    token: str
    """At the end of the memory: a process of that number may be another, in another container or later."""


class SharedFile:
    """Zeroed memory of this process that others can map.

    Args:
        num_bytes: of it. Pages that are never written take no room.

    Raises:
        ConfigError: the system has no such memory.
    """

    def __init__(self, num_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise ConfigError(
                "engines that give keys and values to others need Linux; leave splitwise_role at mixed",
                param="splitwise_role",
            )
        self._num_bytes = num_bytes
        token = secrets.token_bytes(_TOKEN_BYTES)
        self.fd = os.memfd_create("stepgraph-shared")
        """Open until `close`."""
        try:
            os.ftruncate(self.fd, num_bytes + _TOKEN_BYTES)
            self.memory = mmap.mmap(self.fd, num_bytes + _TOKEN_BYTES)
            """`num_bytes`, and then the token. Lasts as long as anything in it."""
        except BaseException:
            os.close(self.fd)
            raise
        self.memory[num_bytes:] = token
        self.address = Address(os.getpid(), self.fd, num_bytes, token.hex())
        self.close: weakref.finalize[[int], SharedFile] = weakref.finalize(self, os.close, self.fd)
        """Has the effect that nobody can map it any more; so does the end of this object."""

    def clear(self) -> None:
        """Give its pages back. What it holds is undefined then, also for others who have mapped it."""
        whole_pages = self._num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if whole_pages:
            self.memory.madvise(mmap.MADV_REMOVE, 0, whole_pages)


def map_shared_file(address: Address) -> mmap.mmap:
    """The memory at an address, to be read. Writes to what this returns would be nobody else's.

    Raises:
        SharedMemoryError: there is no such memory, or it is another user's.
    """
    pid, fd, num_bytes, token = address
    path = f"/proc/{int(pid)}/fd/{int(fd)}"
    try:
        # Whatever is open there now: what is no file must not be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise SharedMemoryError(f"{path} is not memory that a process of this user shares")
            if found.st_size != num_bytes + _TOKEN_BYTES or num_bytes < 0:
                raise SharedMemoryError(f"{path} has {found.st_size} bytes and not {num_bytes + _TOKEN_BYTES}")
            memory = mmap.mmap(descriptor, found.st_size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
    except (OSError, ValueError, OverflowError) as error:
        raise SharedMemoryError(
            f"memory of process {pid} cannot be mapped ({error}); is it on this machine?"
        ) from error
    if memory[num_bytes:].hex() != token:
        raise SharedMemoryError(f"{path} is other memory than was meant; is process {pid} in another container?")
    return memory


def pin(owner: Owner, memory: Tensor, device: torch.device) -> weakref.finalize[[int | None, Tensor], Owner]:
    """Let a device reach host memory that this process has mapped, if it does not reach all of it.

    Args:
        owner: of the memory; its end has the effect of calling what this returns.
        memory: contiguous, on whole pages or alone in its last one.
        device: any.

    Returns:
        Takes the memory from the device, which is done with it.

    Raises:
        StepgraphError: the device cannot reach it.
    """
    address = None
    if device.type == "cuda":
        address = memory.data_ptr()
        status = torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, _PORTABLE)
        if int(status) != 0:
            raise StepgraphError(f"{device} cannot map memory that processes share ({status})")
    finalizer = weakref.finalize(owner, _unpin, address, memory)
    finalizer.atexit = False  # a device that hangs may keep it
    return finalizer


def _unpin(address: int | None, memory: Tensor) -> None:
    """`memory`: what lies at the address, which may go then."""
    if address is not None:
        torch.cuda.cudart().cudaHostUnregister(address)


class SharedMemory(TorchMemory):
    """Host memory of tensors that others can map; see `stepgraph.platforms.base.DeviceMemory`.

    Args:
        sizes: bytes of each storage that `zeros` will make.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        super().__init__(torch.device("cpu"), releasable=True)
        self.file = SharedFile(sum(map(_aligned, sizes)))
        self._used = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `DeviceMemory.zeros`."""
        count = torch.Size(shape).numel()
        start, self._used = self._used, self._used + _aligned(count * dtype.itemsize)
        assert self._used <= self.file.address.num_bytes, (self._used, self.file.address)
        if not count:
            return torch.zeros(tuple(shape), dtype=dtype)
        return torch.frombuffer(self.file.memory, dtype=dtype, count=count, offset=start).view(tuple(shape))

    def offset(self, tensor: Tensor) -> int:
        """Where a tensor of `zeros` begins, in bytes."""
        begin = torch.frombuffer(self.file.memory, dtype=torch.uint8, count=1).data_ptr()
        offset = tensor.data_ptr() - begin
        assert 0 <= offset < self._used, offset
        return offset

    def release(self, *, keep_content: bool) -> None:
        """See `DeviceMemory.release`."""
        if not keep_content:
            super().free()
            self.file.clear()

    def free(self) -> None:
        """See `DeviceMemory.free`."""
        super().free()
        self.file.clear()
        self.file.close()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
