"""Plain torch definition of `relu2`; also its CPU kernel."""

from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """See `stepgraph.ops.relu2.relu2`."""
    return x.clamp(min=0).square()
