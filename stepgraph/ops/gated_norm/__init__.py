"""RMS norm of each head, or group of channels, multiplied by the SiLU of a gate before or after: what follows a recurrence.

Source: after the norm: Yang et al., "Gated Delta Networks" (2024), transformers' `Qwen3NextRMSNormGated`; before it: Dao and Gu,
"Transformers are SSMs" (2024), transformers' `MambaRMSNormGated`; either, or a gate alone: transformers' `FalconH1Mixer`.
"""

from torch import Tensor

from stepgraph.ops.gated_norm import reference
from stepgraph.ops.registry import Inlined, register

_gated_norm = register(
    "gated_norm(Tensor x, Tensor gate, Tensor? weight, float eps, int size, bool gate_first) -> Tensor",
    {"cpu": Inlined(reference.gated_norm), "cuda": "stepgraph.ops.gated_norm.triton:gated_norm"},
)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, *, size: int, gate_first: bool = False
) -> Tensor:
    """weight · x / rms(x) · silu(gate), head by head; with the gate first, weight · y / rms(y) of y = x · silu(gate). May run
    inside a graph.

    Shapes: T tokens, H heads, D head size.

    Args:
        x: [T, H·D], contiguous.
        gate: [T, H·D], dtype of `x`; rows may lie apart.
        weight: [D] of all heads, or [H·D]; None: nothing is normalised.
        eps: added to the mean square.
        size: D.
        gate_first: whether what is normalised is gated.

    Returns:
        [T, H·D] contiguous, dtype of `x`; computed in float32 and rounded once.
    """
    return _gated_norm(x, gate, weight, eps, size, gate_first)
