"""CUDA graphs: one launch for the whole step.

All graphs share one memory pool: only one step runs at a time, so each may overwrite the intermediate tensors of the
others, and the pool grows to the need of the largest (captured first, the others fit into its memory).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import torch

from stepgraph.errors import CaptureError, DeviceMemoryError
from stepgraph.graph.base import Output
from stepgraph.platforms.cuda import DEVICE

_OUT_OF_MEMORY = 2
"""CUDA's cudaErrorMemoryAllocation."""


@dataclass(frozen=True, eq=False)
class CudaGraph(Generic[Output]):
    """A captured CUDA graph and the tensors it leaves its results in."""

    graph: torch.cuda.CUDAGraph
    output: Output
    pool: Any
    """Handle of the memory pool that its tensors lie in; torch has no public name for its type."""

    def replay(self) -> Output:
        self.graph.replay()
        return self.output


class CudaBackend:
    """See `stepgraph.graph.base.GraphBackend`."""

    name = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None  # the handle of the memory pool to capture into; None if a new one is to be begun
        self._graphs: weakref.WeakSet[CudaGraph[Any]] = weakref.WeakSet()
        self._stream = torch.cuda.Stream()

    def capture(self, program: Callable[[], Output], warmups: int) -> CudaGraph[Output]:
        self._stream.wait_stream(torch.cuda.current_stream())
        # Warm-up on the capture stream compiles kernels and makes libraries allocate their workspaces there. The capture
        # itself does not go through torch.cuda.graph, which collects garbage each time: seconds over a pool of graphs.
        with torch.no_grad(), torch.cuda.stream(self._stream):
            try:
                for _ in range(warmups):
                    program()
                self._stream.synchronize()
                graph = self._record(program)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise DeviceMemoryError(
                    f"the device's memory is too small to capture the step ({error}); lower gpu_memory_utilization, "
                    "max_num_batched_tokens or max_num_seqs"
                ) from error
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs.add(graph)
        return graph

    def memory_bytes(self) -> int:
        pools = {graph.pool for graph in self._graphs}
        return sum(part["total_size"] for pool in pools for part in torch.cuda.memory_snapshot(mempool_id=pool))

    def _record(self, program: Callable[[], Output]) -> CudaGraph[Output]:
        if self._pool is not None and not self._graphs:  # CUDA forgets a memory pool with its last graph
            torch.cuda.empty_cache()  # which is all that gives its memory back
            self._pool = None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with DEVICE:
            return self._record_into(graph, program)

    def _record_into(self, graph: torch.cuda.CUDAGraph, program: Callable[[], Output]) -> CudaGraph[Output]:
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = program()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # a capture must be ended before anything else can run
                graph.capture_end()
            self._leave_pool()
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise CaptureError(
                    f"the step cannot be captured as a CUDA graph: {str(error).splitlines()[0]}; something in the program "
                    "waits for the device or reads a value from it"
                ) from error
            raise
        try:
            graph.capture_end()
        except BaseException:
            self._leave_pool()
            raise
        return CudaGraph(graph, output, self._pool)

    def _leave_pool(self) -> None:
        """If the driver refuses to end a capture, `capture_end` raises before it has told torch's allocators that it is over."""
        try:
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        except RuntimeError:  # it has told them
            return
        torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
        self._pool = None  # that of pinned memory cannot be told: it takes no second capture into the pool


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch's allocator found no memory, or the driver none for a graph of its own."""
    return isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == _OUT_OF_MEMORY
