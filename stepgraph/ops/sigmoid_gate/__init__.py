"""What a layer gives, multiplied by the sigmoid of a gate: one for each entry, or one for each token.

Source: Qiu et al., "Gated Attention for Large Language Models" (2025); transformers' `Qwen2MoeSparseMoeBlock`.
"""

from torch import Tensor

from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.sigmoid_gate import reference

_sigmoid_gate = register(
    "sigmoid_gate(Tensor x, Tensor gate) -> Tensor",
    {"cpu": Inlined(reference.sigmoid_gate), "cuda": "stepgraph.ops.sigmoid_gate.triton:sigmoid_gate"},
)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x · sigmoid(gate). May run inside a graph.

    Args:
        x: [T, F], contiguous.
        gate: [T, F], or [T, 1] if a token has one gate; dtype of `x`; rows may lie apart. Its sigmoid is taken in float32 and
            rounded to the dtype before the product, as transformers does.

    Returns:
        [T, F] contiguous, dtype of `x`. A row of it depends, bit for bit, on that row of both only.
    """
    return _sigmoid_gate(x, gate)
