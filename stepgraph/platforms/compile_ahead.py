"""Compiling Triton kernels side by side, before the steps that need them run.

Triton compiles a kernel at its first launch, and everything else waits: a quarter of a minute for the kernels of a model, on
one core of many. While compiling ahead, a launch hands the kernel to a thread, if it is not compiled, and runs nothing, so
that one pass through a program finds all of its kernels. Compiled kernels land where later launches find them, and in Triton's
cache on disk. Only launches in the calling context are concerned: other engines of the process go on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from stepgraph.platforms.base import CompiledKernels

COMPILING: ContextVar[bool] = ContextVar("stepgraph_compiling_ahead", default=False)
"""Whether launches compile and do not run; see `stepgraph.ops.launched`."""

_ONE_AT_A_TIME = threading.Lock()
_THREADS = "stepgraph-compile"


def compile_ahead(programs: Iterable[Callable[[], object]], device: torch.device | None = None) -> CompiledKernels:
    """Compile every Triton kernel that some programs launch.

    The programs are run, but for their launches, so their buffers must hold a plan that leaves no trace. Must not be called
    by a thread that captures a graph.

    Args:
        programs: to be run.
        device: that runs them, a GPU, of which each thread has a current one of its own; None: the first.
    """
    in_thread = None if device is None else partial(torch.cuda.set_device, device)
    with (
        torch.no_grad(),
        _counting() as counts,
        ThreadPoolExecutor(os.cpu_count(), _THREADS, in_thread) as threads,
        _compiling_only(),
        triton.AsyncCompileMode(threads),
        _NewTensorsZero(),
    ):
        for program in programs:
            program()
    return CompiledKernels(counts.compiled, counts.from_disk)


@contextmanager
def _compiling_only() -> Iterator[None]:
    token = COMPILING.set(True)
    try:
        yield
    finally:
        COMPILING.reset(token)


@contextmanager
def _counting() -> Iterator[_Counts]:
    """Triton has one listener for the process."""
    with _ONE_AT_A_TIME:
        counts = _Counts(knobs.compilation.listener)
        knobs.compilation.listener = counts
        try:
            yield counts
        finally:
            knobs.compilation.listener = counts.others


class _Counts:
    """Triton's listener, called by all threads, of which ours count."""

    def __init__(self, others: Callable[..., None] | None) -> None:
        self.compiled = self.from_disk = 0
        self.others = others
        self._lock = threading.Lock()

    def __call__(self, *, cache_hit: bool, **rest: Any) -> None:
        if self.others is not None:
            self.others(cache_hit=cache_hit, **rest)
        if threading.current_thread().name.startswith(_THREADS):
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
