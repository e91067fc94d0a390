"""One accelerator family: everything the rest of the engine needs to know about where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stepgraph.platforms.tuning import KernelTuning

PROTOCOL_VERSION = 1
"""Of `Platform` and what belongs to it: rises when a platform that was written for it must change."""


class CompiledKernels(NamedTuple):
    """How many kernels were not in this process's memory, by where they came from."""

    compiled: int
    from_disk: int  # the cache of compiled kernels held them


class Completion(Protocol):
    """Marks a point in the device's work that the host can wait for."""

    def record(self) -> None:
        """Mark the work submitted so far."""

    def wait(self) -> None:
        """Block until the marked work is done."""


class DeviceMemory(Protocol):
    """Memory of some tensors that can be given up as a whole. Tensors in it stay, unusable until it is taken back."""

    releasable: bool
    """Whether `release` is allowed: captured graphs find the tensors again after `restore`."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor in it, zero, with a storage of its own."""

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Take charge of existing tensors, which may be moved: call it before anything is captured over them or views of
        them are kept. Tensors that share storage go on sharing it."""

    def release(self, *, keep_content: bool) -> None:
        """Give the memory up, once the device has done what was submitted. Can be called again, to drop kept content.

        Args:
            keep_content: keep the tensors' content in host memory; else it is undefined after `restore`.
        """

    def restore(self) -> None:
        """Take the memory back, with the content that was kept. Nothing to do if it is there."""

    def free(self) -> None:
        """Give the memory up for good; the tensors must not be used any more."""


class Platform(Protocol):
    """One accelerator family. Its kernels are registered under its name, see `stepgraph.platforms.kernels`."""

    protocol_version: int
    """The PROTOCOL_VERSION that it was written for; read from the class, before a platform is made."""
    name: str
    """The value of the setting `device` that asks for it."""
    device: torch.device
    default_dtype: torch.dtype
    default_graph_backend: str
    """What captures steps unless settings say otherwise: a name that `stepgraph.graph.create_backend` takes."""
    captures_all_by_default: bool
    captures_addresses: bool
    """Whether a captured graph reads parameters where they lie, so that their values may come later."""
    run_ahead: int
    """Steps the host may launch before it has read the results of an earlier one."""
    supports_fp8: bool
    """Whether kernels can read and write an FP8 (e4m3) cache."""
    packed_dtypes: tuple[torch.dtype, ...]
    """Of activations that kernels can multiply with the blocks of a quantised checkpoint as they are."""
    slowest_flops: float
    """Operations per second that any machine of the family computes, other work beside included; inf where steps take next to
    nothing."""
    shares_host_memory: bool
    """Its memory is the host's, which others need too: the KV cache takes what it can use, not all there is."""
    multiprocessors: int
    """Programs that run side by side; sizes the attention grid."""
    tuning: KernelTuning
    """What operators choose kernels and sizes by; read when the platform is made."""
    kernel_cache: Path | None
    """Folder of the kernels that were compiled at run time; None where they come compiled."""
    graph_node_bytes: int
    """Memory that the driver holds for each operator of a captured graph, beside tensors."""

    def free_memory_bytes(self) -> int:
        """Memory that a new allocation may take."""

    def total_memory_bytes(self) -> int:
        """Memory of the device."""

    def peak_memory_bytes(self, run: Callable[[], object]) -> int:
        """Most device memory that `run` holds at a time beside what is allocated before it; 0 where that is not known."""

    def memory(self, sizes: Iterable[int], *, sleepable: bool, shared: bool = False) -> DeviceMemory:
        """New memory for tensors whose storages have `sizes` bytes.

        Args:
            sizes: of all storages it will hold.
            sleepable: it will be released and restored.
            shared: other processes will map it. Asked for by engines alone that give keys and values to others.

        Raises:
            ConfigError: sleeping or sharing needs something that is not installed.
        """

    def release_cached_memory(self) -> None:
        """Give memory that freed tensors left behind back to the system."""

    def host_buffer(self, *size: int) -> Tensor:
        """Zeroed int32 host memory that the device can read and write."""

    def completion(self) -> Completion:
        """A new completion mark."""

    def synchronize(self) -> None:
        """Wait for all submitted work."""

    def side_stream(self) -> AbstractContextManager[None]:
        """Inside, this thread's work for the device starts after what was submitted before, and then goes on beside that of other
        threads; leaving waits for its end."""

    def compile_ahead(self, programs: Iterable[Callable[[], object]]) -> CompiledKernels:
        """Compile the kernels that some programs launch, side by side; see `stepgraph.platforms.compile_ahead`. Where kernels
        are not compiled at run time, no program is run."""
