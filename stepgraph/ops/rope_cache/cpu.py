"""`rope_cache` on the CPU: our own kernel for float32 of whole projections without head norms, else the reference."""

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.rope_cache import reference

_rope_cache = native.declare(
    "rope_cache(Tensor qkv, Tensor positions, Tensor kv_slots, Tensor cos_sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "int num_heads) -> Tensor"
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
    value_norm: bool = False,
) -> Tensor:
    """See `stepgraph.ops.rope_cache.rope_cache`."""
    G, D = k_cache.shape[-2:]
    plain = q_norm is None and not value_norm and qkv.shape[1] == (num_heads + 2 * G) * D
    is_float32 = qkv.dtype == k_cache.dtype == torch.float32
    if plain and is_float32 and D % (2 * native.LANES) == 0 and native.available():
        return _rope_cache(qkv, positions, kv_slots, cos_sin, k_cache, v_cache, num_heads)
    return reference.rope_cache(
        qkv, positions, kv_slots, cos_sin, q_norm, k_norm, k_cache, v_cache, num_heads, eps, value_norm
    )
