"""Plain torch definition of `linear` and of `linear_by_row`, up to rounding."""

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.linear.linear`."""
    return F.linear(x, weight, bias)
