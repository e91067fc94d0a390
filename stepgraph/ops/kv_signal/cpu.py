"""CPU kernel of `kv_signal`."""

from torch import Tensor

from stepgraph.ops.collectives.cpu import order_memory
from stepgraph.ops.kv_signal import reference


def kv_signal(counts: Tensor, signals: Tensor, layer: int) -> None:
    """See `stepgraph.ops.kv_signal.kv_signal`."""
    order_memory()  # what was written before is there, for other processes, before they are told
    reference.kv_signal(counts, signals, layer)
