"""Mamba-2's scan over a chunk of tokens at once, in torch.

Of a chunk's C tokens, let c_i be the sum of the logarithms of the decays of tokens 0 … i, V the rows Δ·x, and with M_ij =
exp(c_i - c_j) C_i·B_j for j ≤ i

    out = diag(exp(c)) C S + M V,        S ← exp(c_last) S + (diag(exp(c_last - c)) B)ᵀ V

with the state S before the chunk.
"""

from torch import Tensor

from stepgraph.ops.mamba2.reference import Heads

CHUNK = 64
"""Tokens at once."""
FEW = 16
"""Rows of up to so many tokens run token by token."""


def advance_by_chunks(state: Tensor, heads: Heads, out: Tensor) -> Tensor:
    """As `stepgraph.ops.mamba2.reference.advance`, a chunk at a time."""
    for first in range(0, len(out), CHUNK):
        chunk = slice(first, first + CHUNK)
        x, b, c = (x[chunk].transpose(0, 1) for x in heads[:3])  # [H, C, D], [H, C, N], [H, C, N]
        brought_HCD = x * heads.step[chunk].T.unsqueeze(2)
        total_HC = heads.log_decay[chunk].T.cumsum(1)
        decay_HCC = (total_HC.unsqueeze(2) - total_HC.unsqueeze(1)).tril().exp().tril()
        read_HCD = total_HC.exp().unsqueeze(2) * (c @ state) + (c @ b.transpose(1, 2) * decay_HCC) @ brought_HCD
        out[chunk] = read_HCD.transpose(0, 1)
        kept_HCN = b * (total_HC[:, -1:] - total_HC).exp().unsqueeze(2)
        state = state * total_HC[:, -1].exp().view(-1, 1, 1) + kept_HCN.transpose(1, 2) @ brought_HCD
    return state
