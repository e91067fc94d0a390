"""Plain torch definition of `rope_cache`; also its CPU kernel.

Shapes: T tokens, H query heads, G key/value heads, N = H + G, D head size.
"""

import torch
from torch import Tensor

from stepgraph.ops.rms_norm.reference import rms_norm
from stepgraph.ops.write_kv.reference import write_kv


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
    qk_TND, v_TGD = qkv.view(T, num_heads + 2 * G, D).split([num_heads + G, G], dim=1)
    if q_norm is not None and k_norm is not None:
        q_THD, k_TGD = qk_TND.split([num_heads, G], dim=1)
        qk_TND = torch.cat((rms_norm(q_THD, q_norm, eps), rms_norm(k_TGD, k_norm, eps)), dim=1)
    rotated_TND = rotate(qk_TND.float(), *cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1))
    q_THD, k_TGD = rotated_TND.to(qkv.dtype).split([num_heads, G], dim=1)
    write_kv(k_TGD, v_TGD, kv_slots, k_cache, v_cache)
    return q_THD.contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    low, high = x.chunk(2, dim=-1)
    out_low, out_high = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return out
