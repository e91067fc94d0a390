"""`latent_queries` on the CPU: our own kernel for float32, which is deterministic as it is, else the reference."""

from typing import Any

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.latent_queries import reference

_latent_queries = native.declare(
    "latent_queries(Tensor q, Tensor latent, Tensor positions, Tensor kv_slots, Tensor cos_sin, Tensor latent_norm, "
    "Tensor key_weight, Tensor(a!) cache, float eps) -> Tensor"
)


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
    inputs = q, latent, positions, kv_slots, cos_sin, latent_norm, key_weight, cache, eps
    if _has_native_kernel(q, key_weight, cache):
        return _latent_queries(*inputs)
    return reference.latent_queries(*inputs, deterministic)


def recorded(*inputs: Any) -> Any:
    """What a recording of `latent_queries` holds: its operators, or NotImplemented for the opaque operator where these would be
    one product per token."""
    q, key_weight, cache, deterministic = inputs[0], *inputs[6:8], inputs[9]
    return NotImplemented if deterministic and not _has_native_kernel(q, key_weight, cache) else latent_queries(*inputs)


def _has_native_kernel(q: Tensor, key_weight: Tensor, cache: Tensor) -> bool:
    return q.dtype == cache.dtype == torch.float32 and key_weight.shape[2] % native.LANES == 0 and native.available()
