"""Plain torch definition of `mla_attention`, in the precision of its inputs: what kernels are tested against."""

import torch
from torch import Tensor


def mla_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    value_dim: int,
    scale: float,
) -> Tensor:
    """See `stepgraph.ops.mla_attention.mla_attention`; padding tokens are zero. Give it float64 for a precise answer."""
    T, H, _ = q.shape
    block_size = cache.shape[1]
    out = q.new_zeros(T, H, value_dim)
    for row, slot in enumerate(row_slot.tolist()):
        start, end, m = int(query_start[row]), int(query_start[row + 1]), int(kv_len[row])
        if start == end:
            continue
        positions = torch.arange(m, device=q.device)
        blocks = block_table[slot].long()[positions // block_size]
        entry_mL = cache[blocks, positions % block_size].to(q.dtype)
        scores_Hnm = torch.einsum("nhl,ml->hnm", q[start:end], entry_mL) * scale
        scores_Hnm.masked_fill_(positions > positions[m - (end - start) :].unsqueeze(1), float("-inf"))
        out[start:end] = torch.einsum("hnm,mr->nhr", scores_Hnm.softmax(-1), entry_mL[:, :value_dim])
    return out
