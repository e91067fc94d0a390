"""`paged_attention` in tiles of 128 rows on Hopper GPUs: a long prompt's loads, products and softmax run beside each other.

A program has three parts. One warp, the producer, copies blocks of keys and values into a ring of stages in shared memory,
as far ahead as there is room. Two consumers of four warps each work on one half of a tile: while the tensor cores of a
multiprocessor multiply for one of them, the other one takes its exponentials, and each starts its next scores before its last
values are multiplied. What is computed is what `stepgraph.ops.attention.triton` computes, from the same plan.

The kernel is written in Gluon, which is experimental: only `stepgraph.ops.attention.geometry.tall_tile` decides whether this
module is imported.

Shapes in the kernel: M rows of a half, that is (token, query head) pairs; K keys of a block; D head size; X keys that are
copied at once, which lie within one block of the cache.

Source of the division of labour: Shah et al., "FlashAttention-3" (2024).
"""

import math

from torch import Tensor
from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stepgraph.ops.attention.geometry import HOPPER_TILE, ITEM_SIZE
from stepgraph.ops.attention.triton import LOG2_E, line_of, load_item, work_of
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

_TILE = gl.constexpr(HOPPER_TILE)
_ROWS = gl.constexpr(HOPPER_TILE // 2)  # of a consumer: what its tensor-core product takes at least
_ITEM = gl.constexpr(ITEM_SIZE)
# Keys of a block, and blocks in the ring: with heads of 128, all of the shared memory that the queries leave. On an H100, 128
# keys in two stages took 5 to 20 % more time for prompts without a context, and from 5 % less to 10 % more with one of 4096.
KEYS = gl.constexpr(64)
STAGES = gl.constexpr(4)
COLUMNS = gl.constexpr(64)  # of a copy: 128 bytes, the widest that shared memory is arranged by
_CONSUMER_REGISTERS = gl.constexpr(240)
_PRODUCER_REGISTERS = gl.constexpr(24)

_all_stored = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


@jit
def _keys_of(item, keys_per_split, GROUP: gl.constexpr):
    """First key of an item, the end of its keys, and how many keys its tile sees."""
    _, _, query_len, kv_len, tile, split, _ = item
    last_token = gl.minimum((tile * _TILE + _TILE - 1) // GROUP, query_len - 1)
    visible = kv_len - query_len + last_token + 1
    begin = split * keys_per_split
    return begin, gl.minimum(begin + keys_per_split, visible), visible


@jit
def stage_of(block):
    """Where in the ring a program's block is, and the parity of its turn there."""
    return block % STAGES, block // STAGES & 1


@jit
def wait_filled(full, block):
    """Wait until a block is in the ring. `full`: barriers of the stages of keys or of values."""
    stage, parity = stage_of(block)
    mbarrier.wait(full.index(stage), parity)


@jit
def release(empty, block):
    """Let the producer overwrite a block, once the other consumer does too. `empty`: barriers of keys or of values."""
    stage, _ = stage_of(block)
    mbarrier.arrive(empty.index(stage), count=1)


@jit
def boxes(smem, stage, BOX: gl.constexpr):
    """A stage as the copies see it: [D / 64 · K / X, X, 64], all boxes of the first 64 dimensions first."""
    D: gl.constexpr = smem.shape[2]
    return smem.index(stage)._reinterpret(
        smem.dtype, [D // COLUMNS * (KEYS // BOX), BOX, COLUMNS], gl.NVMMASharedLayout(128, 16, 2)
    )


@jit
def _copy_block(desc, rows, dim, smem, full, empty, block):
    """Start to copy a block of keys or values into its stage, once the consumers have left it."""
    BOX: gl.constexpr = desc.block_type.shape[0]
    D: gl.constexpr = smem.shape[2]
    stage, parity = stage_of(block)
    mbarrier.wait(empty.index(stage), parity ^ 1)
    mbarrier.expect(full.index(stage), KEYS * D * 2)
    targets = boxes(smem, stage, BOX)
    for box in gl.static_range(KEYS // BOX):
        for part in gl.static_range(D // COLUMNS):
            tma.async_copy_global_to_shared(
                desc,
                [rows[box], dim + part * COLUMNS],
                full.index(stage),
                targets.index(part * (KEYS // BOX) + box),
            )


@jit
def _produce(cache, plan, ring, G: gl.constexpr, GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Copy the keys and values of all items, the last block of an item first."""
    k_desc, v_desc, block_table_ptr, table_width = cache
    items_ptr, header_ptr = plan
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    BOX: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_smem.shape[2]
    num_work = gl.load(header_ptr) * G
    keys_per_split = gl.load(header_ptr + 1)
    block = 0
    turn = 0
    work = work_of(0)
    while work < num_work:
        item = load_item(items_ptr, work // G, work < num_work, _ITEM)
        begin, end, _ = _keys_of(item, keys_per_split, GROUP)
        table_ptr = block_table_ptr + item[0].to(gl.int64) * table_width
        num_blocks = gl.cdiv(end - begin, KEYS)
        start = begin + (num_blocks - 1) * KEYS
        for _ in range(num_blocks):
            rows = ()
            for box in gl.static_range(KEYS // BOX):
                key = start + box * BOX
                entry = gl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=-1)
                # A box outside of the cache is filled with zeros.
                rows += (gl.where(entry < 0, -BOX, entry * BLOCK_SIZE + key % BLOCK_SIZE),)
            _copy_block(k_desc, rows, work % G * D, k_smem, k_full, k_empty, block)
            _copy_block(v_desc, rows, work % G * D, v_smem, v_full, v_empty, block)
            block += 1
            start -= KEYS
        turn += 1
        work = work_of(turn)


@jit
def _exp2(x):
    """2 to the power of x, in the one instruction that `tl.exp2` of a float32 is beside its care for tiny results."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@jit
def softmax(score_MK, max_M, sum_M, limit_M, start, scale_log2, MASKED: gl.constexpr):
    """Weights of some keys, what older results decay by, and maximum (in units of log 2) and sum with these keys.

    Row m sees the keys up to `limit_M`, all of them if not MASKED.
    """
    if MASKED:
        key_K = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, score_MK.type.layout))
        score_MK = gl.where(key_K[None, :] <= limit_M[:, None], score_MK, float("-inf"))
    new_max_M = gl.maximum(max_M, gl.max(score_MK, axis=1) * scale_log2)
    # A row that has seen no key yet: any finite reference gives it weights of 0 instead of NaN.
    reference_M = gl.where(new_max_M == float("-inf"), 0.0, new_max_M) if MASKED else new_max_M
    weight_MK = _exp2(score_MK * scale_log2 - reference_M[:, None])
    decay_M = _exp2(max_M - reference_M)
    return weight_MK, decay_M, new_max_M, sum_M * decay_M + gl.sum(weight_MK, axis=1)


@jit
def _start_scores(q_smem, k_smem, k_full, block):
    """Start to multiply the queries with a block of keys, once it is there: [M, K]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    wait_filled(k_full, block)
    stage, _ = stage_of(block)
    zeros_MK = gl.zeros([_ROWS, KEYS], gl.float32, layout)
    return warpgroup_mma(q_smem, k_smem.index(stage).permute([1, 0]), zeros_MK, use_acc=False, is_async=True)


@jit
def start_values(weight_MK, v_smem, v_full, block, acc_MD):
    """Start to add a block of values, weighted, to the output, once it is there."""
    wait_filled(v_full, block)
    stage, _ = stage_of(block)
    return warpgroup_mma(weight_MK, v_smem.index(stage), acc_MD, is_async=True)


@jit
def as_operand(weight_MK, like_MD, dtype: gl.constexpr):
    """Weights as the tensor cores take them from registers, for a product that is added to `like_MD`."""
    return gl.convert_layout(weight_MK.to(dtype), gl.DotOperandLayout(0, like_MD.type.layout, k_width=2))


@jit
def spread(x_M, like_MD):
    """Numbers of rows, [M, 1], to multiply `like_MD` with."""
    return gl.convert_layout(x_M, gl.SliceLayout(1, like_MD.type.layout))[:, None]


@jit
def _attend(block, start, weight_MK, acc_MD, max_M, sum_M, limit_M, scale_log2, q_smem, ring, MASKED: gl.constexpr):
    """Scores and weights of a block, whose first key is `start`, while the values of the one before it are multiplied.

    `weight_MK` are the weights of that block; those of this one are returned in their place.
    """
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    score_MK = _start_scores(q_smem, k_smem, k_full, block)
    added_MD = start_values(weight_MK, v_smem, v_full, block - 1, acc_MD)
    score_MK = warpgroup_mma_wait(1, deps=[score_MK])
    release(k_empty, block)
    next_weight_MK, decay_M, max_M, sum_M = softmax(score_MK, max_M, sum_M, limit_M, start, scale_log2, MASKED)
    next_weight_MK = as_operand(next_weight_MK, acc_MD, q_smem.dtype)
    # The values are there. But the assembler moves nothing past this wait's branch, and would else take the exponentials after
    # the products instead of beside them.
    wait_filled(v_full, block - 1)
    acc_MD, next_weight_MK, sum_M = warpgroup_mma_wait(0, deps=[added_MD, next_weight_MK, sum_M])
    release(v_empty, block - 1)
    return next_weight_MK, acc_MD * spread(decay_M, acc_MD), max_M, sum_M


@jit
def pass_by(block, num_blocks, ring):
    """Let the producer go on, as far as this consumer is concerned, past blocks that it has no queries for."""
    _, _, k_full, k_empty, v_full, v_empty = ring
    for _ in range(num_blocks):
        wait_filled(k_full, block)
        release(k_empty, block)
        wait_filled(v_full, block)
        release(v_empty, block)
        block += 1
    return block


@jit
def _zero_unwritten(v_smem, block, first, v_full, BOX: gl.constexpr):
    """Zero a block's values from its key `first` to the end of the box: they may be NaN, and 0 · NaN is NaN.

    Boxes behind it were not read from the cache. Both consumers do this, with the same values.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    wait_filled(v_full, block)
    stage, _ = stage_of(block)
    targets = boxes(v_smem, stage, BOX)
    written_X = gl.arange(0, BOX, layout=gl.SliceLayout(1, layout)) < first % BOX
    for part in gl.static_range(v_smem.shape[2] // COLUMNS):
        box = targets.index(part * (KEYS // BOX) + first // BOX)
        box.store(gl.where(written_X[:, None], box.load(layout), 0.0))
    fence_async_shared()


@jit
def _consume(
    half: gl.constexpr,
    tensors,
    plan,
    scratch,
    scale_log2,
    q_smem,
    ring,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    BOX: gl.constexpr,
):
    """Attention of the first or second half of every tile."""
    q_ptr, out_ptr = tensors
    items_ptr, header_ptr = plan
    partials_ptr, counters_ptr = scratch
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    D: gl.constexpr = q_smem.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])  # 16 bytes a thread
    SCORE_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)

    num_work = gl.load(header_ptr) * G
    keys_per_split = gl.load(header_ptr + 1)
    wide_M = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, WIDE))
    wide_D = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    block = 0  # how many were worked through
    turn = 0
    work = work_of(0)
    item = load_item(items_ptr, work // G, work < num_work, _ITEM)
    while work < num_work:
        begin, end, visible = _keys_of(item, keys_per_split, GROUP)
        _, query_start, query_len, kv_len, tile, split, first_partial = item
        kv_head = work % G
        first_pair = tile * _TILE + half * _ROWS
        if first_pair >= query_len * GROUP:
            block = pass_by(block, gl.cdiv(end - begin, KEYS), ring)
        elif begin < visible:
            context_len = kv_len - query_len
            pair_M = first_pair + wide_M
            inside_M1 = (pair_M // GROUP < query_len)[:, None]
            offset_MD = line_of(query_start, pair_M, kv_head, G, GROUP)[:, None] * D + wide_D[None, :]
            q_smem.store(gl.load(q_ptr + offset_MD, mask=inside_M1, other=0.0))
            fence_async_shared()

            num_blocks = gl.cdiv(end - begin, KEYS)
            start = begin + (num_blocks - 1) * KEYS
            unwritten = kv_len - start
            if (unwritten < KEYS) & (unwritten % BOX != 0):
                _zero_unwritten(v_smem, block, unwritten, v_full, BOX)

            position_M = context_len + (first_pair + gl.arange(0, _ROWS, layout=SCORE_ROW)) // GROUP
            limit_M = gl.minimum(position_M, end - 1)
            max_M = gl.full([_ROWS], float("-inf"), gl.float32, SCORE_ROW)
            sum_M = gl.zeros([_ROWS], gl.float32, SCORE_ROW)
            acc_MD = gl.zeros([_ROWS, D], gl.float32, OUT)
            # The last block, which has no weights to multiply values with yet.
            score_MK = warpgroup_mma_wait(0, deps=[_start_scores(q_smem, k_smem, k_full, block)])
            release(k_empty, block)
            weight_MK, _, max_M, sum_M = softmax(score_MK, max_M, sum_M, limit_M, start, scale_log2, True)
            weight_MK = as_operand(weight_MK, acc_MD, q_smem.dtype)
            # Then those that some rows do not see all of, then the others.
            seen_by_all = gl.minimum(end, context_len + first_pair // GROUP + 1)
            num_masked = gl.maximum(num_blocks - gl.maximum(seen_by_all - begin, 0) // KEYS - 1, 0)
            for unmasked in gl.static_range(2):
                for _ in range(num_blocks - 1 - num_masked if unmasked else num_masked):
                    block += 1
                    start -= KEYS
                    weight_MK, acc_MD, max_M, sum_M = _attend(
                        block, start, weight_MK, acc_MD, max_M, sum_M, limit_M, scale_log2, q_smem, ring, unmasked == 0
                    )
            acc_MD = warpgroup_mma_wait(0, deps=[start_values(weight_MK, v_smem, v_full, block, acc_MD)])
            release(v_empty, block)
            block += 1

            num_parts = gl.cdiv(visible, keys_per_split)
            if num_parts == 1:
                out_MD = acc_MD / spread(sum_M, acc_MD)
                q_smem.store(out_MD.to(q_smem.dtype))
                gl.store(out_ptr + offset_MD, q_smem.load(WIDE), mask=inside_M1)
            else:
                part_stride = G * _TILE * (D + 2)
                half_ptr = partials_ptr + (first_partial * G + kv_head).to(gl.int64) * (_TILE * (D + 2))
                half_ptr += half * _ROWS * (D + 2)
                row_ptr_M = (
                    half_ptr + split * part_stride + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, OUT)) * (D + 2)
                )
                dim_D = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
                gl.store(row_ptr_M[:, None] + dim_D[None, :], acc_MD)
                gl.store(row_ptr_M + D, gl.convert_layout(max_M, gl.SliceLayout(1, OUT)))
                gl.store(row_ptr_M + D + 1, gl.convert_layout(sum_M, gl.SliceLayout(1, OUT)))
                _all_stored()  # by all threads, before one of them says so
                # Halves are combined apart. A split tile has two partial results at least, and so a counter for each.
                counter_ptr = counters_ptr + (first_partial + half) * G + kv_head
                if gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
                    gl.store(counter_ptr, 0)
                    _combine(
                        half_ptr, part_stride, num_parts, out_ptr, query_start, query_len, first_pair, kv_head,
                        G, GROUP, D,
                    )  # fmt: skip
        turn += 1
        work = work_of(turn)
        item = load_item(items_ptr, work // G, work < num_work, _ITEM)


@jit
def _combine(
    half_ptr,
    part_stride,
    num_parts,
    out_ptr,
    query_start,
    query_len,
    first_pair,
    kv_head,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
):
    """Write the normalised output of a half from its partial results, as `stepgraph.ops.attention.triton.combine` does."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [gl.num_warps(), 1], [1, 0])
    row_M = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    dim_D = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    max_M = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    sum_M = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, layout))
    acc_MD = gl.zeros([_ROWS, D], gl.float32, layout)
    part_ptr_M = half_ptr + row_M * (D + 2)
    for _ in range(num_parts):
        part_max_M = gl.load(part_ptr_M + D, cache_modifier=".cg")
        part_sum_M = gl.load(part_ptr_M + D + 1, cache_modifier=".cg")
        part_MD = gl.load(part_ptr_M[:, None] + dim_D[None, :], cache_modifier=".cg")
        new_max_M = gl.maximum(max_M, part_max_M)
        reference_M = gl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        decay_M = _exp2(max_M - reference_M)
        weight_M = _exp2(part_max_M - reference_M)
        sum_M = sum_M * decay_M + part_sum_M * weight_M
        acc_MD = acc_MD * decay_M[:, None] + part_MD * weight_M[:, None]
        max_M = new_max_M
        part_ptr_M += part_stride
    pair_M = first_pair + row_M
    out_MD = (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty)
    line_M = line_of(query_start, pair_M, kv_head, G, GROUP)
    gl.store(out_ptr + line_M[:, None] * D + dim_D[None, :], out_MD, mask=(pair_M // GROUP < query_len)[:, None])


@launched
@jit(do_not_specialize=["table_width"])
def _attention_kernel(
    q_ptr,
    k_desc,
    v_desc,
    block_table_ptr,
    items_ptr,
    header_ptr,
    partials_ptr,
    counters_ptr,
    out_ptr,
    table_width,
    scale_log2,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """Lay out shared memory, then run a producer and two consumers. `k_desc`, `v_desc`: [blocks · B, G · D] in boxes [X, 64]."""
    BOX: gl.constexpr = k_desc.block_type.shape[0]
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [2, _ROWS, D], k_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D], k_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    wait_for_previous()

    tensors = (q_ptr, out_ptr)
    plan = (items_ptr, header_ptr)
    scratch = (partials_ptr, counters_ptr)
    cache = (k_desc, v_desc, block_table_ptr, table_width)
    ring = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consume, (0, tensors, plan, scratch, scale_log2, q_smem.index(0), ring, G, GROUP, BOX)),
            (_consume, (1, tensors, plan, scratch, scale_log2, q_smem.index(1), ring, G, GROUP, BOX)),
            (_produce, (cache, plan, ring, G, GROUP, BLOCK_SIZE)),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    counters: Tensor,
    scale: float,
    num_programs: int,
) -> Tensor:
    """See `stepgraph.ops.attention.paged_attention`; for what `stepgraph.ops.attention.geometry.tall_tile` asks, in a plan of
    tiles of HOPPER_TILE.

    Where the caches lie is copied into the launch, and so into a graph that captures it.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    width = num_kv_heads * head_dim
    out = q.new_empty(num_tokens, num_heads * head_dim)
    box = [math.gcd(block_size, KEYS.value), COLUMNS.value]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    k_desc, v_desc = (
        TensorDescriptor(cache, [num_blocks * block_size, width], [width, 1], box, layout)
        for cache in (k_cache, v_cache)
    )
    _attention_kernel[(num_programs,)](
        q,
        k_desc,
        v_desc,
        block_table,
        items,
        header,
        partials,
        counters,
        out,
        block_table.stride(0),
        scale * LOG2_E,
        G=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        num_warps=4,
        **LAUNCH,
    )
    return out
