"""Plain torch definition of `swiglu` and `geglu`; also their CPU kernels.

Written out because `F.silu` and `F.gelu` round otherwise where a thread's share ends and scalar code takes over from vectors: a
token's bits would depend on how many tokens there are. `exp` and `tanh` round alike everywhere.
"""

import math

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """See `stepgraph.ops.swiglu.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate32 = gate.float()
    return (gate32 / (1 + torch.exp(-gate32))).to(gate.dtype) * up


def geglu(gate_up: Tensor) -> Tensor:
    """See `stepgraph.ops.swiglu.geglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate32 = gate.float()
    inner = math.sqrt(2 / math.pi) * (gate32 + 0.044715 * gate32**3)
    return (0.5 * gate32 * (1 + torch.tanh(inner))).to(gate.dtype) * up
