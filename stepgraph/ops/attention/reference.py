"""Plain torch definition of `paged_attention`, in the precision of its inputs: what kernels are tested against."""

import torch
from torch import Tensor


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """See `stepgraph.ops.attention.paged_attention`; padding tokens are zero. Give it float64 for a precise answer."""
    T, H, D = q.shape
    block_size, G = k_cache.shape[1:3]
    out = q.new_zeros(T, H, D)
    for row, slot in enumerate(row_slot.tolist()):
        start, end, m = int(query_start[row]), int(query_start[row + 1]), int(kv_len[row])
        if start == end:
            continue
        context_len = m - (end - start)
        first_key = max(0, context_len - window + 1) if window else 0
        positions = torch.arange(first_key, m, device=q.device)
        blocks = block_table[slot].long()[positions // block_size]
        k_mHD = k_cache[blocks, positions % block_size].to(q.dtype).repeat_interleave(H // G, dim=1)
        v_mHD = v_cache[blocks, positions % block_size].to(q.dtype).repeat_interleave(H // G, dim=1)
        scores_Hnm = torch.einsum("nhd,mhd->hnm", q[start:end], k_mHD) * scale
        if softcap:
            scores_Hnm = softcap * torch.tanh(scores_Hnm / softcap)
        distance_nm = torch.arange(context_len, m, device=q.device)[:, None] - positions
        unseen_nm = (distance_nm < 0) | (distance_nm >= window) if window else distance_nm < 0
        scores_Hnm.masked_fill_(unseen_nm, float("-inf"))
        if sinks is not None:  # as of a key whose value is zero
            sink_Hn1 = sinks.to(q.dtype)[:, None, None].expand(-1, end - start, 1)
            scores_Hnm, v_mHD = torch.cat((scores_Hnm, sink_Hn1), 2), torch.cat((v_mHD, torch.zeros_like(v_mHD[:1])))
        out[start:end] = torch.einsum("hnm,mhd->nhd", scores_Hnm.softmax(-1), v_mHD)
    return out.view(T, H * D)
