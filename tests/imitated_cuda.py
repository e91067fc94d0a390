"""CUDA's virtual memory on a host: physical memory is files without a name, which other processes can map too."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from stepgraph.platforms import cuda_memory

MIB = 2**20
GRANULARITY = 2 * MIB
_MAP_FIXED = 0x10
_GARBAGE = b"\xdd"


class Physical:
    """What a handle of the driver stands for."""

    def __init__(self, descriptor: int, *, is_shareable: bool) -> None:
        self.file = os.fdopen(descriptor, "rb")
        self.size = os.fstat(descriptor).st_size
        self.is_shareable = is_shareable


class ImitatedDriver:
    """The virtual memory calls of cuda.bindings.driver; physical memory that is unmapped loses its content."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_OUT_OF_MEMORY=2)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self) -> None:
        self.budget = 64 * MIB
        self.failing = ""
        self.reserved: dict[int, int] = {}
        self.handles: dict[int, Physical] = {}  # not released yet
        self.mappings: dict[int, Physical] = {}
        self._ranges: list[ctypes.Array] = []
        self._mmap = ctypes.CDLL(None, use_errno=True).mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def CUmemAllocationProp(self):  # noqa: N802
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None), requestedHandleTypes=0)

    def CUmemAccessDesc(self):  # noqa: N802
        return SimpleNamespace(location=None, flags=None)

    @property
    def in_use(self) -> int:
        return sum(physical.size for physical in {id(p): p for p in self.mappings.values()}.values())

    def cuMemGetAllocationGranularity(self, properties, option):  # noqa: N802
        return 0, GRANULARITY

    def cuMemAddressReserve(self, size, alignment, address, flags):  # noqa: N802
        if size < 0:
            raise OverflowError(size)
        if size == 0 or size % GRANULARITY:
            return 1, None
        if size > 1 << 47:
            return 2, None
        assert alignment == address == flags == 0
        buffer = (ctypes.c_ubyte * (size + GRANULARITY))()
        self._ranges.append(buffer)
        start = -(-ctypes.addressof(buffer) // GRANULARITY) * GRANULARITY
        self.reserved[start] = size
        return 0, start

    def cuMemAddressFree(self, address, size):  # noqa: N802
        assert self.reserved.pop(address) == size
        assert not any(address <= mapped < address + size for mapped in self.mappings)
        return (0,)

    def cuMemCreate(self, size, properties, flags):  # noqa: N802
        assert size % GRANULARITY == flags == 0
        if self.in_use + size > self.budget:
            return 2, None
        descriptor = os.memfd_create("imitated")
        os.write(descriptor, _GARBAGE * size)
        return self._handle(Physical(descriptor, is_shareable=bool(properties.requestedHandleTypes)))

    def cuMemMap(self, address, size, offset, handle, flags):  # noqa: N802
        physical = self.handles[handle]
        if physical.size != size:
            return (1,)
        assert (offset, flags) == (0, 0)
        assert any(start <= address and address + size <= start + length for start, length in self.reserved.items())
        assert all(address + size <= start or start + p.size <= address for start, p in self.mappings.items())
        self._map(address, size, mmap.MAP_SHARED, physical.file.fileno())
        self.mappings[address] = physical
        return (0,)

    def cuMemSetAccess(self, address, size, descriptions, count):  # noqa: N802
        assert self.mappings[address].size == size
        assert (len(descriptions), descriptions[0].flags, descriptions[0].location.type) == (count, 3, 1)
        return (999 if self.failing == "access" else 0,)

    def cuMemUnmap(self, address, size):  # noqa: N802
        assert self.mappings.pop(address).size == size
        self._map(address, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        return (0,)

    def cuMemRelease(self, handle):  # noqa: N802
        del self.handles[handle]
        return (0,)

    def cuMemRetainAllocationHandle(self, address):  # noqa: N802
        return self._handle(self.mappings[address])

    def cuMemExportToShareableHandle(self, handle, kind, flags):  # noqa: N802
        assert (kind, flags) == (1, 0)
        physical = self.handles[handle]
        return (0, os.dup(physical.file.fileno())) if physical.is_shareable else (801, None)

    def cuMemImportFromShareableHandle(self, descriptor, kind):  # noqa: N802
        assert kind == 1
        return self._handle(Physical(os.dup(descriptor), is_shareable=True))

    def _handle(self, physical: Physical) -> tuple[int, int]:
        handle = 1 + max(self.handles, default=0)
        self.handles[handle] = physical
        return 0, handle

    def _map(self, address: int, size: int, flags: int, descriptor: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        assert self._mmap(address, size, protection, flags | _MAP_FIXED, descriptor, 0) == address, ctypes.get_errno()


def imitate_cuda(monkeypatch: pytest.MonkeyPatch) -> ImitatedDriver:
    """What lies in a GPU's memory lies in the host's within the test, and streams do their work at once."""
    driver = ImitatedDriver()
    import_module = importlib.import_module

    def import_or_fake(name: str, *args):
        return driver if name == "cuda.bindings.driver" else import_module(name, *args)

    monkeypatch.setattr(cuda_memory.importlib, "import_module", import_or_fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (driver.budget - driver.in_use, driver.budget))

    def as_tensor(span, device):
        interface = span.__cuda_array_interface__
        assert (interface["typestr"], interface["data"][1]) == ("|u1", False)
        [length] = interface["shape"]
        memory = (ctypes.c_ubyte * length).from_address(interface["data"][0])
        memory.keeper = span
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return driver
