"""The write of keys and values into the paged cache, for models whose own code rotates them; see also `rope_cache`."""

from torch import Tensor

from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.write_kv import reference

_write_kv = register(
    "write_kv(Tensor k, Tensor v, Tensor kv_slots, Tensor(a!) k_cache, Tensor(b!) v_cache) -> ()",
    {"cpu": Inlined(reference.write_kv), "cuda": "stepgraph.ops.write_kv.triton:write_kv"},
)


def write_kv(k: Tensor, v: Tensor, kv_slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Cache keys and values. May run inside a graph.

    Shapes: T tokens, G key/value heads, D head size, B tokens per block.

    Args:
        k, v: [T, G, D] of one dtype; each head contiguous, tokens and heads anywhere.
        kv_slots: [T] int32, `block · B + offset` of each token's cache entry; padding tokens name slot 0 (the null block).
        k_cache, v_cache: [blocks, B, G, D] in the dtype of `k`, or torch.float8_e4m3fn: values are then rounded, those beyond
            ±448 to ±448; written at `kv_slots`.
    """
    _write_kv(k, v, kv_slots, k_cache, v_cache)
