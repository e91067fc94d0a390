"""`rope_cache` and `paged_attention` of a step, as one kernel where the step is one row of few tokens.

One request that decodes has the machine for itself and waits for latency: of the launch between the two, of keys and values on
their way from memory. In one kernel the new keys stay in registers, and those of earlier steps are under way before the
projection is done.
"""

from torch import Tensor

from stepgraph.ops.attention import AttentionGeometry, AttentionPlan, paged_attention
from stepgraph.ops.build import StepTokens
from stepgraph.ops.registry import brings_kernel, register
from stepgraph.ops.rope_attention import reference
from stepgraph.ops.rope_cache import rope_cache

_rope_attention = register(
    "rope_attention(Tensor qkv, Tensor kv_slots, Tensor cos_sin, Tensor? q_norm, Tensor? k_norm, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor block_table, Tensor row_slot, Tensor query_start, Tensor kv_len, Tensor items, Tensor header, "
    "Tensor(c!) partials, Tensor(d!) counters, int num_heads, float eps, float scale, Tensor? sinks=None, "
    "float softcap=0.0) -> Tensor",
    {"cpu": reference.rope_attention, "cuda": "stepgraph.ops.rope_attention.triton:rope_attention"},
)


def has_kernel(qkv: Tensor, head_dim: int, geometry: AttentionGeometry, window: int) -> bool:
    """Whether one kernel can do it all: tensor cores take halves of heads, of powers of two."""
    halves_fit = 32 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0
    if not (geometry.is_one_row and not window and halves_fit) or qkv.is_cpu:
        return False
    return brings_kernel("rope_attention", qkv.device)


def rope_attention(
    qkv: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    tokens: StepTokens,
    plan: AttentionPlan,
    geometry: AttentionGeometry,
    *,
    num_heads: int,
    eps: float,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    value_norm: bool = False,
) -> Tensor:
    """Normalise and rotate heads, cache keys and values, and attend. Runs inside the graph.

    Arguments as of `rope_cache` and `paged_attention`; a token's position is its place in its row: `kv_len - query_len + j`
    for the row's token j.

    Returns:
        [T, H·D], dtype of `qkv`. Padding tokens get unspecified values.
    """
    num_kv_heads, head_dim = k_cache.shape[-2:]
    is_plain = qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim and not value_norm
    if is_plain and has_kernel(qkv, head_dim, geometry, window):
        return _rope_attention(
            qkv, tokens.kv_slots, cos_sin, q_norm, k_norm, k_cache, v_cache, block_table, tokens.row_slot, tokens.query_start,
            tokens.kv_len, *plan, num_heads, eps, scale, sinks, softcap,
        )  # fmt: skip
    q_THD = rope_cache(
        qkv, tokens.positions, tokens.kv_slots, cos_sin, q_norm, k_norm, k_cache, v_cache, num_heads, eps,
        value_norm=value_norm,
    )  # fmt: skip
    return paged_attention(
        q_THD, k_cache, v_cache, block_table, tokens.row_slot, tokens.query_start, tokens.kv_len, plan, geometry, scale, window,
        sinks, softcap,
    )  # fmt: skip
