"""Triton kernel of `paged_attention`, which has another one for tiles of HOPPER_TILE.

Shapes in the kernels: R rows, I items, M (token, query head) pairs of a tile, K keys of one inner iteration, D head
size padded to a power of two, P pairs and S splits combined at once.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.attention.geometry import HOPPER_TILE, ITEM_SIZE, KV_BLOCK, Occupancy, occupancy
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """What the sizes of a launch leave open. Chosen by timing on an H100, heads of 128 in bfloat16, groups of 2 and 4."""

    keys: int  # of one inner iteration
    num_warps: int
    num_stages: int


def launch_of(tile: int, block_dim: int, itemsize: int, occupancy: Occupancy) -> Launch:
    """For tiles of this height, a padded head size, the bytes of a query's number and how busy the machine is.

    One row of 129 keys took 6.1 us with wide iterations and 7.4 with narrow ones, 64 such rows 24 and 16.5 us, of which reading
    their keys and values is 11.3.
    """
    if tile > 16:
        wide = block_dim > 128 or itemsize == 4
        return Launch(_keys(64, block_dim, itemsize), num_warps=8 if wide else 4, num_stages=3)
    if occupancy is Occupancy.LOW:
        return Launch(_keys(128, block_dim, itemsize), num_warps=8 if block_dim == 128 else 4, num_stages=1)
    if occupancy is Occupancy.MEDIUM:
        return Launch(_keys(64, block_dim, itemsize), num_warps=4, num_stages=3)
    return Launch(_keys(32, block_dim, itemsize), num_warps=4 if block_dim > 256 else 2, num_stages=3)


def _keys(most: int, block_dim: int, itemsize: int) -> int:
    """At most `most` keys, fewer if heads are larger than 128 of 16 bits."""
    return max(16, min(most, most * 256 // (block_dim * itemsize)))


@triton.jit
def _load_keys(
    head_ptr,
    slot_K,
    key_K,
    first_key,
    end,
    LINE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[K, D] keys or values at the cache slots `slot_K`; zeros from key `end` on and, under a window, before `first_key`,
    whatever the cache holds there."""
    dim_D = tl.arange(0, BLOCK_D)
    source_KD = head_ptr + slot_K[:, None] * LINE + dim_D[None, :]
    if MASKED:
        inside_K = key_K < end
        if WINDOW > 0:
            inside_K &= key_K >= first_key
        return tl.load(source_KD, mask=inside_K[:, None] & (dim_D < D)[None, :], other=0.0)
    if D < BLOCK_D:
        return tl.load(source_KD, mask=(dim_D < D)[None, :], other=0.0)
    return tl.load(source_KD)


@triton.jit
def _attend(
    q_MD,
    acc_MD,
    max_M,
    sum_M,
    position_M,
    first_key,
    begin,
    end,
    table_ptr,
    k_head_ptr,
    v_head_ptr,
    scale_log2,
    LINE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    EARLY_VALUES: tl.constexpr,  # load values beside the keys: an iteration waits once, and holds more
    MASKED: tl.constexpr,  # some keys are unseen by some queries, or `end - begin` is no multiple of KEYS
):
    """Online softmax over keys begin … end-1; scores are in units of log 2."""
    for start in range(begin, end, KEYS):
        key_K = start + tl.arange(0, KEYS)
        if MASKED:
            block_K = tl.load(table_ptr + key_K // BLOCK_SIZE, mask=key_K < end, other=0)
        else:
            block_K = tl.load(table_ptr + key_K // BLOCK_SIZE)
        slot_K = block_K.to(tl.int64) * BLOCK_SIZE + key_K % BLOCK_SIZE
        k_KD = _load_keys(k_head_ptr, slot_K, key_K, first_key, end, LINE, D, BLOCK_D, WINDOW, MASKED)
        if EARLY_VALUES:
            v_KD = _load_keys(v_head_ptr, slot_K, key_K, first_key, end, LINE, D, BLOCK_D, WINDOW, MASKED)
        score_MK = tl.dot(q_MD, tl.trans(k_KD.to(q_MD.dtype)), input_precision="ieee")
        if CAP > 0:
            score_MK = capped(score_MK, CAP)
        if MASKED:
            seen_MK = (key_K[None, :] <= position_M[:, None]) & (key_K < end)[None, :]
            if WINDOW > 0:
                seen_MK &= key_K[None, :] > position_M[:, None] - WINDOW
            score_MK = tl.where(seen_MK, score_MK, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MK, axis=1) * scale_log2)
        # A query that has seen no key yet: any finite reference gives it weights of 0 instead of NaN.
        reference_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M) if MASKED else new_max_M
        weight_MK = tl.exp2(score_MK * scale_log2 - reference_M[:, None])
        decay_M = tl.exp2(max_M - reference_M)
        sum_M = sum_M * decay_M + tl.sum(weight_MK, axis=1)
        if not EARLY_VALUES:
            v_KD = _load_keys(v_head_ptr, slot_K, key_K, first_key, end, LINE, D, BLOCK_D, WINDOW, MASKED)
        acc_MD = tl.dot(
            weight_MK.to(q_MD.dtype), v_KD.to(q_MD.dtype), acc=acc_MD * decay_M[:, None], input_precision="ieee"
        )
        max_M = new_max_M
    return acc_MD, max_M, sum_M


