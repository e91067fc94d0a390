"""Plain torch definition of `kv_signal`."""

from torch import Tensor


def kv_signal(counts: Tensor, signals: Tensor, layer: int) -> None:
    """See `stepgraph.ops.kv_signal.kv_signal`."""
    counts[1 + layer] += counts[0]
    signals[layer] = counts[1 + layer]
