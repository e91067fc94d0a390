"""Matrix products of heads: each head's part of a token times a weight of the head's own."""

from torch import Tensor

from stepgraph.ops.head_linear import cpu
from stepgraph.ops.registry import Inlined, register

_head_linear = register(
    "head_linear(Tensor x, Tensor weight, bool deterministic) -> Tensor",
    {"cpu": Inlined(cpu.head_linear, recorded=cpu.recorded), "cuda": "stepgraph.ops.head_linear.triton:head_linear"},
)


def head_linear(x: Tensor, weight: Tensor, *, deterministic: bool) -> Tensor:
    """``x[:, h] @ weight[h].T`` for each head h, accumulated in float32. May run inside a graph.

    Shapes: T tokens, H heads, K inputs and N outputs of a head.

    Args:
        x: [T, H, K] bfloat16, float16 or float32, contiguous.
        weight: [H, N, K], same dtype; heads may lie apart, the rest is contiguous.
        deterministic: a token's result depends, bit for bit, on the token and the weight only.

    Returns:
        [T, H·N], dtype of `x`.
    """
    return _head_linear(x, weight, deterministic)
