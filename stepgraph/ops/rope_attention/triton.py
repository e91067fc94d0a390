"""Triton kernel of `rope_attention`: one program per KV head and split of the cached keys.

Keys of earlier steps are in the cache, and on their way before the previous kernel ends; those of this step's tokens are made
from its projection, in registers, by every program of the head that needs them: that of the first split, which also writes
them to the cache.

Shapes: M (token, query head) pairs of the tile, K cached keys of one iteration, N new keys, D head size, H half of it.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.attention.geometry import ITEM_SIZE
from stepgraph.ops.attention.triton import LOG2_E, capped, combine, line_of, load_item, load_sinks
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.rope_cache.triton import load_norm, normalise_rotate
from stepgraph.ops.write_kv.triton import round_to

TILE = 16
KEYS = 64
"""Of one iteration; the loads of two are under way before the previous kernel ends."""
NUM_WARPS = 8


@triton.jit
def _load_cached(
    k_head_ptr,
    v_head_ptr,
    table_ptr,
    start,
    end,
    LINE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Both halves of the keys start … end-1, [K, H] each, and their values, [K, D]; zeros from `end` on."""
    key_K = start + tl.arange(0, KEYS)
    inside_K = key_K < end
    block_K = tl.load(table_ptr + key_K // BLOCK_SIZE, mask=inside_K, other=0)
    line_K = (block_K.to(tl.int64) * BLOCK_SIZE + key_K % BLOCK_SIZE) * LINE
    k_KH = k_head_ptr + line_K[:, None] + tl.arange(0, D // 2)[None, :]
    v_KD = v_head_ptr + line_K[:, None] + tl.arange(0, D)[None, :]
    return (
        tl.load(k_KH, mask=inside_K[:, None], other=0.0),
        tl.load(k_KH + D // 2, mask=inside_K[:, None], other=0.0),
        tl.load(v_KD, mask=inside_K[:, None], other=0.0),
    )


@triton.jit
def _scores(q_low_MH, q_high_MH, k_low_KH, k_high_KH, seen_MK, scale_log2, CAP: tl.constexpr):
    """Scores in units of log 2, -inf where a query does not see a key."""
    dtype = q_low_MH.dtype
    score_MK = tl.dot(q_low_MH, tl.trans(k_low_KH.to(dtype)), input_precision="ieee")
    score_MK = tl.dot(q_high_MH, tl.trans(k_high_KH.to(dtype)), score_MK, input_precision="ieee")
    if CAP > 0:
        score_MK = capped(score_MK, CAP)
    return tl.where(seen_MK, score_MK * scale_log2, float("-inf"))


@launched
@triton.jit(do_not_specialize=["table_width"])
def _rope_attention_kernel(
    qkv_ptr,
    kv_slots_ptr,
    cos_sin_ptr,
    q_norm_ptr,  # None: no norm
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,
    items_ptr,
    header_ptr,
    partials_ptr,
    counters_ptr,
    sinks_ptr,  # None: there are none
    out_ptr,
    table_width,
    eps,
    scale_log2,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAP: tl.constexpr,  # as of `paged_attention`
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    ITEM: tl.constexpr,  # numbers per item
    PAIRS: tl.constexpr,  # combined at once
    SPLITS: tl.constexpr,  # likewise
):
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = (GROUP + 2) * G * D  # of a token's projection
    split = tl.program_id(0) // G
    kv_head = tl.program_id(0) % G
    is_item = split < tl.load(header_ptr)
    keys_per_split = tl.load(header_ptr + 1)
    slot, query_start, query_len, kv_len, _tile, _split, _first_partial = load_item(items_ptr, split, is_item, ITEM)
    context_len = kv_len - query_len
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, context_len)
    table_ptr = block_table_ptr + slot.to(tl.int64) * table_width
    k_head_ptr, v_head_ptr = k_cache_ptr + kv_head * D, v_cache_ptr + kv_head * D
    k_low_KH, k_high_KH, v_KD = _load_cached(k_head_ptr, v_head_ptr, table_ptr, begin, end, G * D, D, BLOCK_SIZE, KEYS)
    next_low_KH, next_high_KH, next_v_KD = _load_cached(
        k_head_ptr, v_head_ptr, table_ptr, begin + KEYS, end, G * D, D, BLOCK_SIZE, KEYS
    )
    half_H, dim_D = tl.arange(0, HALF), tl.arange(0, D)
    pair_M, new_N = tl.arange(0, TILE), tl.arange(0, TILE)
    token_M = pair_M // GROUP
    inside_M1 = (is_item & (token_M < query_len))[:, None]
    inside_N = is_item & (new_N < query_len) & (split == 0)
    inside_N1 = inside_N[:, None]
    angle_MH = cos_sin_ptr + (context_len + token_M)[:, None].to(tl.int64) * D + half_H[None, :]
    angle_NH = cos_sin_ptr + (context_len + new_N)[:, None].to(tl.int64) * D + half_H[None, :]
    cos_MH = tl.load(angle_MH, mask=inside_M1, other=0.0)
    sin_MH = tl.load(angle_MH + HALF, mask=inside_M1, other=0.0)
    cos_NH = tl.load(angle_NH, mask=inside_N1, other=0.0)
    sin_NH = tl.load(angle_NH + HALF, mask=inside_N1, other=0.0)
    q_norm_low_H, q_norm_high_H = load_norm(q_norm_ptr, half_H, HALF)
    k_norm_low_H, k_norm_high_H = load_norm(k_norm_ptr, half_H, HALF)
    has_norm: tl.constexpr = q_norm_ptr is not None
    line_N = tl.load(kv_slots_ptr + query_start + new_N, mask=inside_N, other=0).to(tl.int64) * (G * D)
    wait_for_previous()  # all the above is older

    if is_item:
        token_M1 = qkv_ptr + (query_start + token_M)[:, None].to(tl.int64) * WIDTH
        token_N1 = qkv_ptr + (query_start + new_N)[:, None].to(tl.int64) * WIDTH
        q_MH = token_M1 + (kv_head * GROUP + pair_M % GROUP)[:, None] * D + half_H[None, :]
        k_NH = token_N1 + (G * GROUP + kv_head) * D + half_H[None, :]
        v_ND = token_N1 + (G * GROUP + G + kv_head) * D + dim_D[None, :]
        q_low_MH = tl.load(q_MH, mask=inside_M1, other=0.0)
        q_high_MH = tl.load(q_MH + HALF, mask=inside_M1, other=0.0)
        new_low_NH = tl.load(k_NH, mask=inside_N1, other=0.0)
        new_high_NH = tl.load(k_NH + HALF, mask=inside_N1, other=0.0)
        new_v_ND = tl.load(v_ND, mask=inside_N1, other=0.0)
        dtype = q_low_MH.dtype
        cached: tl.constexpr = k_cache_ptr.dtype.element_ty

        low_MH, high_MH = normalise_rotate(
            q_low_MH, q_high_MH, q_norm_low_H, q_norm_high_H, cos_MH, sin_MH, eps, has_norm, HALF
        )
        low_NH, high_NH = normalise_rotate(
            new_low_NH, new_high_NH, k_norm_low_H, k_norm_high_H, cos_NH, sin_NH, eps, has_norm, HALF
        )
        q_low_MH, q_high_MH = low_MH.to(dtype), high_MH.to(dtype)
        new_low_NH, new_high_NH = round_to(low_NH.to(dtype), cached), round_to(high_NH.to(dtype), cached)
        new_v_ND = round_to(new_v_ND, cached)
        cache_NH = k_head_ptr + line_N[:, None] + half_H[None, :]
        tl.store(cache_NH, new_low_NH, mask=inside_N1)
        tl.store(cache_NH + HALF, new_high_NH, mask=inside_N1)
        tl.store(v_head_ptr + line_N[:, None] + dim_D[None, :], new_v_ND, mask=inside_N1)

        key_K = begin + tl.arange(0, KEYS)
        seen_MN = (new_N[None, :] <= token_M[:, None]) & inside_N[None, :]
        score_MN = _scores(q_low_MH, q_high_MH, new_low_NH, new_high_NH, seen_MN, scale_log2, CAP)
        score_MK = _scores(q_low_MH, q_high_MH, k_low_KH, k_high_KH, (key_K < end)[None, :], scale_log2, CAP)
        max_M = tl.maximum(tl.max(score_MN, axis=1), tl.max(score_MK, axis=1))
        if sinks_ptr is not None:
            sink_M = load_sinks(sinks_ptr, pair_M, kv_head, split == 0, GROUP)
            max_M = tl.maximum(max_M, sink_M)
        reference_M1 = tl.where(max_M == float("-inf"), 0.0, max_M)[:, None]  # of a query that sees no key here
        weight_MN, weight_MK = tl.exp2(score_MN - reference_M1), tl.exp2(score_MK - reference_M1)
        sum_M = tl.sum(weight_MN, axis=1) + tl.sum(weight_MK, axis=1)
        if sinks_ptr is not None:
            sum_M += tl.reshape(tl.exp2(sink_M[:, None] - reference_M1), [TILE])
        acc_MD = tl.dot(weight_MN.to(dtype), new_v_ND.to(dtype), input_precision="ieee")
        acc_MD = tl.dot(weight_MK.to(dtype), v_KD.to(dtype), acc_MD, input_precision="ieee")
        for start in range(begin + KEYS, end, KEYS):
            k_low_KH, k_high_KH, v_KD = next_low_KH, next_high_KH, next_v_KD
            next_low_KH, next_high_KH, next_v_KD = _load_cached(
                k_head_ptr, v_head_ptr, table_ptr, start + KEYS, end, G * D, D, BLOCK_SIZE, KEYS
            )
            key_K = start + tl.arange(0, KEYS)
            score_MK = _scores(q_low_MH, q_high_MH, k_low_KH, k_high_KH, (key_K < end)[None, :], scale_log2, CAP)
            new_max_M = tl.maximum(max_M, tl.max(score_MK, axis=1))
            reference_M1 = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)[:, None]
            weight_MK = tl.exp2(score_MK - reference_M1)
            decay_M1 = tl.exp2(max_M[:, None] - reference_M1)
            sum_M = sum_M * tl.reshape(decay_M1, [TILE]) + tl.sum(weight_MK, axis=1)
            acc_MD = tl.dot(weight_MK.to(dtype), v_KD.to(dtype), acc_MD * decay_M1, input_precision="ieee")
            max_M = new_max_M

        out_D = dim_D[None, :]
        num_parts = tl.cdiv(kv_len, keys_per_split)
        if num_parts == 1:
            line_M = line_of(query_start, pair_M, kv_head, G, GROUP)
            out_MD = (acc_MD / sum_M[:, None]).to(dtype)
            tl.store(out_ptr + line_M[:, None] * D + out_D, out_MD, mask=inside_M1)
        else:
            part_stride = G * TILE * (D + 2)
            tile_ptr = partials_ptr + kv_head.to(tl.int64) * (TILE * (D + 2))
            part_M = tile_ptr + split * part_stride + pair_M * (D + 2)
            tl.store(part_M[:, None] + out_D, acc_MD, mask=inside_M1)
            tl.store(part_M + D, max_M)
            tl.store(part_M + D + 1, sum_M)
            tl.debug_barrier()  # all threads have stored before one of them says so
            if tl.atomic_add(counters_ptr + kv_head, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
                tl.store(counters_ptr + kv_head, 0)
                combine(
                    tile_ptr, part_stride, num_parts, out_ptr, None, query_start, 0, query_len * GROUP, kv_head, 0,
                    G, GROUP, D, D, PAIRS, SPLITS,
                )  # fmt: skip


def rope_attention(
    qkv: Tensor,
    kv_slots: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    counters: Tensor,
    num_heads: int,
    eps: float,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """See `stepgraph.ops.rope_attention.rope_attention`."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    group = num_heads // num_kv_heads
    pairs = min(TILE, triton.next_power_of_2(group))
    out = qkv.new_empty(qkv.shape[0], num_heads * head_dim)
    keys = max(16, KEYS * 256 // max(256, head_dim * qkv.element_size()))
    _rope_attention_kernel[(items.shape[0] * num_kv_heads,)](
        qkv,
        kv_slots,
        cos_sin,
        q_norm,
        k_norm,
        k_cache,
        v_cache,
        block_table,
        items,
        header,
        partials,
        counters,
        sinks,
        out,
        block_table.stride(0),
        eps,
        scale * LOG2_E,
        G=num_kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        CAP=softcap / scale,
        TILE=TILE,
        KEYS=keys,
        ITEM=ITEM_SIZE,
        PAIRS=pairs,
        SPLITS=64 // pairs,
        num_warps=NUM_WARPS,
        **LAUNCH,
    )
    return out
