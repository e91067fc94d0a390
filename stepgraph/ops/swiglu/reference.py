"""Plain torch definition of `swiglu` and `geglu`; also their CPU kernels."""

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """See `stepgraph.ops.swiglu.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """See `stepgraph.ops.swiglu.geglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
