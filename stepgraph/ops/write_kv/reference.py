"""Plain torch definition of `write_kv`; also its CPU kernel.

Shapes: T tokens, G key/value heads, D head size.
"""

import torch
from torch import Tensor

FLOAT8_MAX = 448.0
"""Largest float8_e4m3fn; a conversion of what lies beyond would give NaN on some devices and this on others."""


def write_kv(k: Tensor, v: Tensor, kv_slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """See `stepgraph.ops.write_kv.write_kv`."""
    for x_TGD, cache in ((k, k_cache), (v, v_cache)):
        write_entries(x_TGD, kv_slots, cache)


def write_entries(x: Tensor, kv_slots: Tensor, cache: Tensor) -> None:
    """Write what tokens have, [T, …], to a cache, [blocks, B, …], in its dtype: as `write_kv` says."""
    lines = cache.view(-1, *cache.shape[2:])
    slots = kv_slots.long()
    if cache.dtype == torch.float8_e4m3fn:  # which torch's index_copy_ does not know on CPU
        lines.index_put_((slots,), x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(cache.dtype))
    else:
        lines.index_copy_(0, slots, x)
