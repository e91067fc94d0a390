"""`mla_attention` on the CPU."""

from torch import Tensor

from stepgraph.ops.mla_attention import reference


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
    counters: Tensor,
    value_dim: int,
    scale: float,
    tile: int,
    num_programs: int,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.mla_attention.mla_attention`. Reads tensor values: opaque to a recording."""
    return reference.mla_attention(q, cache, block_table, row_slot, query_start, kv_len, value_dim, scale)