@triton.jit
def capped(product, CAP: tl.constexpr):
    """CAP · tanh(product / CAP); an exponential that overflows gives CAP."""
    return CAP - 2 * CAP / (tl.exp2(product * (2.8853900817779268 / CAP)) + 1.0)


@triton.jit
def load_sinks(sinks_ptr, pair, kv_head, is_first, GROUP: tl.constexpr):
    """Sinks of (token, query head of the group) pairs, in units of log 2. Of all splits of their keys, the first one has them;
    others get -inf."""
    sink = tl.load(sinks_ptr + kv_head * GROUP + pair % GROUP)
    return tl.where(is_first, sink * 1.4426950408889634, float("-inf"))


@triton.jit
def combine(
    tile_ptr,
    part_stride,
    num_parts,
    out_ptr,
    lse_ptr,
    query_start,
    first_pair,
    num_pairs,
    kv_head,
    first_dim,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,  # so many that PAIRS · SPLITS · BLOCK_D numbers fit in registers
):
    """Write the normalised output of a tile from its partial results, in split order whatever order they were made in: BLOCK_D
    of its D dimensions, from `first_dim` on, and, unless `lse_ptr` is None, the log-sum-exp, in units of log 2.

    Other multiprocessors wrote them: reads bypass L1 (.cg), which rules out the pipeliner's asynchronous copies too.
    """
    dim_D = first_dim + tl.arange(0, BLOCK_D)
    for first in tl.range(0, num_pairs, PAIRS, num_stages=1):
        pair_P = first + tl.arange(0, PAIRS)
        inside_P = pair_P < num_pairs
        max_P = tl.full([PAIRS], float("-inf"), tl.float32)
        sum_P = tl.zeros([PAIRS], tl.float32)
        acc_PD = tl.zeros([PAIRS, BLOCK_D], tl.float32)
        for first_part in tl.range(0, num_parts, SPLITS, num_stages=1):
            part_S = first_part + tl.arange(0, SPLITS)
            inside_SP = (part_S < num_parts)[:, None] & inside_P[None, :]
            pair_SP = tile_ptr + part_S[:, None] * part_stride + pair_P[None, :] * (D + 2)
            part_max_SP = tl.load(pair_SP + D, mask=inside_SP, other=float("-inf"), cache_modifier=".cg")
            part_sum_SP = tl.load(pair_SP + D + 1, mask=inside_SP, other=0.0, cache_modifier=".cg")
            part_SPD = tl.load(
                pair_SP[:, :, None] + dim_D[None, None, :],
                mask=inside_SP[:, :, None] & (dim_D < D)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_max_P = tl.maximum(max_P, tl.max(part_max_SP, axis=0))
            # Finite for every query, which sees key 0, in the first split; not under a window, nor for pairs that are none.
            reference_P = tl.where(new_max_P == float("-inf"), 0.0, new_max_P)
            decay_P = tl.exp2(max_P - reference_P)
            weight_SP = tl.exp2(part_max_SP - reference_P[None, :])
            sum_P = sum_P * decay_P + tl.sum(part_sum_SP * weight_SP, axis=0)
            acc_PD = acc_PD * decay_P[:, None] + tl.sum(part_SPD * weight_SP[:, :, None], axis=0)
            max_P = new_max_P
        line_P = line_of(query_start, first_pair + pair_P, kv_head, G, GROUP)
        out_PD = (acc_PD / sum_P[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + line_P[:, None] * D + dim_D[None, :], out_PD, mask=inside_P[:, None] & (dim_D < D)[None, :])
        if lse_ptr is not None:
            tl.store(lse_ptr + line_P, max_P + tl.log2(sum_P), mask=inside_P & (first_dim == 0))


@triton.jit
def line_of(query_start, pair, kv_head, G: tl.constexpr, GROUP: tl.constexpr):
    """Which line of [T · H, D] holds a row's (token, query head of the group) pair."""
    return (query_start + pair // GROUP).to(tl.int64) * (G * GROUP) + kv_head * GROUP + pair % GROUP


@triton.jit
def work_of(turn):
    """The unit of work that a program does as its first, second, … Items come heaviest first: going back and forth gives who had
    the heaviest the lightest next."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    return turn * num_programs + tl.where(turn % 2 == 0, program, num_programs - 1 - program)


@triton.jit
def load_item(items_ptr, item, is_item, ITEM: tl.constexpr):
    """What `_plan_kernel` stored; zeros if `is_item` is false."""
    item_ptr = items_ptr + item * ITEM
    return (
        tl.load(item_ptr, mask=is_item, other=0),
        tl.load(item_ptr + 1, mask=is_item, other=0),
        tl.load(item_ptr + 2, mask=is_item, other=0),
        tl.load(item_ptr + 3, mask=is_item, other=0),
        tl.load(item_ptr + 4, mask=is_item, other=0),
        tl.load(item_ptr + 5, mask=is_item, other=0),
        tl.load(item_ptr + 6, mask=is_item, other=0),
    )


@launched
@triton.jit(do_not_specialize=["table_width"])
def _attention_kernel(
    q_ptr,
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
    scale_log2,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,  # of one inner iteration
    KV_BLOCK: tl.constexpr,  # as in `_plan_kernel`
    WINDOW: tl.constexpr,  # 0: full attention
    CAP: tl.constexpr,  # of products of queries and keys, before they are scaled; 0: none
    ITEM: tl.constexpr,  # numbers per item
    PAIRS: tl.constexpr,  # of a tile, combined at once
    SPLITS: tl.constexpr,  # likewise
):
    num_work = tl.load(header_ptr) * G
    keys_per_split = tl.load(header_ptr + 1)
    pair_M = tl.arange(0, TILE)
    dim_D = tl.arange(0, BLOCK_D)
    work = tl.program_id(0)
    slot, query_start, query_len, kv_len, tile, split, first_partial = load_item(
        items_ptr, work // G, work < num_work, ITEM
    )
    wait_for_previous()  # the plan is older
    turn = 0
    while work < num_work:
        kv_head = work % G
        context_len = kv_len - query_len
        first_pair = tile * TILE
        first_token = first_pair // GROUP
        last_token = tl.minimum((first_pair + TILE - 1) // GROUP, query_len - 1)
        visible = context_len + last_token + 1
        first_key = 0
        if WINDOW > 0:
            first_key = tl.maximum(context_len + first_token - WINDOW + 1, 0)
        tile_begin = first_key // KV_BLOCK * KV_BLOCK
        begin = tile_begin + split * keys_per_split
        if begin < visible:
            end = tl.minimum(begin + keys_per_split, visible)

            token_M = (first_pair + pair_M) // GROUP
            position_M = context_len + token_M
            line_M = line_of(query_start, first_pair + pair_M, kv_head, G, GROUP)
            inside_MD = (token_M < query_len)[:, None] & (dim_D < D)[None, :]
            offset_MD = line_M[:, None] * D + dim_D[None, :]
            q_MD = tl.load(q_ptr + offset_MD, mask=inside_MD, other=0.0)

            table_ptr = block_table_ptr + slot.to(tl.int64) * table_width
            k_head_ptr = k_cache_ptr + kv_head * D
            v_head_ptr = v_cache_ptr + kv_head * D
            acc_MD = tl.zeros([TILE, BLOCK_D], tl.float32)
            max_M = tl.full([TILE], float("-inf"), tl.float32)
            sum_M = tl.zeros([TILE], tl.float32)
            if sinks_ptr is not None:  # a key without a value, seen before all others
                max_M = load_sinks(sinks_ptr, first_pair + pair_M, kv_head, split == 0, GROUP)
                sum_M += tl.where(split == 0, 1.0, 0.0)
            masked_from = begin
            if (
                TILE > 16
            ):  # a decode tile waits for memory: masks are free, draining the pipeline between two loops is not
                unmasked_from = begin
                if WINDOW > 0:
                    last_window = context_len + last_token - WINDOW + 1  # start of the last query's
                    unmasked_from += tl.cdiv(tl.maximum(last_window - begin, 0), KEYS) * KEYS
                    unmasked_from = tl.minimum(unmasked_from, end)
                    acc_MD, max_M, sum_M = _attend(
                        q_MD, acc_MD, max_M, sum_M, position_M, first_key, begin, unmasked_from, table_ptr, k_head_ptr,
                        v_head_ptr, scale_log2, G * D, D, BLOCK_D, BLOCK_SIZE, KEYS, WINDOW, CAP, TILE == 16, MASKED=True,
                    )  # fmt: skip
                seen_by_all = tl.maximum(tl.minimum(end, context_len + first_token + 1), unmasked_from)
                masked_from = unmasked_from + (seen_by_all - unmasked_from) // KEYS * KEYS
                acc_MD, max_M, sum_M = _attend(
                    q_MD, acc_MD, max_M, sum_M, position_M, first_key, unmasked_from, masked_from, table_ptr, k_head_ptr,
                    v_head_ptr, scale_log2, G * D, D, BLOCK_D, BLOCK_SIZE, KEYS, WINDOW, CAP, TILE == 16, MASKED=False,
                )  # fmt: skip
            acc_MD, max_M, sum_M = _attend(
                q_MD, acc_MD, max_M, sum_M, position_M, first_key, masked_from, end, table_ptr, k_head_ptr,
                v_head_ptr, scale_log2, G * D, D, BLOCK_D, BLOCK_SIZE, KEYS, WINDOW, CAP, TILE == 16, MASKED=True,
            )  # fmt: skip

            num_parts = tl.cdiv(visible - tile_begin, keys_per_split)
            if num_parts == 1:
                out_MD = acc_MD / sum_M[:, None]
                tl.store(out_ptr + offset_MD, out_MD.to(out_ptr.dtype.element_ty), mask=inside_MD)
            else:
                part_stride = G * TILE * (D + 2)
                tile_ptr = partials_ptr + (first_partial * G + kv_head).to(tl.int64) * (TILE * (D + 2))
                part_M = tile_ptr + split * part_stride + pair_M * (D + 2)
                tl.store(part_M[:, None] + dim_D[None, :], acc_MD, mask=inside_MD)
                tl.store(part_M + D, max_M)
                tl.store(part_M + D + 1, sum_M)
                tl.debug_barrier()  # all threads have stored before one of them says so
                counter_ptr = counters_ptr + first_partial * G + kv_head
                if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
                    tl.store(counter_ptr, 0)
                    num_pairs = tl.minimum(TILE, query_len * GROUP - first_pair)
                    combine(
                        tile_ptr, part_stride, num_parts, out_ptr, None, query_start, first_pair, num_pairs, kv_head, 0,
                        G, GROUP, D, BLOCK_D, PAIRS, SPLITS,
                    )  # fmt: skip
        turn += 1
        work = work_of(turn)
        slot, query_start, query_len, kv_len, tile, split, first_partial = load_item(
            items_ptr, work // G, work < num_work, ITEM
        )


def paged_attention(
    q: Tensor,
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
    scale: float,
    tile: int,
    num_programs: int,
    window: int,
    deterministic: bool,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """See `stepgraph.ops.attention.paged_attention`."""
    if tile == HOPPER_TILE:
        assert sinks is None, "`tall_tile` chooses such tiles for neither"
        assert not softcap, "`tall_tile` chooses such tiles for neither"
        from stepgraph.ops.attention import hopper

        return hopper.paged_attention(
            q, k_cache, v_cache, block_table, items, header, partials, counters, scale, num_programs
        )
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    out = q.new_empty(num_tokens, num_heads * head_dim)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    group = num_heads // num_kv_heads
    pairs = 16 if tile > 16 else min(tile, triton.next_power_of_2(group))
    launch = launch_of(tile, block_dim, q.element_size(), occupancy(row_slot.shape[0], num_kv_heads, deterministic))
    _attention_kernel[(num_programs,)](
        q,
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
        scale * LOG2_E,
        G=num_kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_D=block_dim,
        BLOCK_SIZE=block_size,
        TILE=tile,
        KEYS=launch.keys,
        KV_BLOCK=KV_BLOCK,
        WINDOW=window,
        CAP=softcap / scale,
        ITEM=ITEM_SIZE,
        PAIRS=pairs,
        SPLITS=max(1, 64 * 128 // (pairs * max(128, block_dim))),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **LAUNCH,
    )
    return out
