"""`mla_attention` on the CPU: our own kernel for float32, which is deterministic as it is, else torch's, by
`stepgraph.ops.attention.cpu`: attention with one key/value head, whose values are the keys."""

from typing import Any

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.attention.cpu import torch_attention

_mla_attention = native.declare(
    "mla_attention(Tensor q, Tensor cache, Tensor block_table, Tensor row_slot, Tensor query_start, Tensor kv_len, "
    "int value_dim, float scale) -> Tensor"
)


def mla_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    value_dim: int,
    scale: float,
    tile: int,
    num_programs: int,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.mla_attention.mla_attention`."""
    rows = block_table, row_slot, query_start, kv_len
    if _has_native_kernel(q, cache, value_dim):
        return _mla_attention(q, cache, *rows, value_dim, scale)
    entries = cache.unsqueeze(2)
    out_TF = torch_attention(q, entries, entries, *rows, scale, 0, deterministic=deterministic)
    return out_TF.view(q.shape)[:, :, :value_dim].contiguous()


def recorded_attention(q: Tensor, cache: Tensor, *others: Any) -> Any:
    """What a recording of `mla_attention` holds: our own kernel, or NotImplemented for the opaque operator."""
    return mla_attention(q, cache, *others) if _has_native_kernel(q, cache, others[-5]) else NotImplemented


def _has_native_kernel(q: Tensor, cache: Tensor, value_dim: int) -> bool:
    return q.dtype == cache.dtype == torch.float32 and value_dim % native.LANES == 0 and native.available()
