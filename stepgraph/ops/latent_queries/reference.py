"""Plain torch definition of `latent_queries`; also its CPU kernel where there is none of our own.

Shapes: T tokens, H heads, N dimensions of a head that are not rotated, P that are, R of a latent.
"""

import torch
from torch import Tensor

from stepgraph.ops.head_linear.reference import head_linear
from stepgraph.ops.rms_norm.reference import rms_norm
from stepgraph.ops.rope_cache.reference import rotate
from stepgraph.ops.write_kv.reference import write_entries


def latent_queries(
    q: Tensor,
    latent: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    cos_sin: Tensor,
    latent_norm: Tensor,
    key_weight: Tensor,
    cache: Tensor,
    eps: float,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.latent_queries.latent_queries`."""
    H, N, R = key_weight.shape
    q_THN, q_THP = q.unflatten(1, (H, -1)).tensor_split((N,), dim=2)
    latent_TR, key_TP = latent.tensor_split((R,), dim=1)
    cos_TP, sin_TP = cos_sin.index_select(0, positions).chunk(2, dim=1)
    key_TP = rotate(key_TP.float(), cos_TP, sin_TP).to(q.dtype)
    entry_TL = torch.cat((rms_norm(latent_TR.contiguous(), latent_norm, eps), key_TP), dim=1)
    write_entries(entry_TL, kv_slots, cache)
    q_THP = rotate(q_THP.float(), cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)).to(q.dtype)
    q_THR = head_linear(q_THN, key_weight.transpose(1, 2), deterministic).view(-1, H, R)
    return torch.cat((q_THR, q_THP), dim=2)
