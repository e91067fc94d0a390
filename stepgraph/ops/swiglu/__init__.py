"""Gated activations of feed-forward layers: SwiGLU, silu(gate) · up, and GeGLU, gelu(gate) · up.

Source: Shazeer, "GLU Variants Improve Transformer" (2020); the tanh form of gelu is that of Hendrycks and Gimpel, "Gaussian
Error Linear Units" (2016).
"""

from typing import NamedTuple

from torch import Tensor

from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.swiglu import reference

_swiglu = register(
    "swiglu(Tensor gate, Tensor? up=None) -> Tensor",
    {"cpu": Inlined(reference.swiglu), "cuda": "stepgraph.ops.swiglu.triton:swiglu"},
)
_geglu = register(
    "geglu(Tensor gate, Tensor? up=None) -> Tensor",
    {"cpu": Inlined(reference.geglu), "cuda": "stepgraph.ops.swiglu.triton:geglu"},
)


class Clamp(NamedTuple):
    """Of a SwiGLU: ``(up + 1) · gate · sigmoid(alpha · gate)`` of gates of at most `limit`, and ups of at most that size.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).
    """

    limit: float
    alpha: float


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return silu(gate) · up, of a merged projection or of two tensors. May run inside a graph.

    Args:
        gate: [rows, width], or without `up` [rows, 2 · width], of which the first half is the gate and the second `up`. Rows may
            lie apart. silu is taken in float32 and rounded to the dtype before the product, as transformers does.
        up: [rows, width], dtype of `gate`. Rows may lie apart.

    Returns:
        [rows, width] contiguous, dtype of `gate`.
    """
    return _swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return gelu(gate) · up with gelu in its tanh form; arguments, rounding and result as in `swiglu`."""
    return _geglu(gate, up)
