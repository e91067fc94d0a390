"""Matrix product with a weight in the checkpoint's [out, in] layout.

The library's product, except where it is slow: for a handful of tokens the product is a read of the weight, and a kernel
that only streams it gets closer to the memory's bandwidth.
"""

from torch import Tensor

from stepgraph.ops.linear import reference
from stepgraph.ops.registry import register

_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=reference.linear,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cuda="stepgraph.ops.linear.triton:linear",
    inline_on_cpu=True,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, accumulated in float32. May run inside a graph.

    Which kernel computes it depends on the number of tokens and the sizes of the weight only.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K], same dtype, contiguous.
        bias: [N] or None.

    Returns:
        [T, N], dtype of `x`.
    """
    return _linear(x, weight, bias)
