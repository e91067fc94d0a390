"""RMS norm of each head, multiplied by the SiLU of a gate: what follows a gated delta rule.

Source: Yang et al., "Gated Delta Networks" (2024); transformers' `Qwen3NextRMSNormGated`.
"""

from torch import Tensor

from stepgraph.ops.gated_norm import reference
from stepgraph.ops.registry import Inlined, register

_gated_norm = register(
    "gated_norm(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor",
    {"cpu": Inlined(reference.gated_norm), "cuda": "stepgraph.ops.gated_norm.triton:gated_norm"},
)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / rms(x) · silu(gate), head by head. May run inside a graph.

    Shapes: T tokens, H heads, D head size.

    Args:
        x: [T, H·D], contiguous.
        gate: [T, H·D], dtype of `x`; rows may lie apart.
        weight: [D].
        eps: added to the mean square.

    Returns:
        [T, H·D] contiguous, dtype of `x`; computed in float32 and rounded once.
    """
    return _gated_norm(x, gate, weight, eps)
