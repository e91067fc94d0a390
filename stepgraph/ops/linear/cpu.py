"""`linear_by_row` on the CPU: every row is a product of its own.

The library blocks a product by its number of rows, and in some sizes gives a row other bits at another place in a block
(MKL: odd inputs, nine outputs or fewer). A call with one row always does the same. Blocks of eight rows would make prompts
about twice as fast and decodes of one request about three times as slow.
"""

from torch import Tensor
from torch.nn import functional as F


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See `stepgraph.ops.linear.linear_by_row`. Opaque to a trace, which would hold one product per row."""
    for token in range(x.shape[0]):
        # A copy starts at an aligned address; where a row starts in `x` depends on its place, and vector loads on the start.
        out[token] = F.linear(x[token].clone(), weight, bias)
