"""Causal attention of every row's queries over the keys of this step alone, which are whole and per head, added to what the row's
older keys gave. Any composition of rows, in one launch of a constant grid.

It is for what absorbed queries make dear in multi-head latent attention: they take R + P multiply-adds for a score and R for a
value, where keys of a head take N + P, and its values V. Older keys are not made again, for a long context has many of them for
each of this step: `stepgraph.ops.mla_attention.mla_context_attention` attends to their latents, and here the online softmax
begins with its result instead of with nothing.

Source: DeepSeek-AI, "DeepSeek-V2" (2024); online softmax: Milakov and Gimelshein (2018).
"""

from torch import Tensor

from stepgraph.ops.attention import AttentionGeometry, AttentionPlan
from stepgraph.ops.expanded_attention import reference
from stepgraph.ops.expanded_attention.geometry import expanded_geometry
from stepgraph.ops.registry import register

__all__ = ["expanded_attention", "expanded_geometry"]

_expanded_attention = register(
    "expanded_attention(Tensor q, Tensor absorbed, Tensor kv, Tensor key, Tensor context, Tensor context_lse, "
    "Tensor query_start, Tensor kv_len, Tensor items, Tensor header, float scale, int tile, int num_programs) -> Tensor",
    {"cpu": reference.expanded_attention, "cuda": "stepgraph.ops.expanded_attention.triton:expanded_attention"},
)


def expanded_attention(
    q: Tensor,
    absorbed: Tensor,
    kv: Tensor,
    key: Tensor,
    context: Tensor,
    context_lse: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    plan: AttentionPlan,
    geometry: AttentionGeometry,
    *,
    scale: float,
) -> Tensor:
    """Attend to this step's keys up to the query's own, on top of older ones. Runs inside the graph.

    Shapes: T tokens, H heads, N dimensions of a head's keys that are not rotated, P that are, V of its values, R of a latent.

    Token j of a row sees the row's tokens 0 … j of this step. If the row has older keys (``kv_len > query length``), their result
    takes part in the softmax by the logarithm of its sum. Softmax and accumulation are in float32. Tokens of no row may hold
    anything, NaN included.

    Args:
        q: [T, H · (N + P)], rows may lie apart; of each head the N first. Its rotated part is not read.
        absorbed: [T, H, R + P] contiguous, see `stepgraph.ops.latent_queries`; its last part, the rotated queries, is read.
        kv: [T, H · (N + V)], rows may lie apart: of each head its keys and values of this step's tokens.
        key: [T, P], rows may lie apart: the rotated part of the keys, which all heads share.
        context: [T, H · V] contiguous: attention of the tokens over their rows' older keys; of rows without, anything. All so far
            have the dtype of `q`.
        context_lse: [T, H] float32, contiguous: logarithms, to base 2, of the sums of the exponentials of its scores; likewise.
        query_start: [R + 1] int32.
        kv_len: [R] int32, keys of each row, this step's included.
        plan: this step's `attention_plan` for H heads and as many key/value heads.
        geometry: as given to `attention_plan`, an `expanded_geometry`.
        scale: multiplies q·k.

    Returns:
        [T, H · V], dtype of `q`. Padding tokens get unspecified values.
    """
    return _expanded_attention(
        q,
        absorbed,
        kv,
        key,
        context,
        context_lse,
        query_start,
        kv_len,
        plan.items,
        plan.header,
        scale,
        geometry.tile,
        geometry.num_programs,
    )
