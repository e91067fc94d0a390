"""The gated delta rule over a chunk of tokens at once, in torch.

Of a chunk's C tokens, let c_i be the sum of the logarithms of the decays of tokens 0 … i, and

    A_ij = β_i exp(c_i - c_j) k_i·k_j   for j < i,        T = (1 + A)⁻¹

Then the corrections of all tokens, of which each depends on those before, are the rows of

    V' = T diag(β) V - T diag(β exp(c)) K S

with the state S before the chunk, and with M_ij = exp(c_i - c_j) q_i·k_j for j ≤ i

    out = diag(exp(c)) Q S + M V',        S ← exp(c_last) S + (diag(exp(c_last - c)) K)ᵀ V'

1 + A is solved as it stands: the powers of A, of which its inverse could be summed, grow far beyond it where keys repeat.
"""

import torch
from torch import Tensor

from stepgraph.ops.gated_delta.reference import Heads

CHUNK = 64
"""Tokens at once."""
FEW = 16
"""Rows of up to so many tokens run token by token."""


def advance_by_chunks(state: Tensor, heads: Heads, out: Tensor) -> Tensor:
    """As `stepgraph.ops.gated_delta.reference.advance`, a chunk at a time."""
    for first in range(0, len(out), CHUNK):
        chunk = slice(first, first + CHUNK)
        q, k, v = (x[chunk].transpose(0, 1) for x in heads[:3])  # [H, C, N], [H, C, N], [H, C, D]
        total, rate = heads.log_decay[chunk].T.cumsum(1), heads.rate[chunk].T.unsqueeze(2)  # [H, C], [H, C, 1]
        decay_HCC = (total.unsqueeze(2) - total.unsqueeze(1)).tril().exp().tril()
        system_HCC = (rate * k) @ k.transpose(1, 2) * decay_HCC
        known_HCD = total.exp().unsqueeze(2) * k @ state
        new_HCD = torch.linalg.solve_triangular(system_HCC, rate * (v - known_HCD), upper=False, unitriangular=True)
        read_HCD = total.exp().unsqueeze(2) * (q @ state) + (q @ k.transpose(1, 2) * decay_HCC) @ new_HCD
        out[chunk] = read_HCD.transpose(0, 1)
        kept_HCN = k * (total[:, -1:] - total).exp().unsqueeze(2)
        state = state * total[:, -1].exp().view(-1, 1, 1) + kept_HCN.transpose(1, 2) @ new_HCD
    return state
