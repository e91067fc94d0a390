"""One accelerator family: everything the rest of the engine needs to know about where it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Completion(Protocol):
    """Marks a point in the device's work that the host can wait for."""

    def record(self) -> None:
        """Mark the work submitted so far."""

    def wait(self) -> None:
        """Block until the marked work is done."""


class Platform(Protocol):
    """One accelerator family. Kernels are registered per torch dispatch key, not here."""

    name: str
    device: torch.device
    default_dtype: torch.dtype
    default_graph_backend: str
    captures_all_by_default: bool
    run_ahead: int
    """Steps the host may launch before it has read the results of an earlier one."""
    multiprocessors: int
    """Programs that run side by side; sizes the attention grid."""

    def free_memory_bytes(self) -> int:
        """Memory that a new allocation may take."""

    def total_memory_bytes(self) -> int:
        """Memory of the device."""

    def used_memory_bytes(self) -> int:
        """Memory in use on the device, by anyone, the driver's share for captured graphs included; differences are ours."""

    def peak_memory_bytes(self, run: Callable[[], object]) -> int:
        """Most device memory that `run` holds at a time beside what is allocated before it; 0 where that is not known."""

    def host_buffer(self, *size: int) -> Tensor:
        """Zeroed int32 host memory that the device can read and write."""

    def completion(self) -> Completion:
        """A new completion mark."""

    def synchronize(self) -> None:
        """Wait for all submitted work."""
