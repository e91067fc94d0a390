"""Matrix product with a weight in the checkpoint's [out, in] layout.

`linear` is the library's product, except where it is slow: for a handful of tokens the product is a read of the weight, and
a kernel that only streams it gets closer to the memory's bandwidth. Both choose how they add up by the number of tokens, so
a token's result changes in its last bits with the tokens beside it. `linear_by_row` has none of that, and is slower.
"""

from torch import Tensor

from stepgraph.ops.linear import cpu
from stepgraph.ops.registry import register

_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=cpu.linear,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cuda="stepgraph.ops.linear.triton:linear",
    inline_on_cpu=True,
)
_linear_out = register(
    "linear_out(Tensor x, Tensor weight, Tensor(a!) out) -> ()",
    cpu=cpu.linear_out,
    fake=lambda *_: None,
    cuda="stepgraph.ops.linear.triton:linear_out",
    inline_on_cpu=True,
)
_linear_by_row = register(
    "linear_by_row(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
    cpu=cpu.linear_by_row,
    fake=lambda *_: None,
    cuda="stepgraph.ops.linear.triton:linear_by_row",
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, accumulated in float32. May run inside a graph.

    Which kernel computes it depends on the number of tokens and the sizes of the weight only.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K], same dtype, contiguous.
        bias: [N] or None; None with `out`.
        out: [T, N], dtype of `x`, contiguous; overwritten. None makes a new one.

    Returns:
        [T, N], dtype of `x`; `out` if that was given.
    """
    if out is None:
        return _linear(x, weight, bias)
    assert bias is None
    _linear_out(x, weight, out)
    return out


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`linear`, each row of whose result depends, bit for bit, on that row of `x` and on the weight only: not on how many
    rows there are, nor on its place among them. May run inside a graph.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K], same dtype, contiguous.
        bias: [N] or None.
        out: [T, N], dtype of `x`, contiguous; overwritten. None makes a new one.

    Returns:
        `out`.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    _linear_by_row(x, weight, bias, out)
    return out
