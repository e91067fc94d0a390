"""Plain torch definition of `rope_cache`; also its CPU kernel.

Shapes: T tokens, H query heads, G key/value heads, N = H + G (or H: queries alone), D head size.
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
    value_norm: bool = False,
) -> Tensor:
    """See `stepgraph.ops.rope_cache.rope_cache`."""
    T = qkv.shape[0]
    G, D = k_cache.shape[-2:]
    heads_TND = qkv.view(T, -1, D)
    cos_sin_T1D = cos_sin.index_select(0, positions).unsqueeze(1)
    has_keys = heads_TND.shape[1] > num_heads
    qk_TND, v_TGD = heads_TND[:, : num_heads + G], heads_TND[:, -G:]  # which may be the keys
    if q_norm is not None:
        q_THD, k_TGD = qk_TND.tensor_split([num_heads], dim=1)
        qk_TND = rms_norm(q_THD, q_norm, eps)
        if k_norm is not None:
            qk_TND = torch.cat((qk_TND, rms_norm(k_TGD, k_norm, eps)), dim=1)
    rotated_TND = rotate(qk_TND.float(), *cos_sin_T1D.chunk(2, dim=-1)).to(qkv.dtype)
    if not has_keys:
        return rotated_TND
    q_THD, k_TGD = rotated_TND.split([num_heads, G], dim=1)
    if value_norm:
        v_TGD = rms_norm(v_TGD, torch.ones(D, device=qkv.device), eps)
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
