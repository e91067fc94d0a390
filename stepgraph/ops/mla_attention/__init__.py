"""Causal multi-head latent attention over a paged cache of latents, any composition of rows in one launch of a constant grid.

All heads of a token share one key, the cached entry, and one value, the entry's first part. So a row's (token, head) pairs are
the rows of one tall product, listed and split as `stepgraph.ops.attention` does, whose `attention_plan` is used: with one
key/value head, and all heads in its group.

Source: DeepSeek-AI, "DeepSeek-V2" (2024).
"""

from torch import Tensor

from stepgraph.ops.attention import AttentionGeometry, AttentionPlan
from stepgraph.ops.mla_attention import cpu, reference
from stepgraph.ops.mla_attention.geometry import mla_geometry
from stepgraph.ops.registry import Inlined, register

__all__ = ["mla_attention", "mla_context_attention", "mla_geometry"]

_mla_attention = register(
    "mla_attention(Tensor q, Tensor cache, Tensor block_table, Tensor row_slot, Tensor query_start, Tensor kv_len, Tensor items, "
    "Tensor header, Tensor(a!) partials, int value_dim, float scale, int tile, int num_programs, "
    "bool deterministic) -> Tensor",
    {
        "cpu": Inlined(cpu.mla_attention, recorded=cpu.recorded_attention),
        "cuda": "stepgraph.ops.mla_attention.triton:mla_attention",
    },
)


def mla_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    plan: AttentionPlan,
    geometry: AttentionGeometry,
    *,
    value_dim: int,
    scale: float,
) -> Tensor:
    """Causal attention of every row's absorbed queries over its cached latents. Runs inside the graph.

    Shapes: T tokens, H heads, L size of an entry, R of its part that is the value, B tokens per block.

    Token j of row r (query length n, kv_len m) is at position p = ``m - n + j`` and sees entries 0 … p. Softmax and accumulation
    are in float32. Entries outside a row's `kv_len` may hold anything, NaN included, and their blocks may belong to others.

    Args:
        q: [T, H, L], contiguous; see `stepgraph.ops.latent_queries`.
        cache: [blocks, B, L] in the dtype of `q` or torch.float8_e4m3fn, whose values are taken as they are; this step's entries
            already written.
        block_table: [slots, max blocks] int32.
        row_slot, kv_len: [R] int32.
        query_start: [R + 1] int32.
        plan: this step's `attention_plan` for H heads and one key/value head with values of `value_dim`; its `partials` are
            written, its counters not used.
        geometry: as given to `attention_plan`; a deterministic one as in `paged_attention`.
        value_dim: R.
        scale: multiplies q·k.

    Returns:
        [T, H, R], dtype of `q`. Padding tokens get unspecified values.
    """
    return _mla_attention(
        q,
        cache,
        block_table,
        row_slot,
        query_start,
        kv_len,
        plan.items,
        plan.header,
        plan.partials,
        value_dim,
        scale,
        geometry.tile,
        geometry.num_programs,
        geometry.deterministic,
    )


_mla_context_attention = register(
    "mla_context_attention(Tensor q, Tensor cache, Tensor block_table, Tensor row_slot, Tensor query_start, Tensor context_len, "
    "Tensor items, Tensor header, Tensor(a!) partials, int value_dim, float scale, int tile, "
    "int num_programs) -> (Tensor, Tensor)",
    {"cpu": reference.mla_context_attention, "cuda": "stepgraph.ops.mla_attention.triton:mla_context_attention"},
)


def mla_context_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    plan: AttentionPlan,
    geometry: AttentionGeometry,
    *,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`mla_attention` of every row's queries over the entries from before this step alone; see
    `stepgraph.ops.expanded_attention` for the others. Runs inside the graph.

    Args:
        context_len: [R] int32, entries of each row from before this step; all tokens of a row see all of them.
        plan: this step's `attention_plan` with `context_len` in place of the rows' numbers of keys, so that rows without context
            have no work in it.
        geometry: as given to `attention_plan`, not deterministic.
        q, cache, block_table, row_slot, query_start, value_dim, scale: as of `mla_attention`.

    Returns:
        [T, H, R], dtype of `q`, and [T, H] float32: logarithms, to base 2, of the sums of ``exp(scale * q·k)``. Padding tokens
        and tokens of rows without context get unspecified values.
    """
    return _mla_context_attention(
        q,
        cache,
        block_table,
        row_slot,
        query_start,
        context_len,
        plan.items,
        plan.header,
        plan.partials,
        value_dim,
        scale,
        geometry.tile,
        geometry.num_programs,
    )
