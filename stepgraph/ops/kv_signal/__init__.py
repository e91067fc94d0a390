"""Telling, while a step runs, that a layer's keys and values are in the cache: whoever copies them elsewhere need not wait for
the step's end."""

from torch import Tensor

from stepgraph.ops.kv_signal import cpu
from stepgraph.ops.registry import register

_kv_signal = register(
    "kv_signal(Tensor(a!) counts, Tensor(b!) signals, int layer) -> ()",
    {"cpu": cpu.kv_signal, "cuda": "stepgraph.ops.kv_signal.triton:kv_signal"},
)


def kv_signal(counts: Tensor, signals: Tensor, layer: int) -> None:
    """Count one more step whose entries of a layer are in its cache, and say so in host memory. Runs inside the graph, after the
    layer's writes.

    Whoever sees the new number in `signals` finds there what the device's work before this operator has written: a process that
    shares the memory, or a device that reads it.

    Args:
        counts: [1 + N] int64, of the device. The first is what a step counts: 1, or 0 where it is to leave no trace. The others
            are the steps counted so far, layer by layer; `counts[1 + layer]` is updated.
        signals: [N] int64, host memory that the device can write: the same numbers for those who watch. `signals[layer]` is
            updated; each number is written at once.
        layer: below N.
    """
    _kv_signal(counts, signals, layer)
