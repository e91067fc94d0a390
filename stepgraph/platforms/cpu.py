"""The host's own cores. Work is done when the call returns, so there is nothing to run ahead of or to wait for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from stepgraph import openmp
from stepgraph.platforms.base import PROTOCOL_VERSION, CompiledKernels
from stepgraph.platforms.shared_memory import SharedMemory
from stepgraph.platforms.torch_memory import TorchMemory
from stepgraph.platforms.tuning import DEFAULT

logger = logging.getLogger(__name__)


class _Done:
    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass


class CpuPlatform:
    """See `stepgraph.platforms.base.Platform`."""

    protocol_version = PROTOCOL_VERSION
    name = "cpu"
    device = torch.device("cpu")
    default_dtype = torch.float32
    default_graph_backend = "cpu"
    captures_all_by_default = False
    captures_addresses = False
    run_ahead = 0
    supports_fp8 = True
    packed_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    slowest_flops = 2e10
    shares_host_memory = True
    multiprocessors = 1
    tuning = DEFAULT
    kernel_cache: Path | None = None
    graph_node_bytes = 0

    def __init__(self) -> None:
        if sys.platform == "linux" and torch.get_num_threads() > 1 and not openmp.is_settled():
            logger.info(
                "torch was imported before stepgraph, so its threads spin while they wait, which is slow beside other work: "
                "import stepgraph first, or set the environment variable GOMP_SPINCOUNT=%d",
                openmp.SPINS,
            )

    def free_memory_bytes(self) -> int:
        meminfo = Path("/proc/meminfo")
        if not meminfo.exists():  # macOS does not say; half of all memory is a cautious guess
            return self.total_memory_bytes() // 2
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024

    def total_memory_bytes(self) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def peak_memory_bytes(self, run: Callable[[], object]) -> int:
        return 0  # steps take what they need from the memory that the KV cache leaves

    def memory(self, sizes: Iterable[int], *, sleepable: bool, shared: bool = False) -> TorchMemory:
        return SharedMemory(sizes) if shared else TorchMemory(self.device, releasable=True)

    def release_cached_memory(self) -> None:
        pass

    def host_buffer(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.int32)

    def completion(self) -> _Done:
        return _Done()

    def synchronize(self) -> None:
        pass

    def side_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def compile_ahead(self, programs: Iterable[Callable[[], object]]) -> CompiledKernels:
        return CompiledKernels(0, 0)
