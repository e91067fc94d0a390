"""Device memory that can be given up and taken back at the same addresses, so that captured graphs stay valid.

A range of virtual addresses is reserved for good. Physical memory is mapped into it piece by piece, as tensors are placed, and
unmapped and mapped again to sleep and to wake up. Shared memory is one piece, which other processes of the host map by a file
descriptor. See "Virtual Memory Management" in NVIDIA's CUDA driver API.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepgraph.errors import ConfigError

_ALIGNMENT = 512
"""Bytes; as torch's allocator aligns, which kernels with wide loads count on."""


class SleepableMemory:
    """See `stepgraph.platforms.base.DeviceMemory`. Its memory goes back with the last tensor in it, if not before by `free`.

    Args:
        sizes: bytes of each storage it will hold.
        device: a CUDA device.
        is_shared: other processes may map it, see `export`.

    Raises:
        ConfigError: the driver's Python bindings are not installed.
    """

    releasable = True

    def __init__(self, sizes: Iterable[int], device: torch.device, *, is_shared: bool = False):
        self._device, self._is_shared = device, is_shared
        torch.cuda.synchronize(device)  # makes the device's context this thread's
        self._driver = _Driver(device, is_shared=is_shared)
        self._size = _round_up(max(1, sum(_round_up(size, _ALIGNMENT) for size in sizes)), self._driver.granularity)
        self._address = self._driver.reserve(self._size)
        self._used = 0  # bytes handed out, from the start
        self._pieces: list[tuple[int, int]] = []  # (address, bytes) of the physical memory, one after the other
        self._mapped: list[tuple[int, int]] = []  # of these the ones that are mapped, likewise
        self._content: Tensor | None = None  # in host memory, while it sleeps
        self._finalizer = weakref.finalize(self, _free, self._driver, device, self._address, self._size, self._mapped)
        self._finalizer.atexit = False  # the process's end frees everything, and torch may be gone by then

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `DeviceMemory.zeros`."""
        bytes_B = self._take(torch.Size(shape).numel() * dtype.itemsize).zero_()
        return torch.empty(0, dtype=dtype, device=self._device).set_(bytes_B.untyped_storage()).resize_(tuple(shape))

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """See `DeviceMemory.adopt`. Copies one storage after the other, so that the peak is one storage more than before."""
        placed: dict[int, Tensor] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes():
                continue
            if storage.data_ptr() not in placed:
                old_B = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
                placed[storage.data_ptr()] = self._take(storage.nbytes()).copy_(old_B)
                del old_B
            new = torch.empty(0, dtype=tensor.dtype, device=self._device)
            tensor.data = new.set_(
                placed[storage.data_ptr()].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
            )

    def release(self, *, keep_content: bool) -> None:
        """See `DeviceMemory.release`."""
        torch.cuda.synchronize(self._device)
        if not keep_content:
            self._content = None
        elif self._mapped and self._content is None:  # else `restore` failed on its way, and the content is still there
            # Not pinned: torch rounds pinned memory up to a power of two and never gives it back.
            self._content = torch.empty(self._used, dtype=torch.uint8).copy_(self._bytes(0, self._used))
        _unmap(self._driver, self._mapped)

    def restore(self) -> None:
        """See `DeviceMemory.restore`.

        Raises:
            ConfigError: others use the device's memory now; can be called again.
        """
        torch.cuda.synchronize(self._device)
        for piece in self._pieces[len(self._mapped) :]:
            self._map(*piece)
        if self._content is not None:
            self._bytes(0, self._used).copy_(self._content)
            self._content = None

    def free(self) -> None:
        """See `DeviceMemory.free`."""
        self._content = None
        self._finalizer()

    def export(self) -> Exported:
        """By what other processes reach it, until it is released: those who have mapped it then keep the old physical memory
        from going back. Of shared memory; any thread of the device's context may call it.

        Raises:
            RuntimeError: it holds nothing, or has been released.
        """
        assert self._is_shared, self
        mapped = tuple(self._mapped)
        if not mapped:
            raise RuntimeError("the memory is released")
        [(address, num_bytes)] = mapped
        return Exported(self._driver.export(address), num_bytes)

    def offset(self, tensor: Tensor) -> int:
        """Bytes from its start to a tensor in it."""
        return tensor.data_ptr() - self._address

    def _take(self, num_bytes: int) -> Tensor:
        """The next `num_bytes`, [B] uint8, mapped."""
        start = _round_up(self._used, _ALIGNMENT)
        end = start + num_bytes
        assert end <= self._size, (end, self._size)
        mapped = sum(size for _, size in self._mapped)
        if end > mapped:
            until = self._size if self._is_shared else end
            piece = (self._address + mapped, _round_up(until - mapped, self._driver.granularity))
            self._map(*piece)
            self._pieces.append(piece)
        self._used = end
        return self._bytes(start, end)

    def _map(self, address: int, num_bytes: int) -> None:
        try:
            self._driver.map(address, num_bytes)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            try:
                self._driver.map(address, num_bytes)
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"{num_bytes / 2**20:,.0f} MiB more of the device's memory are needed for weights and KV cache, and "
                    f"{torch.cuda.mem_get_info(self._device)[0] / 2**20:,.0f} MiB are free; end other programs that use "
                    "the device, or lower num_kv_blocks or gpu_memory_utilization"
                ) from error
        self._mapped.append((address, num_bytes))

    def _bytes(self, start: int, end: int) -> Tensor:
        return torch.as_tensor(_Span(self, self._address + start, end - start), device=self._device)


class Exported(NamedTuple):
    """Physical memory, for other processes of the host."""

    descriptor: int
    """An open file, to be closed by who has it; while it is open, the memory stays."""
    num_bytes: int


class ImportedMemory:
    """Memory of another process, or of this one, as a device of this process reaches it.

    Args:
        exported: what it is; the descriptor stays the caller's.
        device: a CUDA device of this thread's context, maybe another one than the memory's.

    Raises:
        RuntimeError: the driver cannot map it: there is no such memory, or no direct way from the device to it. Nothing stands in
            for one: what is mapped is as fast as the link.
    """

    def __init__(self, exported: Exported, device: torch.device):
        self._device = device
        self._driver = _Driver(device, is_shared=True)
        self._address = self._driver.reserve(exported.num_bytes)
        self._size = exported.num_bytes
        try:
            self._driver.map_imported(self._address, *exported)
        except BaseException:
            self._driver.free_addresses(self._address, self._size)
            raise

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What lies `offset` bytes from its start; not to be used after `close`. To torch it is the device's own, which reads it
        wherever it lies.

        Raises:
            ValueError: it does not lie within.
        """
        num_bytes = prod(shape) * dtype.itemsize
        if not 0 <= offset <= self._size - num_bytes or offset % _ALIGNMENT:
            raise ValueError(f"{num_bytes} bytes from {offset} on are not in {self._size}")
        # Torch asks the driver of any other address whose it is, and would copy what is another device's.
        storage = torch._C._construct_storage_from_data_pointer(self._address + offset, self._device, num_bytes)
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage).resize_(tuple(shape))

    def close(self) -> None:
        """Map it no more. The device reads nothing of it."""
        if self._size:
            self._driver.unmap(self._address, self._size)
            self._driver.free_addresses(self._address, self._size)
            self._size = 0


