"""Plain torch definition of `sigmoid_gate`; also its CPU kernel.

Written out because `torch.sigmoid` rounds otherwise where scalar code takes over from vectors: a token's bits would depend on how
many tokens there are. `exp` rounds alike everywhere.
"""

import torch
from torch import Tensor


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """See `stepgraph.ops.sigmoid_gate.sigmoid_gate`."""
    return x * (1 / (1 + torch.exp(-gate.float()))).to(x.dtype)
