"""Matrix products of a mixture of experts: each group of consecutive rows times a weight of its own.

How many rows a group has is data; the number of rows in all, and so the grid, is not.
"""

from torch import Tensor

from stepgraph.ops.grouped_linear import reference
from stepgraph.ops.registry import register

_grouped_linear = register(
    "grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    {
        "cpu": reference.grouped_linear,
        "cuda": "stepgraph.ops.grouped_linear.triton:grouped_linear",
        "meta": lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]),
    },
)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x[i] @ weight[g].T`` for each row i of each group g, accumulated in float32. May run inside a graph.

    Shapes: S rows, N groups, K inputs, O outputs.

    Args:
        x: [S, K] bfloat16, float16 or float32, contiguous; rows of a group lie together, groups in order.
        weight: [N, O, K], same dtype, any strides.
        ends: [N] int32, ascending: the row after the last one of each group; the last is S. A group may be empty.

    Returns:
        [S, O], dtype of `x`.
    """
    return _grouped_linear(x, weight, ends)
