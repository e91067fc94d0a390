"""Plain torch definition of `expanded_attention`, in the precision of its inputs; also its CPU kernel.

Shapes: n tokens of a row as queries, m as keys, H heads, N and P dimensions of a head that are not and that are rotated, V of its
values.
"""

import math

import torch
from torch import Tensor


def expanded_attention(
    q: Tensor,
    absorbed: Tensor,
    kv: Tensor,
    key: Tensor,
    context: Tensor,
    context_lse: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    items: Tensor,
    header: Tensor,
    scale: float,
    tile: int,
    num_programs: int,
) -> Tensor:
    """See `stepgraph.ops.expanded_attention.expanded_attention`; padding tokens are zero. Give it float64 for a precise answer.
    Reads tensor values: opaque to a recording."""
    (T, H), P = context_lse.shape, key.shape[1]
    q_THN = q.unflatten(1, (H, -1))[:, :, :-P]
    q_THP = absorbed[:, :, -P:]
    k_THN, v_THV = kv.unflatten(1, (H, -1)).tensor_split((q_THN.shape[2],), dim=2)
    context_THV = context.view(T, H, -1)
    out = torch.zeros_like(context_THV)
    for start, end, m in zip(query_start.tolist(), query_start[1:].tolist(), kv_len.tolist(), strict=False):
        row, n = slice(start, end), end - start
        if n == 0:
            continue
        scores_Hnm = torch.einsum("nhd,mhd->hnm", q_THN[row], k_THN[row])
        scores_Hnm = (scores_Hnm + torch.einsum("nhp,mp->hnm", q_THP[row], key[row])) * scale
        scores_Hnm.masked_fill_(torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
        out[row] = torch.einsum("hnm,mhv->nhv", scores_Hnm.softmax(-1), v_THV[row])
        if m > n:
            lse_nH = scores_Hnm.logsumexp(-1).T
            weight_nH = torch.sigmoid(context_lse[row] * math.log(2) - lse_nH).to(out.dtype)
            out[row] = torch.lerp(out[row], context_THV[row], weight_nH.unsqueeze(2))
    return out.flatten(1)
