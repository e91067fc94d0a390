"""Plain torch definition of `rope_cache`; also its CPU kernel.

Shapes: T tokens, H query heads, G key/value heads, D head size.
"""

import torch
from torch import Tensor

from stepgraph.ops.rms_norm.reference import rms_norm


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
) -> Tensor:
    """See `stepgraph.ops.rope_cache.rope_cache`."""
    T = qkv.shape[0]
    G, D = k_cache.shape[-2:]
    q_THD, k_TGD, v_TGD = qkv.view(T, num_heads + 2 * G, D).split([num_heads, G, G], dim=1)
    if q_norm is not None and k_norm is not None:
        q_THD, k_TGD = rms_norm(q_THD, q_norm, eps), rms_norm(k_TGD, k_norm, eps)
    cos_T1D, sin_T1D = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    slots = kv_slots.long()
    k_cache.view(-1, G, D).index_copy_(0, slots, _rotate(k_TGD, cos_T1D, sin_T1D).to(k_cache.dtype))
    v_cache.view(-1, G, D).index_copy_(0, slots, v_TGD.to(v_cache.dtype))
    return _rotate(q_THD, cos_T1D, sin_T1D).to(qkv.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
