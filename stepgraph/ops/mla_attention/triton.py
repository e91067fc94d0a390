"""Triton kernels of `mla_attention`: one does the items, another one combines those of split tiles.

What an item leaves of 16 pairs and 512 dimensions are 32 KiB. The last of a hundred splits would read the others' for 50 us, by
itself, where a launch whose programs share them takes a few; so the second kernel is there, unlike for `paged_attention`.

An entry is read into shared memory once, for both products. Scores are [M, K], but the output is accumulated as [R, M], the
latents transposed times the weights: so the tall operand of either product of a small tile is the one that is in shared memory,
where Hopper's tensor cores take it from, and not in registers, of which there are too few for it.

Shapes in the kernels: I items, M (token, head) pairs of a tile, K keys of one inner iteration, R size of a latent and P of the
rotated part of an entry, both padded to powers of two; L = R + P without padding.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.attention.geometry import ITEM_SIZE
from stepgraph.ops.attention.triton import LOG2_E, combine, line_of, load_item, work_of
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.mla_attention.geometry import hopper_serves
from stepgraph.platforms.kernels import kernel_tuning

TUNING = kernel_tuning()

COLUMNS = 256
"""Of a pair, which are combined at once."""
SPLITS = 32
"""Likewise."""
SHARES = 8
"""Programs that combine, for each that attends: there is one for each pair and column block of a tile from four splits on."""


@dataclass(frozen=True)
class Launch:
    """What the sizes of a launch leave open."""

    keys: int  # of one inner iteration
    num_warps: int
    num_stages: int  # one less is the number of iterations whose loads are under way


WIDE = Launch(64, 8, 3)
LAUNCHES = {16: WIDE if TUNING.latent_wide_keys else Launch(32, 4, 3), 32: Launch(32, 8, 3), 64: Launch(32, 8, 3)}
"""By height of a tile, for entries of up to 1,280 bytes; of larger ones, half as many keys. How many programs a multiprocessor
has room for says `programs_of` in `stepgraph.ops.mla_attention.geometry`."""


def launch_of(tile: int, entry_bytes: int) -> Launch:
    """For tiles of this height and entries that are padded to so many bytes in shared memory."""
    launch = LAUNCHES[tile]
    return launch if entry_bytes <= 1280 else Launch(launch.keys // 2, launch.num_warps, launch.num_stages)


@triton.jit
def _load(line_ptr_N, inside_N, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[N, BLOCK] numbers of lines of SIZE; zeros in lines that are not inside, whatever is there."""
    dim = tl.arange(0, BLOCK)
    mask = inside_N[:, None]
    if SIZE < BLOCK:
        mask &= (dim < SIZE)[None, :]
    return tl.load(line_ptr_N[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _blocks(table_ptr, start, end, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Blocks of the cache that hold the KEYS keys from `start` on; the null block from `end` on."""
    key_K = start + tl.arange(0, KEYS)
    return tl.load(table_ptr + key_K // BLOCK_SIZE, mask=key_K < end, other=0)


@triton.jit
def _visible(query_len, kv_len, first_pair, H: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr):
    """How many of its row's keys a tile sees."""
    if not CAUSAL:
        return kv_len
    return kv_len - query_len + tl.minimum((first_pair + TILE - 1) // H, query_len - 1) + 1


@launched
@triton.jit(do_not_specialize=["table_width"])
def _attention_kernel(
    q_ptr,
    cache_ptr,
    block_table_ptr,
    items_ptr,
    header_ptr,
    partials_ptr,
    out_ptr,
    lse_ptr,  # None: it is not asked for
    table_width,
    scale_log2,
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,  # of one inner iteration
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,  # else all tokens of a row see all of its keys
    ITEM: tl.constexpr,  # numbers per item
):
    L: tl.constexpr = R + P
    num_items = tl.load(header_ptr)
    keys_per_split = tl.load(header_ptr + 1)
    pair_M = tl.arange(0, TILE)
    dim_R = tl.arange(0, BLOCK_R)
    turn = 0
    item = work_of(0)
    slot, query_start, query_len, kv_len, tile, split, first_partial = load_item(
        items_ptr, item, item < num_items, ITEM
    )
    wait_for_previous()  # the plan is older
    while item < num_items:
        first_pair = tile * TILE
        visible = _visible(query_len, kv_len, first_pair, H, TILE, CAUSAL)
        begin = split * keys_per_split
        if begin < visible:
            end = tl.minimum(begin + keys_per_split, visible)
            token_M = (first_pair + pair_M) // H
            line_M = line_of(query_start, first_pair + pair_M, 0, 1, H)
            inside_M = token_M < query_len
            q_MR = _load(q_ptr + line_M * L, inside_M, R, BLOCK_R)
            q_MP = _load(q_ptr + line_M * L + R, inside_M, P, BLOCK_P)

            table_ptr = block_table_ptr + slot.to(tl.int64) * table_width
            acc_RM = tl.zeros([BLOCK_R, TILE], tl.float32)
            max_M = tl.full([TILE], float("-inf"), tl.float32)
            sum_M = tl.zeros([TILE], tl.float32)
            # An iteration ahead: loads that wait for others in their own iteration would not be started early.
            block_K = _blocks(table_ptr, begin, end, BLOCK_SIZE, KEYS)
            for start in tl.range(begin, end, KEYS, num_stages=STAGES):
                key_K = start + tl.arange(0, KEYS)
                entry_K = cache_ptr + (block_K.to(tl.int64) * BLOCK_SIZE + key_K % BLOCK_SIZE) * L
                latent_KR = _load(entry_K, key_K < end, R, BLOCK_R).to(q_MR.dtype)
                rotated_KP = _load(entry_K + R, key_K < end, P, BLOCK_P).to(q_MR.dtype)
                block_K = _blocks(table_ptr, start + KEYS, end, BLOCK_SIZE, KEYS)
                score_MK = tl.dot(q_MP, tl.trans(rotated_KP), input_precision="ieee")
                score_MK = tl.dot(q_MR, tl.trans(latent_KR), score_MK, input_precision="ieee")
                seen_MK = (key_K < end)[None, :]
                if CAUSAL:
                    seen_MK &= key_K[None, :] <= (kv_len - query_len + token_M)[:, None]
                score_MK = tl.where(seen_MK, score_MK, float("-inf"))
                new_max_M = tl.maximum(max_M, tl.max(score_MK, axis=1) * scale_log2)
                # A pair that has seen no key yet: any finite reference gives it weights of 0 instead of NaN.
                reference_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
                weight_MK = tl.exp2(score_MK * scale_log2 - reference_M[:, None])
                decay_M = tl.exp2(max_M - reference_M)
                sum_M = sum_M * decay_M + tl.sum(weight_MK, axis=1)
                weight_KM = tl.trans(weight_MK.to(q_MR.dtype))
                acc_RM = tl.dot(tl.trans(latent_KR), weight_KM, acc_RM * decay_M[None, :], input_precision="ieee")
                max_M = new_max_M

            inside_MR = inside_M[:, None] & (dim_R < R)[None, :]
            if visible <= keys_per_split:
                out_MR = tl.trans((acc_RM / sum_M[None, :]).to(out_ptr.dtype.element_ty))
                tl.store(out_ptr + line_M[:, None] * R + dim_R[None, :], out_MR, mask=inside_MR)
                if lse_ptr is not None:
                    tl.store(lse_ptr + line_M, max_M + tl.log2(sum_M), mask=inside_M)
            else:
                part_M = partials_ptr + ((first_partial + split).to(tl.int64) * TILE + pair_M) * (R + 2)
                tl.store(part_M[:, None] + dim_R[None, :], tl.trans(acc_RM), mask=inside_MR)
                tl.store(part_M + R, max_M)
                tl.store(part_M + R + 1, sum_M)
        turn += 1
        item = work_of(turn)
        slot, query_start, query_len, kv_len, tile, split, first_partial = load_item(
            items_ptr, item, item < num_items, ITEM
        )


@launched
@triton.jit
def _combine_kernel(
    items_ptr,
    header_ptr,
    partials_ptr,
    out_ptr,
    lse_ptr,  # None: it is not asked for
    H: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARES: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ITEM: tl.constexpr,
):
    """The work of a split tile are its pairs' blocks of columns. Its items share them, each by SHARES programs."""
    num_items = tl.load(header_ptr)
    keys_per_split = tl.load(header_ptr + 1)
    work = tl.program_id(0)
    item = work // SHARES
    _, query_start, query_len, kv_len, tile, split, first_partial = load_item(items_ptr, item, item < num_items, ITEM)
    wait_for_previous()  # the plan is older
    while item < num_items:
        first_pair = tile * TILE
        num_parts = tl.cdiv(_visible(query_len, kv_len, first_pair, H, TILE, CAUSAL), keys_per_split)
        if (num_parts > 1) & (split < num_parts):
            num_pairs = tl.minimum(TILE, query_len * H - first_pair)
            blocks: tl.constexpr = (R + COLUMNS - 1) // COLUMNS
            tile_ptr = partials_ptr + first_partial.to(tl.int64) * (TILE * (R + 2))
            for piece in range(split * SHARES + work % SHARES, num_pairs * blocks, num_parts * SHARES):
                pair = piece // blocks
                combine(
                    tile_ptr + pair * (R + 2), TILE * (R + 2), num_parts, out_ptr, lse_ptr, query_start, first_pair + pair, 1,
                    0, piece % blocks * COLUMNS, 1, H, R, COLUMNS, 1, SPLITS,
                )  # fmt: skip
        work += tl.num_programs(0)
        item = work // SHARES
        _, query_start, query_len, kv_len, tile, split, first_partial = load_item(
            items_ptr, item, item < num_items, ITEM
        )


def _attend(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    tile: int,
    num_programs: int,
    *,
    causal: bool,
) -> None:
    """Do the items of a plan: write the outputs of tiles with one split, and partial results of the others."""
    num_heads, entry_size = q.shape[1:]
    rank = out.shape[2]
    if hopper_serves(TUNING, tile, q.dtype, cache.dtype, entry_size, rank, cache.shape[1]):
        from stepgraph.ops.mla_attention import hopper

        hopper.attend(q, cache, block_table, items, header, partials, out, lse, scale, num_programs, causal=causal)
        return
    block_rank, block_rotated = (max(16, triton.next_power_of_2(size)) for size in (rank, entry_size - rank))
    launch = launch_of(tile, (block_rank + block_rotated) * q.element_size())
    _attention_kernel[(num_programs,)](
        q,
        cache,
        block_table,
        items,
        header,
        partials,
        out,
        lse,
        block_table.stride(0),
        scale * LOG2_E,
        H=num_heads,
        R=rank,
        P=entry_size - rank,
        BLOCK_R=block_rank,
        BLOCK_P=block_rotated,
        BLOCK_SIZE=cache.shape[1],
        TILE=tile,
        KEYS=launch.keys,
        STAGES=launch.num_stages,
        CAUSAL=causal,
        ITEM=ITEM_SIZE,
        num_warps=launch.num_warps,
        **LAUNCH,
    )


def _combine(
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    out: Tensor,
    lse: Tensor | None,
    tile: int,
    num_programs: int,
    *,
    causal: bool,
) -> None:
    """Write the outputs of split tiles from their partial results, if the plan may have any."""
    if not partials.shape[0]:
        return
    num_heads, rank = out.shape[1:]
    _combine_kernel[(num_programs * SHARES,)](
        items,
        header,
        partials,
        out,
        lse,
        H=num_heads,
        R=rank,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(rank)),
        SPLITS=SPLITS,
        SHARES=SHARES,
        TILE=tile,
        CAUSAL=causal,
        ITEM=ITEM_SIZE,
        num_warps=4,
        **LAUNCH,
    )


def mla_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    value_dim: int,
    scale: float,
    tile: int,
    num_programs: int,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.mla_attention.mla_attention`."""
    out = q.new_empty(*q.shape[:2], value_dim)
    _attend(q, cache, block_table, items, header, partials, out, None, scale, tile, num_programs, causal=True)
    _combine(items, header, partials, out, None, tile, num_programs, causal=True)
    return out


def mla_context_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    value_dim: int,
    scale: float,
    tile: int,
    num_programs: int,
) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.mla_attention.mla_context_attention`."""
    out, lse = q.new_empty(*q.shape[:2], value_dim), q.new_empty(q.shape[:2], dtype=torch.float32)
    _attend(q, cache, block_table, items, header, partials, out, lse, scale, tile, num_programs, causal=False)
    _combine(items, header, partials, out, lse, tile, num_programs, causal=False)
    return out, lse
