"""Programmatic dependent launch: a kernel's programs start while those of the kernel before it finish.

What a kernel reads before `wait_for_previous` must be constant, or written by a kernel before the previous one: since every
kernel lets its dependents start only after it has waited itself, all of those are complete by then. So weights, and what
was computed before the layers, may be read early; activations may not. Source: CUDA programming guide, "Programmatic
dependent launch and synchronization".

A kernel that calls `wait_for_previous` is launched with ``**LAUNCH``; all others wait for the previous kernel as ever.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda

from stepgraph.platforms.kernels import kernel_tuning

SUPPORTED = kernel_tuning().dependent_launch and not knobs.runtime.interpret
_SUPPORTED = tl.constexpr(SUPPORTED)

LAUNCH: dict[str, bool] = {"launch_pdl": True} if SUPPORTED else {}
"""Launch options of kernels that call `wait_for_previous`."""


@triton.jit
def wait_for_previous():
    """Wait until the previous kernel's results are there, then let the next kernel start. Every program calls it once,
    before it reads or writes anything that changes."""
    if _SUPPORTED:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
