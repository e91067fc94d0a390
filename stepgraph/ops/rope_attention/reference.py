"""Plain torch definition of the operator `rope_attention`, which has one row; also its CPU kernel."""

import torch
from torch import Tensor

from stepgraph.ops.attention import reference as attention
from stepgraph.ops.rope_cache.reference import rope_cache


def rope_attention(
    qkv: Tensor,
    kv_slots: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
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
    num_heads: int,
    eps: float,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """See `stepgraph.ops.rope_attention.rope_attention`."""
    tokens = qkv.shape[0]
    context_len = kv_len[0] - query_start[1]
    positions = (context_len + torch.arange(tokens, device=qkv.device)).clamp(max=cos_sin.shape[0] - 1)
    q_THD = rope_cache(qkv, positions, kv_slots, cos_sin, q_norm, k_norm, k_cache, v_cache, num_heads, eps)
    rows = row_slot, query_start, kv_len
    return attention.paged_attention(q_THD, k_cache, v_cache, block_table, *rows, scale, 0, sinks, softcap)
