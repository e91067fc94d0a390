"""Squared ReLU, the activation of feed-forward layers without gates.

Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling" (2021).
"""

from torch import Tensor

from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.relu2 import reference

_relu2 = register(
    "relu2(Tensor x) -> Tensor",
    {"cpu": Inlined(reference.relu2), "cuda": "stepgraph.ops.relu2.triton:relu2"},
)


def relu2(x: Tensor) -> Tensor:
    """Return max(x, 0)², rounded once. May run inside a graph.

    Args:
        x: [rows, width], contiguous.

    Returns:
        [rows, width], dtype of `x`.
    """
    return _relu2(x)
