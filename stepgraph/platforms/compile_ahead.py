"""Compiling Triton kernels side by side, before the steps that need them run.

Triton compiles a kernel at its first launch, and everything else waits: a quarter of a minute for the kernels of a model, on
one core of many. While compiling ahead, a launch hands the kernel to a thread, if it is not compiled, and runs nothing, so
that one pass through a program finds all of its kernels. Compiled kernels land where later launches find them, and in Triton's
cache on disk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import JITFunction

from stepgraph.platforms.base import CompiledKernels


def compile_ahead(programs: Iterable[Callable[[], object]]) -> CompiledKernels:
    """Compile every Triton kernel that some programs launch.

    The programs are run, but for their launches, so their buffers must hold a plan that leaves no trace. Must not be called
    while a graph is captured, nor beside threads that launch kernels.
    """
    counts = _Counts()
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    with (
        torch.no_grad(),
        patch.object(JITFunction, "run", compile_only),
        patch.object(knobs.compilation, "listener", counts),
        ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="stepgraph-compile") as threads,
        triton.AsyncCompileMode(threads),
        _NewTensorsZero(),
    ):
        for program in programs:
            program()
    return CompiledKernels(counts.compiled, counts.from_disk)


class _Counts:
    """Triton's listener, called by all threads."""

    def __init__(self) -> None:
        self.compiled = self.from_disk = 0
        self._lock = threading.Lock()

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        with self._lock:
            self.compiled += not cache_hit
            self.from_disk += cache_hit


class _NewTensorsZero(TorchDispatchMode):
    """Makes zero what operators leave to kernels that do not run: it may say where to read."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch.compile is to keep out, which nobody here uses: torch imports it to tell it so, for over a second."""
        return False

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator.namespace == "stepgraph" or "empty" in operator._schema.name:
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()
        return result
