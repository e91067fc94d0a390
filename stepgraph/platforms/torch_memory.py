"""Tensors in memory of torch's own allocator, given up through their storages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class TorchMemory:
    """See `stepgraph.platforms.base.DeviceMemory`.

    Args:
        device: where its tensors live.
        releasable: whether `release` is allowed. On CPU it is: graphs hold tensor objects there. Captured on CUDA, they hold
            addresses, and memory taken back from this allocator has others.
    """

    def __init__(self, device: torch.device, *, releasable: bool):
        self.releasable = releasable
        self._device = device
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `DeviceMemory.zeros`."""
        tensor = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        self.adopt([tensor])
        return tensor

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """See `DeviceMemory.adopt`. A mapped file stays the operating system's to drop."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                self._storages[storage.data_ptr()] = storage, storage.nbytes()

    def release(self, *, keep_content: bool) -> None:
        """See `DeviceMemory.release`. Content that is to be kept in host memory stays where it is, on CPU."""
        assert self.releasable
        if not keep_content:
            self.free()

    def restore(self) -> None:
        """See `DeviceMemory.restore`."""
        for storage, num_bytes in self._storages.values():
            if not storage.nbytes():
                storage.resize_(num_bytes)

    def free(self) -> None:
        """See `DeviceMemory.free`."""
        for storage, _ in self._storages.values():
            storage.resize_(0)
