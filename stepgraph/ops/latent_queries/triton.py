"""Triton kernel of `latent_queries`: programs that absorb queries, that rotate them, and that make cache entries, in one launch.

Shapes: T tokens, H heads, N dimensions of a head that are not rotated, P that are, D half of them, R of a latent; L = R + P.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.head_linear.triton import HeadTile, choose_tile, multiply_head
from stepgraph.ops.launched import launched
from stepgraph.ops.rms_norm.triton import scale_rounded
from stepgraph.ops.write_kv.triton import round_to

MAX_ENTRIES = 8
"""Of a program: registers hold so many latents."""


@triton.jit
def _rotate(low, high, cos, sin):
    """Both halves turned by their angles: float32, rounded once to the dtype of `low`."""
    low32, high32 = low.to(tl.float32), high.to(tl.float32)
    return (low32 * cos - high32 * sin).to(low.dtype), (high32 * cos + low32 * sin).to(low.dtype)


@triton.jit
def _angles(positions_ptr, cos_sin_ptr, token_T, inside_T, dim_D, inside_TD, HALF: tl.constexpr):
    """Cosines and sines of the tokens' positions, [T, D]."""
    position_T = tl.load(positions_ptr + token_T, mask=inside_T, other=0).to(tl.int64)
    angle_TD = cos_sin_ptr + position_T[:, None] * (2 * HALF) + dim_D[None, :]
    return tl.load(angle_TD, mask=inside_TD, other=0.0), tl.load(angle_TD + HALF, mask=inside_TD, other=0.0)


