"""RMS normalisation.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). The dtype of the weight says where the result is
rounded: a weight of the activations' dtype as in transformers' LlamaRMSNorm (normalise in float32, round, multiply), a
float32 weight as in Gemma3RMSNorm (normalise and multiply in float32, round once).
"""

from torch import Tensor

from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.rms_norm import cpu

_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    {"cpu": Inlined(cpu.rms_norm), "cuda": "stepgraph.ops.rms_norm.triton:rms_norm"},
)

_rms_norm_add = register(
    "rms_norm_add(Tensor x, Tensor weight, float eps, Tensor(a!) residual, Tensor? scale=None) -> ()",
    {"cpu": Inlined(cpu.rms_norm_add), "cuda": "stepgraph.ops.rms_norm.triton:rms_norm_add"},
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise each row of `x`. May run inside a graph.

    Args:
        x: [rows, width] bfloat16, float16 or float32; rows may lie apart.
        weight: [width], same dtype, or float32 for a product that is not rounded before.
        eps: added to the mean square.

    Returns:
        [rows, width] contiguous, dtype of `x`.
    """
    return _rms_norm(x, weight, eps)


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor | None = None) -> None:
    """Add each row of `x`, normalised and rounded, to that of `residual`, and scale the sum. May run inside a graph.

    Args:
        x, weight, eps: as of `rms_norm`.
        residual: [rows, width], dtype of `x`, contiguous; updated.
        scale: [1], dtype of `x`: what the sum, once rounded, is multiplied by, which rounds again; None: nothing.
    """
    _rms_norm_add(x, weight, eps, residual, scale)
