"""Groups of ranks on GPUs that reach each other's memory: processes of one host, by CUDA's inter-process handles."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepgraph.errors import DeviceMemoryError
from stepgraph.ops.collectives import Mailbox
from stepgraph.ops.collectives.mailbox import MOST_PROGRAMS_A_MULTIPROCESSOR
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.mailbox_group import MailboxGroup
from stepgraph.parallel.shard import Shard
from stepgraph.platforms import Platform

logger = logging.getLogger(__name__)

_UNIT = 2 << 20
"""Bytes: smaller allocations share memory with others, which would be opened with them."""
_BITS = {2: torch.int16, 4: torch.int32}


def create_push_group(
    shard: Shard,
    exchange: Exchange,
    platform: Platform,
    *,
    slot_bytes: int,
    dtype: torch.dtype,
    num_programs: int,
    time_limit_s: float,
) -> MailboxGroup | None:
    """Have every rank open the others' inboxes. All call it, outside of any capture; nothing is registered later.

    Args:
        shard, exchange: as of `create_group`.
        platform: whose device, a GPU, this rank computes on.
        slot_bytes: that a message may have, a multiple of 8 KiB.
        dtype: of the numbers in messages.
        num_programs: of a kernel that has little to do, the same on all ranks, at most the multiprocessors of each.
        time_limit_s: of a wait for another rank.

    Returns:
        None, on all ranks, where one cannot open another one's inbox, or what is sent does not arrive.
    """
    device, elements = platform.device, slot_bytes // dtype.itemsize
    shape = (3, shard.size, elements)
    with torch.cuda.device(device):
        inboxes = _Inboxes(3 * shard.size * slot_bytes, device)
        inbox = inboxes.own.view(_BITS[dtype.itemsize]).view(-1)[: torch.Size(shape).numel()].view(shape)
        inbox.fill_(torch.iinfo(inbox.dtype).min)  # -0.0
        torch.cuda.synchronize(device)
        addresses, error = inboxes.open(shard, exchange)
        if any(exchange(error.encode())):
            inboxes.close()
            logger.warning("no peer access between the ranks' GPUs%s", error and f": {error}")
            return None
        mailbox = Mailbox(
            inbox,
            addresses,
            state=torch.zeros(num_programs * MOST_PROGRAMS_A_MULTIPROCESSOR, 2, dtype=torch.int64, device=device),
            flags=torch.zeros(2, dtype=torch.int32, device=device),
            host=torch.zeros(2, dtype=torch.int64, pin_memory=True),
        )
        group = MailboxGroup(
            "push",
            shard,
            mailbox,
            slot_elements=elements,
            time_limit_s=time_limit_s,
            synchronize=platform.synchronize,
            close=inboxes.close,
        )
        if b"" in exchange(b"arrived" if _arrives(group, dtype, device) else b""):
            group.close()
            logger.warning(
                "what ranks store in each other's memory does not arrive, though their GPUs offer peer access"
            )
            return None
    return group


def _arrives(group: MailboxGroup, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether each rank gets what all send, in each of the three buffers."""
    rank, size = group.shard.rank, group.shard.size
    for turn in range(3):
        number = torch.arange(1, 65, dtype=dtype, device=device) + turn
        found = group.gather((number + 64 * rank).view(1, 64), torch.zeros(1, 64 * size, dtype=dtype, device=device))
        expected = torch.cat([number + 64 * other for other in range(size)])
        if not torch.equal(found.view(-1), expected):
            return False
    return group.fault() is None


class _Inboxes:
    """This rank's memory for the others, and theirs once it is opened.

    Args:
        num_bytes: of this rank's.
        device: this rank's, which is the current one.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._runtime = _Runtime()
        num_bytes = -(-num_bytes // _UNIT) * _UNIT
        self._address = self._runtime.allocate(num_bytes)
        self._opened: list[int] = []
        self.own: Tensor = torch.as_tensor(_Span(self._address, num_bytes), device=device)
        """[bytes] uint8, all of it; gone after `close`."""

    def open(self, shard: Shard, exchange: Exchange) -> tuple[list[int], str]:
        """Open the others'. Returns the addresses of all, and what went wrong, if something did."""
        addresses = []
        for rank, handle in enumerate(exchange(self._runtime.handle(self._address))):
            if rank == shard.rank:
                addresses.append(self._address)
                continue
            try:
                self._opened.append(self._runtime.open(handle))
            except RuntimeError as error:
                return addresses, f"rank {shard.rank} cannot open the memory of rank {rank}: {error}"
            addresses.append(self._opened[-1])
        return addresses, ""

    def close(self) -> None:
        """Give all of it up. Nothing to do if that was done."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize(self._device)
            while self._opened:
                self._runtime.close(self._opened.pop())
            if self._address:
                self._runtime.free(self._address)
                self._address = 0


class _Span:
    """Bytes of a device, for torch to make a tensor of."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class _Runtime:
    """Calls of the CUDA runtime that torch uses, on the current device, with errors raised."""

    _LAZY_PEER_ACCESS = 1

    def __init__(self) -> None:
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
        self._library: Any = ctypes.CDLL(min(paths))
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_void_p()
        try:
            self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        except RuntimeError as error:
            raise DeviceMemoryError(
                f"the device's memory has no room for the {num_bytes / 2**20:.0f} MiB in which ranks exchange what they compute "
                f"({error}); end other programs that use the device"
            ) from error
        return int(address.value or 0)

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def handle(self, address: int) -> bytes:
        """By which other processes open the memory; none if it has none."""
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address of another process's memory, for this device."""
        address = ctypes.c_void_p()
        flags = ctypes.c_uint(self._LAZY_PEER_ACCESS)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), flags)
        return int(address.value or 0)

    def close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            self._library.cudaGetLastError()  # else torch would take it for its own
            raise RuntimeError(f"{name}: {self._library.cudaGetErrorString(status).decode()}")
