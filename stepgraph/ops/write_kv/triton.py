"""Triton kernel of `write_kv`: one program per token and a few of its heads, keys and values both.

Shapes: T tokens, G key/value heads, D head size; `_ND` is a block of N heads.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.launched import launched

MAX_HEADS_PER_PROGRAM = 4


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """`x` in `dtype`, which float8 reaches by rounding to ±448 what lies beyond. NaN stays NaN."""
    if dtype == tl.float8e4nv:
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x.to(tl.float32)))
    return x.to(dtype)


@launched
@triton.jit
def _write_kv_kernel(
    k_ptr,
    v_ptr,
    kv_slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,  # heads per program; divides G
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dim_D = tl.arange(0, BLOCK_D)
    head_N = tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64)
    inside_ND = (dim_D < D)[None, :]
    target_ND = (tl.load(kv_slots_ptr + token).to(tl.int64) * G + head_N)[:, None] * D + dim_D[None, :]
    k_N, v_N = (
        k_ptr + token * k_token_stride + head_N * k_head_stride,
        v_ptr + token * v_token_stride + head_N * v_head_stride,
    )
    k_ND = tl.load(k_N[:, None] + dim_D[None, :], mask=inside_ND)
    v_ND = tl.load(v_N[:, None] + dim_D[None, :], mask=inside_ND)
    tl.store(k_cache_ptr + target_ND, round_to(k_ND, k_cache_ptr.dtype.element_ty), mask=inside_ND)
    tl.store(v_cache_ptr + target_ND, round_to(v_ND, v_cache_ptr.dtype.element_ty), mask=inside_ND)


def write_kv(k: Tensor, v: Tensor, kv_slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """See `stepgraph.ops.write_kv.write_kv`."""
    num_kv_heads, head_dim = k_cache.shape[-2:]
    heads = math.gcd(num_kv_heads, MAX_HEADS_PER_PROGRAM)
    _write_kv_kernel[(k.shape[0], num_kv_heads // heads)](
        k,
        v,
        kv_slots,
        k_cache,
        v_cache,
        *k.stride()[:2],
        *v.stride()[:2],
        G=num_kv_heads,
        D=head_dim,
        HEADS=heads,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=2 if heads > 1 else 1,
    )
