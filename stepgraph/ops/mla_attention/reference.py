"""Plain torch definition of the operators, in the precision of its inputs: what kernels are tested against."""

import math

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
    out = q.new_zeros(T, H, value_dim)
    for row, slot in enumerate(row_slot.tolist()):
        start, end, m = int(query_start[row]), int(query_start[row + 1]), int(kv_len[row])
        if start == end:
            continue
        positions = torch.arange(m, device=q.device)
        entry_mL = _entries(cache, block_table[slot], positions).to(q.dtype)
        scores_Hnm = torch.einsum("nhl,ml->hnm", q[start:end], entry_mL) * scale
        scores_Hnm.masked_fill_(positions > positions[m - (end - start) :].unsqueeze(1), float("-inf"))
        out[start:end] = torch.einsum("hnm,mr->nhr", scores_Hnm.softmax(-1), entry_mL[:, :value_dim])
    return out


def mla_context_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    value_dim: int,
    scale: float,
    tile: int,
    num_programs: int,
) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.mla_attention.mla_context_attention`; zeros where its results are unspecified. Also its CPU
    kernel, which reads tensor values: opaque to a recording."""
    T, H, _ = q.shape
    out, lse_TH = q.new_zeros(T, H, value_dim), q.new_zeros(T, H, dtype=torch.promote_types(q.dtype, torch.float32))
    for row, slot in enumerate(row_slot.tolist()):
        tokens, m = slice(int(query_start[row]), int(query_start[row + 1])), int(context_len[row])
        if m:
            entry_mL = _entries(cache, block_table[slot], torch.arange(m, device=q.device)).to(q.dtype)
            scores_nHm = torch.einsum("nhl,ml->nhm", q[tokens], entry_mL) * scale
            lse_TH[tokens] = scores_nHm.to(lse_TH.dtype).logsumexp(-1) / math.log(2)
            out[tokens] = torch.einsum("nhm,mr->nhr", scores_nHm.softmax(-1), entry_mL[:, :value_dim])
    return out, lse_TH


def _entries(cache: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Of these positions of the slot whose table this is."""
    block_size = cache.shape[1]
    return cache[table.long()[positions // block_size], positions % block_size]
