"""RMS normalisation, alone and fused with the residual addition before it.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); rounding as in transformers' LlamaRMSNorm
(normalise in float32, round to the activation dtype, then multiply by the weight).
"""

import torch
from torch import Tensor

from stepgraph.ops.registry import register
from stepgraph.ops.rms_norm import reference

_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    cpu=reference.rms_norm,
    fake=lambda x, weight, eps: torch.empty_like(x),
    cuda="stepgraph.ops.rms_norm.triton:rms_norm",
    inline_on_cpu=True,
)
_add_rms_norm = register(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    cpu=reference.add_rms_norm,
    fake=lambda x, residual, weight, eps: torch.empty_like(x),
    cuda="stepgraph.ops.rms_norm.triton:add_rms_norm",
    inline_on_cpu=True,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise each row of `x`. May run inside a graph.

    Args:
        x: [rows, width] bfloat16, float16 or float32, contiguous.
        weight: [width], same dtype.
        eps: added to the mean square.

    Returns:
        [rows, width], dtype of `x`.
    """
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x` in place (rounded to its dtype), then `rms_norm(residual)`. May run inside a graph.

    Args:
        x: [rows, width], contiguous.
        residual: [rows, width], same dtype, contiguous; updated.
        weight: [width].
        eps: added to the mean square.

    Returns:
        [rows, width], dtype of `x`.
    """
    return _add_rms_norm(x, residual, weight, eps)
