"""An accelerator that is a thread: an example of a platform that comes with a package of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from simulated_accelerator.kernels import KERNELS
from simulated_accelerator.memory import MappedMemory
from simulated_accelerator.stream import STREAM, Completion, HostBuffer
from stepgraph.ops import register_kernels
from stepgraph.platforms import CompiledKernels
from stepgraph.platforms.tuning import KernelTuning

register_kernels("simulated", KERNELS)


class SimulatedPlatform:
    """See `stepgraph.platforms.Platform`."""

    protocol_version = 1  # that of stepgraph.platforms.PROTOCOL_VERSION for which this was written
    name = "simulated"
    device = torch.device("cpu")
    default_dtype = torch.float32
    default_graph_backend = "simulated_accelerator.graphs:StreamBackend"
    captures_all_by_default = False
    captures_addresses = False
    run_ahead = 1
    supports_fp8 = True
    packed_dtypes: tuple[torch.dtype, ...] = ()
    slowest_flops = 2e10
    shares_host_memory = True
    multiprocessors = 1
    tuning = KernelTuning()
    kernel_cache = None
    graph_node_bytes = 0

    def free_memory_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def total_memory_bytes(self) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def peak_memory_bytes(self, run: Callable[[], object]) -> int:
        return 0  # not known

    def memory(self, sizes: Iterable[int], *, sleepable: bool) -> MappedMemory:
        return MappedMemory(sizes)

    def release_cached_memory(self) -> None:
        pass

    def host_buffer(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.int32).as_subclass(HostBuffer)

    def completion(self) -> Completion:
        return Completion()

    def synchronize(self) -> None:
        STREAM.synchronize()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        STREAM.synchronize()  # what runs inside is done when its calls return
        yield

    def compile_ahead(self, programs: Iterable[Callable[[], object]]) -> CompiledKernels:
        return CompiledKernels(0, 0)
