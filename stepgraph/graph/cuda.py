"""CUDA graphs: one launch for the whole step.

All graphs share one memory pool: only one step runs at a time, so each may overwrite the intermediate tensors of the
others, and the pool grows to the need of the largest (captured first, the others fit into its memory).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import torch

from stepgraph.errors import CaptureError, ConfigError
from stepgraph.graph.base import Output


@dataclass(frozen=True)
class CudaGraph(Generic[Output]):
    """A captured CUDA graph and the tensors it leaves its results in."""

    graph: torch.cuda.CUDAGraph
    output: Output

    def replay(self) -> Output:
        self.graph.replay()
        return self.output


class CudaBackend:
    """See `stepgraph.graph.base.GraphBackend`."""

    name = "cuda"

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture(self, program: Callable[[], Output], warmups: int) -> CudaGraph[Output]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # Warm-up on the capture stream compiles kernels and makes libraries allocate their workspaces there. The capture
        # itself does not go through torch.cuda.graph, which collects garbage each time: seconds over a pool of graphs.
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for _ in range(warmups):
                program()
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = program()
            except (RuntimeError, torch.OutOfMemoryError) as error:
                with contextlib.suppress(RuntimeError):  # the failed capture must be ended before anything else can run
                    graph.capture_end()
                if isinstance(error, torch.OutOfMemoryError):
                    raise ConfigError(
                        f"the device's memory is too small to capture the step ({error}); lower gpu_memory_utilization, "
                        "max_num_batched_tokens or max_num_seqs"
                    ) from error
                raise CaptureError(
                    f"the step cannot be captured as a CUDA graph: {str(error).splitlines()[0]}; something in the program "
                    "waits for the device or reads a value from it"
                ) from error
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return CudaGraph(graph, output)
