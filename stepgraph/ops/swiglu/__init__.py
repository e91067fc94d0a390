"""SwiGLU activation: silu(gate) · up. Source: Shazeer, "GLU Variants Improve Transformer" (2020)."""

from torch import Tensor

from stepgraph.ops.registry import register
from stepgraph.ops.swiglu import reference

_swiglu = register(
    "swiglu(Tensor gate_up) -> Tensor",
    cpu=reference.swiglu,
    fake=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    cuda="stepgraph.ops.swiglu.triton:swiglu",
    inline_on_cpu=True,
)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up for a merged projection. May run inside a graph.

    Args:
        gate_up: [rows, 2 · width] with the gate in the first half; contiguous. silu is taken in float32 and rounded to
            the dtype before the product, as transformers does.

    Returns:
        [rows, width], dtype of `gate_up`.
    """
    return _swiglu(gate_up)
