"""Memory that can be given up and taken back at the same addresses, so that captured graphs find their tensors again."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from simulated_accelerator.stream import STREAM

_ALIGNMENT = 64
"""Bytes."""


class MappedMemory:
    """See `stepgraph.platforms.DeviceMemory`. A range of addresses, whose pages the operating system takes back and gives anew.

    Args:
        sizes: bytes of each storage it will hold.
    """

    releasable = True

    def __init__(self, sizes: Iterable[int]) -> None:
        size = sum(_round_up(size) for size in sizes)
        self._pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._used = 0
        self._is_released = False
        self._content: bytes | None = None

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._take(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(tuple(shape))

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        placed: dict[int, Tensor] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes():
                continue
            if storage.data_ptr() not in placed:
                old_B = torch.empty(0, dtype=torch.uint8).set_(storage)
                placed[storage.data_ptr()] = self._take(storage.nbytes()).copy_(old_B)
            target = placed[storage.data_ptr()].view(tensor.dtype)
            tensor.data = target.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def release(self, *, keep_content: bool) -> None:
        STREAM.synchronize()
        if not keep_content:
            self._content = None
        elif not self._is_released:
            self._content = self._pages[:]
        self._pages.madvise(mmap.MADV_DONTNEED)
        self._is_released = True

    def restore(self) -> None:
        if self._content is not None:
            self._pages[:] = self._content
        self._content, self._is_released = None, False

    def free(self) -> None:
        self.release(keep_content=False)

    def _take(self, num_bytes: int) -> Tensor:
        """The next `num_bytes`, [B] uint8, zero."""
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        start = self._used
        self._used += _round_up(num_bytes)
        return torch.frombuffer(self._pages, dtype=torch.uint8, count=num_bytes, offset=start)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
