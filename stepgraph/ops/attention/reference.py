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
) -> Tensor:
    """See `stepgraph.ops.attention.paged_attention`; padding tokens are zero. Give it float64 for a precise answer."""
    T, H, D = q.shape
    block_size, G = k_cache.shape[1:3]
    out = q.new_zeros(T, H, D)
    for row, slot in enumerate(row_slot.tolist()):
        start, end, m = int(query_start[row]), int(query_start[row + 1]), int(kv_len[row])
        if start == end:
            continue
        positions = torch.arange(m, device=q.device)
        blocks = block_table[slot].long()[positions // block_size]
        k_mHD = k_cache[blocks, positions % block_size].repeat_interleave(H // G, dim=1)
        v_mHD = v_cache[blocks, positions % block_size].repeat_interleave(H // G, dim=1)
        scores_Hnm = torch.einsum("nhd,mhd->hnm", q[start:end], k_mHD) * scale
        query_position = torch.arange(m - (end - start), m, device=q.device)
        scores_Hnm.masked_fill_(positions[None, None, :] > query_position[None, :, None], float("-inf"))
        out[start:end] = torch.einsum("hnm,mhd->nhd", scores_Hnm.softmax(-1), v_mHD)
    return out.view(T, H * D)