@launched
@triton.jit(do_not_specialize=["T"])
def _latent_queries_kernel(
    q_ptr,
    latent_ptr,
    positions_ptr,
    kv_slots_ptr,
    cos_sin_ptr,
    norm_ptr,
    weight_ptr,
    cache_ptr,
    out_ptr,
    q_stride,
    latent_stride,
    head_stride,
    eps,
    T,
    H: tl.constexpr,
    N: tl.constexpr,
    HALF: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ENTRIES: tl.constexpr,  # of a program that makes entries
    ENTRY_HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    """A program per tile of tokens, head, and block of the latent; one more block rotates. Before the heads come ENTRY_HEADS,
    whose programs share the tile's entries. Programs of the same tokens and head are neighbours, then those of a head."""
    L: tl.constexpr = R + 2 * HALF
    block, blocks, head = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64) - ENTRY_HEADS
    first = tl.program_id(1) * BLOCK_T
    dim_D = tl.arange(0, BLOCK_HALF)
    if head < 0:
        token_E = first + ((head + ENTRY_HEADS) * blocks + block) * ENTRIES + tl.arange(0, ENTRIES)
        inside_E = token_E < tl.minimum(first + BLOCK_T, T)
        inside_ED = inside_E[:, None] & (dim_D < HALF)[None, :]
        dim_R = tl.arange(0, BLOCK_R)
        inside_ER = inside_E[:, None] & (dim_R < R)[None, :]
        norm_R = tl.load(norm_ptr + dim_R, mask=dim_R < R, other=0.0)
        cos_ED, sin_ED = _angles(positions_ptr, cos_sin_ptr, token_E, inside_E, dim_D, inside_ED, HALF)
        entry_E1 = cache_ptr + tl.load(kv_slots_ptr + token_E, mask=inside_E, other=0).to(tl.int64)[:, None] * L
        wait_for_previous()  # where tokens lie is older
        latent_E1 = latent_ptr + token_E[:, None] * latent_stride
        latent_ER = tl.load(latent_E1 + dim_R[None, :], mask=inside_ER, other=0.0).to(tl.float32)
        key_ED = latent_E1 + R + dim_D[None, :]
        low_ED = tl.load(key_ED, mask=inside_ED, other=0.0)
        high_ED = tl.load(key_ED + HALF, mask=inside_ED, other=0.0)
        inverse_rms_E1 = tl.rsqrt(tl.sum(latent_ER * latent_ER, axis=1) / R + eps)[:, None]
        latent_ER = scale_rounded(latent_ER, inverse_rms_E1, norm_R[None, :]).to(low_ED.dtype)
        low_ED, high_ED = _rotate(low_ED, high_ED, cos_ED, sin_ED)
        cached: tl.constexpr = cache_ptr.dtype.element_ty
        tl.store(entry_E1 + dim_R[None, :], round_to(latent_ER, cached), mask=inside_ER)
        tl.store(entry_E1 + R + dim_D[None, :], round_to(low_ED, cached), mask=inside_ED)
        tl.store(entry_E1 + R + HALF + dim_D[None, :], round_to(high_ED, cached), mask=inside_ED)
    else:
        token_T = first + tl.arange(0, BLOCK_T)
        inside_T = token_T < T
        q_T1 = q_ptr + token_T.to(tl.int64)[:, None] * q_stride + head * (N + 2 * HALF)
        out_T1 = out_ptr + (token_T.to(tl.int64) * H + head)[:, None] * L
        if block * BLOCK_O < R:
            dim_O = block * BLOCK_O + tl.arange(0, BLOCK_O)
            inside_O = dim_O < R
            sum_TO = multiply_head(
                q_T1,
                inside_T[:, None],
                weight_ptr + head * head_stride + dim_O,
                inside_O,
                R,
                N,
                BLOCK_K,
                STAGES,
                WEIGHT_FIRST,
            )
            tl.store(
                out_T1 + dim_O[None, :], sum_TO.to(q_ptr.dtype.element_ty), mask=inside_T[:, None] & inside_O[None, :]
            )
        else:
            inside_TD = inside_T[:, None] & (dim_D < HALF)[None, :]
            cos_TD, sin_TD = _angles(positions_ptr, cos_sin_ptr, token_T, inside_T, dim_D, inside_TD, HALF)
            wait_for_previous()  # where tokens lie is older
            q_TD = q_T1 + N + dim_D[None, :]
            low_TD, high_TD = tl.load(q_TD, mask=inside_TD, other=0.0), tl.load(q_TD + HALF, mask=inside_TD, other=0.0)
            low_TD, high_TD = _rotate(low_TD, high_TD, cos_TD, sin_TD)
            tl.store(out_T1 + R + dim_D[None, :], low_TD, mask=inside_TD)
            tl.store(out_T1 + R + HALF + dim_D[None, :], high_TD, mask=inside_TD)


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
    out = q.new_empty(q.shape[0], H, latent.shape[1])
    tile = choose_tile(q, H, R, N, deterministic=deterministic)
    launch(q, latent, positions, kv_slots, cos_sin, latent_norm, key_weight, cache, eps, out, tile)
    return out


def launch(
    q: Tensor,
    latent: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    cos_sin: Tensor,
    latent_norm: Tensor,
    key_weight: Tensor,
    cache: Tensor,
    eps: float,
    out: Tensor,
    tile: HeadTile,
) -> None:
    """`latent_queries` in tiles of this kind, queries into `out`."""
    (H, N, R), T, half = key_weight.shape, q.shape[0], cos_sin.shape[1] // 2
    blocks = triton.cdiv(R, tile.outputs) + 1
    entries = min(MAX_ENTRIES, triton.next_power_of_2(triton.cdiv(tile.tokens, blocks)))
    entry_heads = triton.cdiv(tile.tokens, entries * blocks)
    _latent_queries_kernel[(blocks, triton.cdiv(T, tile.tokens), entry_heads + H)](
        q,
        latent,
        positions,
        kv_slots,
        cos_sin,
        latent_norm,
        key_weight,
        cache,
        out,
        q.stride(0),
        latent.stride(0),
        key_weight.stride(0),
        eps,
        T,
        H=H,
        N=N,
        HALF=half,
        R=R,
        BLOCK_T=tile.tokens,
        BLOCK_O=tile.outputs,
        BLOCK_K=tile.inputs,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_R=triton.next_power_of_2(R),
        ENTRIES=entries,
        ENTRY_HEADS=entry_heads,
        STAGES=tile.num_stages,
        WEIGHT_FIRST=tile.weight_first,
        num_warps=tile.num_warps,
        **LAUNCH,
    )
