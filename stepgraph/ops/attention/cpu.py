"""CPU kernel of `paged_attention`: rows of equal query length and similar context go through one call of torch's flash
attention, with the query heads of a group folded into the query dimension so that each key is read once.

Shapes: n rows of a batch, q query length, L keys (padded to the longest row), G key/value heads, g group, D head size.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_plan(
    query_start: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tile: int,
    min_split_keys: int,
    split_target: int,
    max_items: int,
    max_partials: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CPU kernel needs no item list: four empty tensors."""
    empty = [query_start.new_empty(0) for _ in range(4)]
    return empty[0], empty[1], empty[2], empty[3]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    counters: Tensor,
    scale: float,
    tile: int,
    num_programs: int,
) -> Tensor:
    """See `stepgraph.ops.attention.paged_attention`."""
    T, H, D = q.shape
    block_size, G = k_cache.shape[1:3]
    slots, starts, lens = row_slot.tolist(), query_start.tolist(), kv_len.tolist()
    batches: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for row, m in enumerate(lens):
        n = starts[row + 1] - starts[row]
        if n:
            batches[n, (-(-m // block_size)).bit_length()].append(row)

    out = q.new_zeros(T, H * D)
    for (query_len, _), rows in batches.items():
        longest = max(lens[row] for row in rows)
        num_blocks = -(-longest // block_size)
        blocks = block_table[[slots[row] for row in rows], :num_blocks].flatten()
        k_nLGD, v_nLGD = (
            cache.index_select(0, blocks).view(len(rows), num_blocks * block_size, G, D)[:, :longest]
            for cache in (k_cache, v_cache)
        )
        tokens = [token for row in rows for token in range(starts[row], starts[row + 1])]
        contiguous = tokens[-1] - tokens[0] + 1 == len(tokens)
        q_n = q[tokens[0] : tokens[-1] + 1] if contiguous else q[tokens]
        if len(rows) == 1 and query_len == longest > 1:  # a whole prompt: half of the scores need not be computed
            q_nHqD = q_n.view(1, query_len, H, D).transpose(1, 2)
            k_nGLD, v_nGLD = k_nLGD.transpose(1, 2), v_nLGD.transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                q_nHqD, k_nGLD, v_nGLD, is_causal=True, scale=scale, enable_gqa=True
            )
            out[tokens[0] : tokens[-1] + 1] = attended.transpose(1, 2).reshape(query_len, H * D)
            continue
        mask = None
        if len(rows) > 1 or query_len > 1:
            m_n1 = kv_len[rows].unsqueeze(1)
            key_L = torch.arange(longest, dtype=torch.int32)
            query_position_nq = m_n1 - query_len + torch.arange(query_len, dtype=torch.int32)
            seen_nqL = key_L <= query_position_nq.unsqueeze(2)
            mask = seen_nqL.unsqueeze(1).expand(-1, H // G, -1, -1).reshape(len(rows), 1, -1, longest)
        if len(rows) > 1:  # a shorter row's tail may hold anything, and 0 · NaN is NaN
            beyond_nL11 = (key_L >= m_n1)[:, :, None, None]
            k_nLGD.masked_fill_(beyond_nL11, 0)
            v_nLGD.masked_fill_(beyond_nL11, 0)
        q_nqGgD = q_n.view(len(rows), query_len, G, H // G, D)
        attended = F.scaled_dot_product_attention(
            q_nqGgD.permute(0, 2, 3, 1, 4).reshape(len(rows), G, -1, D),
            k_nLGD.transpose(1, 2),
            v_nLGD.transpose(1, 2),
            attn_mask=mask,
            scale=scale,
        )
        attended = attended.view(len(rows), G, H // G, query_len, D).permute(0, 3, 1, 2, 4).reshape(-1, H * D)
        if contiguous:
            out[tokens[0] : tokens[-1] + 1] = attended
        else:
            out[tokens] = attended
    return out
