"""Kernels that the host launches; where kernels are compiled ahead, a launch is their compilation and nothing else."""

from typing import Any, TypeVar

from stepgraph.platforms.compile_ahead import COMPILING

Kernel = TypeVar("Kernel")


def launched(kernel: Kernel) -> Kernel:
    """Mark a Triton function as launched from the host, ``kernel[grid](...)``: put it above `triton.jit`. Whether a launch runs
    the kernel is the business of the context it happens in, so that one engine can compile ahead while another one works."""
    run = kernel.run  # type: ignore[attr-defined]  # of all that triton.jit may make

    def run_or_compile(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(*args, grid=grid, warmup=warmup or COMPILING.get(), **options)

    kernel.run = run_or_compile  # type: ignore[attr-defined]
    return kernel
