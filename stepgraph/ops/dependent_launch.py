"""Programmatic dependent launch: a kernel's programs start while those of the kernel before it finish.

What a kernel reads before `wait_for_previous` must be constant, or written by a kernel before the previous one: since every
kernel lets its dependents start only after it has waited itself, all of those are complete by then. So weights, and what
was computed before the layers, may be read early; activations may not. Source: CUDA programming guide, "Programmatic
dependent launch and synchronization".

A kernel that calls `wait_for_previous` is launched with ``**LAUNCH``; all others wait for the previous kernel as ever.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import cuda

SUPPORTED = not knobs.runtime.interpret and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
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


MAX_PREFETCH_BYTES = 16 << 20
"""More would push out of the cache what is read before it."""


def prefetch_arguments(upcoming: Tensor | None, num_programs: int) -> dict[str, Any]:
    """Arguments of kernels that call `prefetch`.

    Args:
        upcoming: what a later kernel reads; contiguous. None: prefetch nothing.
        num_programs: of the launch.
    """
    if upcoming is None or not SUPPORTED:
        return {"upcoming_ptr": None, "upcoming_bytes": 0, "upcoming_chunk": 0}
    num_bytes = min(upcoming.numel() * upcoming.element_size(), MAX_PREFETCH_BYTES) // 16 * 16
    chunk = triton.cdiv(num_bytes, num_programs * 128) * 128
    return {"upcoming_ptr": upcoming, "upcoming_bytes": num_bytes, "upcoming_chunk": min(chunk, num_bytes)}


@triton.jit
def prefetch(upcoming_ptr, upcoming_bytes, upcoming_chunk):
    """Ask for this program's share of what comes to be brought to the L2 cache, see `prefetch_arguments`. Does not wait."""
    if _SUPPORTED and upcoming_ptr is not None:
        offset = tl.minimum(tl.program_id(0).to(tl.int64) * upcoming_chunk, upcoming_bytes - upcoming_chunk)
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred is_first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 is_first, thread, 0;
                @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [upcoming_ptr.to(tl.int64) + offset, upcoming_chunk],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