class _Span:
    """A range of bytes, for torch to make a tensor of, which keeps it, and with it the memory, alive."""

    def __init__(self, memory: SleepableMemory, address: int, num_bytes: int):
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class _Driver:
    """The driver's calls on one device, with errors raised."""

    def __init__(self, device: torch.device, *, is_shared: bool = False):
        try:
            driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise ConfigError(
                "enable_sleep_mode, and KV blocks that go from GPU to GPU, need the Python bindings of the CUDA driver, and "
                f"cuda.bindings cannot be imported ({error}); pip install cuda-bindings, or leave enable_sleep_mode off"
            ) from error
        self._driver = driver
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device.index
        if is_shared:
            self._handles = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            self._properties.requestedHandleTypes = self._handles
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._properties, minimum))
        """Bytes; sizes and addresses of mappings are multiples of it."""

    def reserve(self, num_bytes: int) -> int:
        """A range of addresses; returns where it starts."""
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free_addresses(self, address: int, num_bytes: int) -> None:
        """End a reservation in which nothing is mapped."""
        self._call("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, num_bytes: int) -> None:
        """Put new physical memory at reserved addresses; torch.OutOfMemoryError if there is none."""
        self._map(address, num_bytes, self._call("cuMemCreate", num_bytes, self._properties, 0))

    def export(self, address: int) -> int:
        """A file descriptor of the physical memory of one call of `map`."""
        handle = self._call("cuMemRetainAllocationHandle", address)
        try:
            return int(self._call("cuMemExportToShareableHandle", handle, self._handles, 0))
        finally:
            self._call("cuMemRelease", handle)

    def map_imported(self, address: int, descriptor: int, num_bytes: int) -> None:
        """Put what another process has exported at reserved addresses."""
        self._map(address, num_bytes, self._call("cuMemImportFromShareableHandle", descriptor, self._handles))

    def _map(self, address: int, num_bytes: int, handle: Any) -> None:
        """Map a handle, which is given back."""
        try:
            self._call("cuMemMap", address, num_bytes, 0, handle, 0)
        finally:
            self._call("cuMemRelease", handle)  # the memory lives as long as the mapping
        try:
            self._call("cuMemSetAccess", address, num_bytes, [self._access], 1)
        except BaseException:
            self.unmap(address, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Give up the physical memory of one call of `map`. The device must not be using it."""
        self._call("cuMemUnmap", address, num_bytes)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        if error == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"{name}: out of memory")
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} failed: {error!r}")
        return values[0] if values else None


def _unmap(driver: _Driver, mapped: list[tuple[int, int]]) -> None:
    while mapped:
        driver.unmap(*mapped[-1])
        mapped.pop()


def _free(
    driver: _Driver,
    device: torch.device,
    address: int,
    num_bytes: int,
    mapped: list[tuple[int, int]],
) -> None:
    torch.cuda.synchronize(device)
    _unmap(driver, mapped)
    driver.free_addresses(address, num_bytes)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
