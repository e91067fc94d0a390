"""What happens to a merged q·k·v projection before attention, in one operator: optional RMS norm of each query and key
head (Qwen3), rotary position embedding, and the write of keys and values into the paged cache.

Source: Su et al., "RoFormer" (2021), in the half-split form used by Llama and Qwen checkpoints on the Hugging Face hub.
"""

from torch import Tensor

from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.rope_cache import cpu

_rope_cache = register(
    "rope_cache(Tensor qkv, Tensor positions, Tensor kv_slots, Tensor cos_sin, Tensor? q_norm, Tensor? k_norm, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, int num_heads, float eps, bool value_norm=False) -> Tensor",
    {"cpu": Inlined(cpu.rope_cache), "cuda": "stepgraph.ops.rope_cache.triton:rope_cache"},
)


def rope_cache(
    qkv: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    eps: float,
    *,
    value_norm: bool = False,
) -> Tensor:
    """Normalise heads (if weights are given), rotate queries and keys, cache keys and values. May run inside a graph.

    Shapes: T tokens, H query heads, G key/value heads, D head size, B tokens per block.

    Args:
        qkv: [T, (H + 2G)·D], queries then keys then values; contiguous. [T, (H + G)·D], queries then keys: values are the keys
            before norm and rotation (Gemma 4). [T, H·D], queries alone: nothing is cached.
        positions: [T] int32, position of each token in its sequence.
        kv_slots: [T] int32, `block · B + offset` of each token's cache entry; padding tokens name slot 0 (the null block).
        cos_sin: [max positions, D] float32; cosines of the D/2 frequencies, then sines.
        q_norm, k_norm: [D] weights of the per-head RMS norm, both or neither; of queries alone, there is no `k_norm`.
        k_cache, v_cache: [blocks, B, G, D] in the dtype of `qkv`, or torch.float8_e4m3fn: values are then rounded once more,
            those beyond ±448 to ±448; written at `kv_slots`.
        num_heads: H.
        eps: of the RMS norm.
        value_norm: whether each value head gets an RMS norm as well, which has no weight and is rounded once.

    Returns:
        Rotated queries, [T, H, D] contiguous, dtype of `qkv`. The rotation is computed in float32 and rounded once.
    """
    return _rope_cache(qkv, positions, kv_slots, cos_sin, q_norm, k_norm, k_cache, v_cache, num_heads, eps, value_norm)
