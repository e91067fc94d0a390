"""Triton kernel of `rope_cache`: one program per token and a few heads of one kind (query, key or value).

Shapes: T tokens, H query heads, G key/value heads, D head size; tensors in the kernel are [heads, D/2], the two halves
of a head apart. `_NH` is such a block of N heads and half a head size H.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.rms_norm.triton import scale_rounded
from stepgraph.ops.write_kv.triton import round_to

MAX_HEADS_PER_PROGRAM = 8
"""Enough work to pay for a program: with four, 2,048 tokens of Qwen3-0.6B took an H100 21 us, with eight 11."""


@triton.jit
def load_norm(norm_ptr, half_H, HALF: tl.constexpr):
    """Both halves of a head's norm weights; ones if there are none."""
    if norm_ptr is None:
        low_H = half_H * 0 + 1.0
        high_H = low_H
    else:
        low_H = tl.load(norm_ptr + half_H, mask=half_H < HALF, other=0.0)
        high_H = tl.load(norm_ptr + HALF + half_H, mask=half_H < HALF, other=0.0)
    return low_H, high_H


@triton.jit
def inverse_rms(low32_NH, high32_NH, eps, HALF: tl.constexpr):
    """Of each head, by which it is multiplied: [heads, 1]."""
    square_N = tl.sum(low32_NH * low32_NH + high32_NH * high32_NH, axis=1)
    return tl.rsqrt(square_N / (2 * HALF) + eps)[:, None]


@triton.jit
def normalise_rotate(
    low_NH, high_NH, norm_low_H, norm_high_H, cos_NH, sin_NH, eps, NORM: tl.constexpr, HALF: tl.constexpr
):
    """Both halves of each head, RMS-normalised if NORM, then rotated by angles that broadcast to them: float32 [heads, D/2]
    each."""
    low32_NH, high32_NH = low_NH.to(tl.float32), high_NH.to(tl.float32)
    if NORM:
        inverse_rms_N1 = inverse_rms(low32_NH, high32_NH, eps, HALF)
        low32_NH = scale_rounded(low32_NH, inverse_rms_N1, norm_low_H[None, :]).to(low_NH.dtype).to(tl.float32)
        high32_NH = scale_rounded(high32_NH, inverse_rms_N1, norm_high_H[None, :]).to(low_NH.dtype).to(tl.float32)
    return (
        low32_NH * cos_NH - high32_NH * sin_NH,
        high32_NH * cos_NH + low32_NH * sin_NH,
    )


@launched
@triton.jit
def _rope_cache_kernel(
    qkv_ptr,
    positions_ptr,
    kv_slots_ptr,
    cos_sin_ptr,
    q_norm_ptr,  # None: no norm
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    PROJECTED: tl.constexpr,  # of keys and values: 2: both, 1: keys, which are the values too; 0: neither
    VALUE_NORM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,  # heads per program; divides H and G
    BLOCK_HALF: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS
    half_H = tl.arange(0, BLOCK_HALF)
    offset_NH = tl.arange(0, HEADS)[:, None] * D + half_H[None, :]
    inside_H = half_H < HALF
    inside_NH = inside_H[None, :]

    angle_H = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * D + half_H
    cos_H = tl.load(angle_H, mask=inside_H, other=0.0)
    sin_H = tl.load(angle_H + HALF, mask=inside_H, other=0.0)
    cache_line = tl.load(kv_slots_ptr + token).to(tl.int64) * G
    q_norm_low_H, q_norm_high_H = load_norm(q_norm_ptr, half_H, HALF)
    k_norm_low_H, k_norm_high_H = load_norm(k_norm_ptr, half_H, HALF)
    has_norm: tl.constexpr = q_norm_ptr is not None
    wait_for_previous()  # where tokens lie is older

    source = head
    if PROJECTED == 1:
        source = tl.where(head < H + G, head, head - G)
    source_NH = qkv_ptr + (token * (H + PROJECTED * G) + source) * D + offset_NH
    low_NH = tl.load(source_NH, mask=inside_NH, other=0.0)
    high_NH = tl.load(source_NH + HALF, mask=inside_NH, other=0.0)

    if head < H:
        low32_NH, high32_NH = normalise_rotate(
            low_NH, high_NH, q_norm_low_H, q_norm_high_H, cos_H[None, :], sin_H[None, :], eps, has_norm, HALF
        )
        q_NH = out_ptr + (token * H + head) * D + offset_NH
        tl.store(q_NH, low32_NH.to(out_ptr.dtype.element_ty), mask=inside_NH)
        tl.store(q_NH + HALF, high32_NH.to(out_ptr.dtype.element_ty), mask=inside_NH)
    elif head < H + G:
        low32_NH, high32_NH = normalise_rotate(
            low_NH, high_NH, k_norm_low_H, k_norm_high_H, cos_H[None, :], sin_H[None, :], eps, has_norm, HALF
        )
        low_NH, high_NH = low32_NH.to(out_ptr.dtype.element_ty), high32_NH.to(out_ptr.dtype.element_ty)
        k_NH = k_cache_ptr + (cache_line + head - H) * D + offset_NH
        tl.store(k_NH, round_to(low_NH, k_cache_ptr.dtype.element_ty), mask=inside_NH)
        tl.store(k_NH + HALF, round_to(high_NH, k_cache_ptr.dtype.element_ty), mask=inside_NH)
    else:
        if VALUE_NORM:
            low32_NH, high32_NH = low_NH.to(tl.float32), high_NH.to(tl.float32)
            inverse_rms_N1 = inverse_rms(low32_NH, high32_NH, eps, HALF)
            low_NH = (low32_NH * inverse_rms_N1).to(out_ptr.dtype.element_ty)
            high_NH = (high32_NH * inverse_rms_N1).to(out_ptr.dtype.element_ty)
        v_NH = v_cache_ptr + (cache_line + head - H - G) * D + offset_NH
        tl.store(v_NH, round_to(low_NH, v_cache_ptr.dtype.element_ty), mask=inside_NH)
        tl.store(v_NH + HALF, round_to(high_NH, v_cache_ptr.dtype.element_ty), mask=inside_NH)


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
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = k_cache.shape[-2:]
    projected = (qkv.shape[1] // head_dim - num_heads) // num_kv_heads
    written = 2 * num_kv_heads if projected else 0
    heads = math.gcd(num_heads, written // 2, MAX_HEADS_PER_PROGRAM // max(1, head_dim // 256))
    out = qkv.new_empty(num_tokens, num_heads, head_dim)
    _rope_cache_kernel[(num_tokens, (num_heads + written) // heads)](
        qkv,
        positions,
        kv_slots,
        cos_sin,
        q_norm,
        k_norm,
        k_cache,
        v_cache,
        out,
        eps,
        H=num_heads,
        G=num_kv_heads,
        PROJECTED=projected,
        VALUE_NORM=value_norm,
        HALF=head_dim // 2,
        HEADS=heads,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=max(1, head_dim // 256),
        **LAUNCH,
    )
    return out
