"""Plain torch definition of `swiglu` and `geglu`; also their CPU kernels.

Written out because `F.silu` and `F.gelu` round otherwise where a thread's share ends and scalar code takes over from vectors: a
token's bits would depend on how many tokens there are. `exp` and `tanh` round alike everywhere.
"""

import math

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `stepgraph.ops.swiglu.swiglu`."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    gate32 = gate.float()
    return (gate32 / (1 + torch.exp(-gate32))).to(gate.dtype) * up


def clamped_swiglu(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    """See `stepgraph.ops.swiglu.Clamp`; the gate is in the first half, and all is in float32 up to the product."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * (gate / (1 + torch.exp(-alpha * gate)))).to(gate_up.dtype)


def geglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `stepgraph.ops.swiglu.geglu`."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    gate32 = gate.float()
    inner = math.sqrt(2 / math.pi) * (gate32 + 0.044715 * gate32**3)
    return (0.5 * gate32 * (1 + torch.tanh(inner))).to(gate.dtype) * up
