"""NVIDIA GPUs through torch.cuda."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf

import torch
from torch import Tensor

from stepgraph.errors import ConfigError
from stepgraph.platforms.base import PROTOCOL_VERSION, CompiledKernels, DeviceMemory
from stepgraph.platforms.cuda_memory import SleepableMemory
from stepgraph.platforms.kernel_cache import guard_kernel_cache
from stepgraph.platforms.torch_memory import TorchMemory
from stepgraph.platforms.tuning import of_capability

DEVICE = threading.RLock()
"""Held while a graph is captured and while the whole device is waited for: the latter, in any thread, breaks the former."""


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._stream = stream

    def record(self) -> None:
        self._event.record(self._stream)

    def wait(self) -> None:
        self._event.synchronize()


class CudaPlatform:
    """See `stepgraph.platforms.base.Platform`.

    Args:
        index: of the GPU, among those that torch sees, which becomes this thread's current one; default: what that is now.

    Raises:
        ConfigError: torch sees no such GPU.
    """

    protocol_version = PROTOCOL_VERSION
    name = "cuda"
    default_dtype = torch.bfloat16
    default_graph_backend = "cuda"
    captures_all_by_default = True
    captures_addresses = True
    run_ahead = 1
    packed_dtypes: tuple[torch.dtype, ...] = ()
    slowest_flops = inf
    shares_host_memory = False
    graph_node_bytes = 5 << 10  # measured on an H200, see benchmarks/h200.md

    def __init__(self, index: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device='cuda', but torch {torch.__version__} sees no CUDA device; use device='cpu', or check the driver "
                "and that torch was installed with CUDA"
            )
        if index is not None:
            torch.cuda.set_device(index)
        self.kernel_cache = guard_kernel_cache()
        self.device = torch.device("cuda", torch.cuda.current_device())
        capability = torch.cuda.get_device_capability(self.device)
        self.supports_fp8 = capability >= (8, 9)
        self.tuning = of_capability(capability)
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count

    def free_memory_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def total_memory_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def peak_memory_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak

    def memory(self, sizes: Iterable[int], *, sleepable: bool, shared: bool = False) -> DeviceMemory:
        if sleepable or shared:
            return SleepableMemory(sizes, self.device, is_shared=shared)
        return TorchMemory(self.device, releasable=False)

    def release_cached_memory(self) -> None:
        torch.cuda.empty_cache()

    def host_buffer(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.int32, pin_memory=True)

    def completion(self) -> _Event:
        return _Event(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        with DEVICE:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        torch.cuda.set_device(self.device)  # each thread has its own
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.default_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def compile_ahead(self, programs: Iterable[Callable[[], object]]) -> CompiledKernels:
        from stepgraph.platforms.compile_ahead import compile_ahead

        return compile_ahead(programs, self.device)
