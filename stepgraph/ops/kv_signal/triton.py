"""Triton kernel of `kv_signal`: one thread's work.

It is launched as ever, not as a dependent of the kernel before it (see `stepgraph.ops.dependent_launch`): so it starts when that
one, and with it all before, has ended, and what they wrote is where every device that reads this one's memory looks for it.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.launched import launched


@launched
@triton.jit(do_not_specialize=["layer"])
def _kv_signal_kernel(counts_ptr, signals_ptr, layer):
    count = tl.load(counts_ptr + 1 + layer) + tl.load(counts_ptr)
    tl.store(counts_ptr + 1 + layer, count)
    tl.store(signals_ptr + layer, count)


def kv_signal(counts: Tensor, signals: Tensor, layer: int) -> None:
    """See `stepgraph.ops.kv_signal.kv_signal`."""
    _kv_signal_kernel[(1,)](counts, signals, layer, num_warps=1)
