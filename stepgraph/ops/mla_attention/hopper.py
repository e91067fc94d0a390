"""`mla_attention` in tiles of 64 pairs on Hopper GPUs: loads, products and softmax run beside each other.

The output of 64 pairs fills the registers of two groups of four warps, so these two consumers share a tile: each adds up one half
of the values' dimensions for all pairs. Scores they compute in turns, each of every other block of keys, and hand each other
the weights through shared memory. While one takes its exponentials, the other multiplies. A third part of a program, one warp,
copies blocks of entries into two stages of shared memory. An entry is there once, as key and as value.

Blocks are numbered through a program's work; block b lies in stage b % 2, and consumer b % 2 is its *owner*. What is done:

1. The producer waits until both consumers have left block b - 2, each its half (`empty`), and copies (`full`, per half).
2. The owner multiplies the queries with it, takes the maximum of what was known and of its scores, and publishes it
   (`max_known`).
3. The owner takes the weights relative to it, and publishes them, and their sum with all before (`weights_known`). They lie
   where the block's rotated dimensions were, which nobody else reads and nobody reads again.
4. Each consumer decays its half of the output to that maximum, adds its half of the values, weighted, and leaves the half.

Every barrier completes once a block of its stage, in this order, so its turn at block b is b // 2 and whoever waits knows the
parity. No turn can be missed: `full`, `max_known` and `weights_known` of b + 2 need both consumers to have left b, after they
waited for those of b; `empty` of b needs the copy of b, and so the producer's wait for `empty` of b - 2. The producer waits
only for older blocks than it copies, the owner only for its copy and for the block before, the other consumer only for the
owner: the oldest block that is not done can always be gone on with. Published numbers of b are overwritten by those of b + 2 and
by its copy, so after both have left b.

Gluon, which the kernel is written in, is experimental: `geometry.hopper_serves` decides whether this module is imported.

Shapes in the kernel: M pairs of a token and a head; K keys of a block; R dimensions of the latent, P rotated ones, V half of R;
X keys that are copied at once, which lie within one block of the cache.

Source of consumers that share a tile: DeepSeek-AI, FlashMLA, "A Deep-Dive Into the New Flash MLA Kernel" (2025).
"""

import math

from torch import Tensor
from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stepgraph.ops.attention.geometry import ITEM_SIZE
from stepgraph.ops.attention.triton import LOG2_E, load_item, work_of
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.mla_attention.geometry import TALL_TILE
from stepgraph.ops.mla_attention.hopper_entries import (
    COLUMNS,
    KEYS,
    copy,
    keys_of,
    lines_of,
    prefetch,
    zero_unwritten,
)

_TILE = gl.constexpr(TALL_TILE)
_ITEM = gl.constexpr(ITEM_SIZE)
_HALF = gl.constexpr(256)  # of the latent's dimensions
_ROTATED = gl.constexpr(64)  # as many as a block has keys: where they were, weights fit
_CONSUMER_REGISTERS = gl.constexpr(232)
_PRODUCER_REGISTERS = gl.constexpr(40)


@jit
def _wait(barriers, stage, block):
    """Wait until what these barriers say of the blocks of a stage is true of this one."""
    mbarrier.wait(barriers.index(stage), block // 2 & 1)


@jit
def _wait_copied(ring, half: gl.constexpr, stage, block):
    """Wait until a half of a block is in the ring; with the second one, the rotated dimensions are."""
    _wait(ring[2], half * 2 + stage, block)


@jit
def _leave(ring, half: gl.constexpr, stage):
    """Let the producer overwrite a consumer's half of a block; with both, the rotated dimensions."""
    mbarrier.arrive(ring[3].index(half * 2 + stage), count=1)


@jit
def _produce(tensors, plan, queries, ring, H: gl.constexpr, BLOCK_SIZE: gl.constexpr, CAUSAL: gl.constexpr):
    """Copy the queries and the entries of all items, the last block of an item first."""
    q_desc, cache_desc, cache_ptr, block_table_ptr, table_width = tensors
    items_ptr, header_ptr = plan
    q_smem, q_rotated_smem, q_full, q_empty = queries
    latent_smem, rotated_smem, full, empty = ring[0], ring[1], ring[2], ring[3]
    BOX: gl.constexpr = cache_desc.block_type.shape[0]
    num_work = gl.load(header_ptr)
    keys_per_split = gl.load(header_ptr + 1)
    block = 0
    num_done = 0
    turn = 0
    work = work_of(0)
    while work < num_work:
        item = load_item(items_ptr, work, work < num_work, _ITEM)
        begin, end, _ = keys_of(item, keys_per_split, H, _TILE, CAUSAL)
        if begin < end:
            table_ptr = block_table_ptr + item[0].to(gl.int64) * table_width
            num_blocks = gl.cdiv(end - begin, KEYS)
            start = begin + (num_blocks - 1) * KEYS
            lines = lines_of(table_ptr, start, end, BOX, BLOCK_SIZE)
            # All heads of a token lie together, and so do a tile's pairs. What follows them is another row's, or zeros.
            q_lines = (item[1] * H + item[4] * _TILE,)
            mbarrier.wait(q_empty, num_done & 1 ^ 1)
            mbarrier.expect(q_full, _TILE * (2 * _HALF + _ROTATED) * 2)
            copy(q_desc, q_lines, 0, q_full, q_smem.index(0))
            copy(q_desc, q_lines, _HALF, q_full, q_smem.index(1))
            copy(q_desc, q_lines, 2 * _HALF, q_full, q_rotated_smem.index(0))
            for _ in range(num_blocks):
                stage = block % 2
                empty_parity = block // 2 & 1 ^ 1
                mbarrier.wait(empty.index(stage), empty_parity)
                mbarrier.expect(full.index(stage), KEYS * _HALF * 2)
                copy(cache_desc, lines, 0, full.index(stage), latent_smem.index(stage))
                mbarrier.wait(empty.index(2 + stage), empty_parity)
                mbarrier.expect(full.index(2 + stage), KEYS * (_HALF + _ROTATED) * 2)
                copy(cache_desc, lines, _HALF, full.index(2 + stage), latent_smem.index(2 + stage))
                copy(cache_desc, lines, 2 * _HALF, full.index(2 + stage), rotated_smem.index(stage))
                block += 1
                start -= KEYS
                # Of the next block, while this one's copies run.
                lines = lines_of(table_ptr, gl.maximum(start, begin), end, BOX, BLOCK_SIZE)
                # Of the one after that, to the second-level cache: shared memory has no room for it.
                later = start - KEYS
                later_lines = lines_of(table_ptr, later, gl.where(later >= begin, end, 0), BOX, BLOCK_SIZE)
                prefetch(cache_ptr, later_lines, BOX, 2 * _HALF + _ROTATED)
            num_done += 1
        turn += 1
        work = work_of(turn)


@jit
def _exp2(x):
    """2 to the power of x, in the one instruction that `tl.exp2` of a float32 is beside its care for tiny results."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@jit
def _reference(max_M):
    """What exponents of a row are relative to: its maximum, or any finite number if it has seen no key yet."""
    return gl.where(max_M == float("-inf"), 0.0, max_M)


@jit
def _spread(x_M, like_MV):
    """Numbers of rows, [M, 1], to multiply `like_MV` with."""
    return gl.convert_layout(x_M, gl.SliceLayout(1, like_MV.type.layout))[:, None]


@jit
def _start_scores(half: gl.constexpr, block, queries, ring):
    """Start to multiply the queries with a block of this consumer's as it comes in, in three products: [M, K]."""
    q_smem, q_rotated_smem, _, _ = queries
    latent_smem, rotated_smem, _, _, _, _, _ = ring
    # Always 0, which the compiler must not know: it would keep the 36 addresses of queries over the loop, in more registers
    # than there are.
    zero = block >> 30
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    zeros_MK = gl.zeros([_TILE, KEYS], gl.float32, layout)
    _wait_copied(ring, 0, half, block)
    score_MK = warpgroup_mma(
        q_smem.index(zero), latent_smem.index(half).permute([1, 0]), zeros_MK, use_acc=False, is_async=True
    )
    _wait_copied(ring, 1, half, block)
    score_MK = warpgroup_mma(
        q_smem.index(zero + 1), latent_smem.index(2 + half).permute([1, 0]), score_MK, is_async=True
    )
    return warpgroup_mma(q_rotated_smem.index(zero), rotated_smem.index(half).permute([1, 0]), score_MK, is_async=True)


@jit
def _add_own(half: gl.constexpr, start, score_MK, acc_MV, max_M, sum_M, limit_M, seen_by_all, scale_log2, ring):
    """Take the weights of a block of this consumer's, whose first key is `start`, publish them and add their values.

    Row m sees the keys up to `limit_M`, all rows those before `seen_by_all`.
    """
    latent_smem, rotated_smem, _, _, max_known, weights_known, known_smem = ring
    if start + KEYS > seen_by_all:
        key_K = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, score_MK.type.layout))
        score_MK = gl.where(key_K[None, :] <= limit_M[:, None], score_MK, float("-inf"))
    new_max_M = gl.maximum(max_M, gl.max(score_MK, axis=1) * scale_log2)
    known_smem.index(half).store(new_max_M)
    mbarrier.arrive(max_known.index(half), count=1)
    reference_M = _reference(new_max_M)
    weight_MK = _exp2(score_MK * scale_log2 - reference_M[:, None])
    decay_M = _exp2(max_M - reference_M)
    sum_M = sum_M * decay_M + gl.sum(weight_MK, axis=1)
    known_smem.index(2 + half).store(sum_M)
    narrow_MK = weight_MK.to(rotated_smem.dtype)
    rotated_smem.index(half).store(narrow_MK)
    fence_async_shared()
    mbarrier.arrive(weights_known.index(half), count=1)
    operand_MK = gl.convert_layout(narrow_MK, gl.DotOperandLayout(0, acc_MV.type.layout, k_width=2))
    acc_MV = acc_MV * _spread(decay_M, acc_MV)
    acc_MV = warpgroup_mma(operand_MK, latent_smem.index(2 * half + half), acc_MV, is_async=True)
    acc_MV = warpgroup_mma_wait(0, deps=[acc_MV])
    _leave(ring, half, half)
    return acc_MV, new_max_M, sum_M


@jit
def _start_other(half: gl.constexpr, block, acc_MV, max_M, ring):
    """Decay the output to the maximum with a block of the other consumer's, and start to add the block's values once its weights
    are there. Also returns that maximum and the sum."""
    latent_smem, rotated_smem, _, _, max_known, weights_known, known_smem = ring
    other: gl.constexpr = 1 - half
    _wait(max_known, other, block)
    new_max_M = known_smem.index(other).load(max_M.type.layout)
    acc_MV = acc_MV * _spread(_exp2(max_M - _reference(new_max_M)), acc_MV)
    _wait_copied(ring, half, other, block)  # it is there; who waits for a copy sees it
    _wait(weights_known, other, block)
    sum_M = known_smem.index(2 + other).load(max_M.type.layout)
    acc_MV = warpgroup_mma(rotated_smem.index(other), latent_smem.index(2 * half + other), acc_MV, is_async=True)
    return acc_MV, new_max_M, sum_M


@jit
def _store_output(half: gl.constexpr, acc_MV, max_M, sum_M, out_ptr, lse_ptr, line, num_pairs):
    """Write half of the output of pairs that have no other part, from a line on; the sums of their weights if asked for."""
    # Sixteen bytes a thread of what is its warp's already.
    WIDE: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [0, 128], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[_TILE, _HALF],
    )
    pair_M = gl.arange(0, _TILE, layout=gl.SliceLayout(1, WIDE))
    dim_V = half * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, WIDE))
    out_MV = (acc_MV * _spread(1.0 / sum_M, acc_MV)).to(out_ptr.dtype.element_ty)
    line_M = (line + pair_M).to(gl.int64) * (2 * _HALF)
    target_MV = out_ptr + line_M[:, None] + dim_V[None, :]
    gl.store(target_MV, gl.convert_layout(out_MV, WIDE), mask=(pair_M < num_pairs)[:, None])
    if lse_ptr is not None and half == 0:
        row_M = gl.arange(0, _TILE, layout=max_M.type.layout)
        gl.store(lse_ptr + line + row_M, max_M + gl.log2(sum_M), mask=row_M < num_pairs)


@jit
def _store_part(half: gl.constexpr, acc_MV, max_M, sum_M, part_ptr):
    """Write half of a tile's partial result, and what it is relative to."""
    layout: gl.constexpr = acc_MV.type.layout
    row_M = gl.arange(0, _TILE, layout=gl.SliceLayout(1, layout)) * (2 * _HALF + 2)
    dim_V = half * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, layout))
    gl.store(part_ptr + row_M[:, None] + dim_V[None, :], acc_MV)
    if half == 0:
        known_M = part_ptr + gl.arange(0, _TILE, layout=max_M.type.layout) * (2 * _HALF + 2) + 2 * _HALF
        gl.store(known_M, max_M)
        gl.store(known_M + 1, sum_M)


@jit
def _consume(
    half: gl.constexpr,
    targets,
    plan,
    scale_log2,
    queries,
    ring,
    H: gl.constexpr,
    BOX: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Attention of every tile, one half of the values' dimensions."""
    out_ptr, lse_ptr, partials_ptr = targets
    items_ptr, header_ptr = plan
    q_full, q_empty = queries[2], queries[3]
    WARPS: gl.constexpr = gl.num_warps()
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _HALF, 16])
    SCORE_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)

    num_work = gl.load(header_ptr)
    keys_per_split = gl.load(header_ptr + 1)
    block = 0  # the next one of the ring
    num_done = 0
    turn = 0
    work = work_of(0)
    item = load_item(items_ptr, work, work < num_work, _ITEM)
    while work < num_work:
        begin, end, visible = keys_of(item, keys_per_split, H, _TILE, CAUSAL)
        query_start, query_len, kv_len, tile, split, first_partial = (
            item[1],
            item[2],
            item[3],
            item[4],
            item[5],
            item[6],
        )
        if begin < end:
            context_len = kv_len - query_len
            first_pair = tile * _TILE
            limit_M = gl.full([_TILE], end - 1, gl.int32, SCORE_ROW)
            seen_by_all = end
            if CAUSAL:
                position_M = context_len + (first_pair + gl.arange(0, _TILE, layout=SCORE_ROW)) // H
                limit_M = gl.minimum(position_M, limit_M)
                seen_by_all = gl.minimum(context_len + first_pair // H + 1, end)
            num_blocks = gl.cdiv(end - begin, KEYS)
            start = begin + (num_blocks - 1) * KEYS
            max_M = gl.full([_TILE], float("-inf"), gl.float32, SCORE_ROW)
            sum_M = gl.zeros([_TILE], gl.float32, SCORE_ROW)
            acc_MV = gl.zeros([_TILE, _HALF], gl.float32, OUT)

            unwritten = kv_len - start
            if (unwritten < KEYS) & (unwritten % BOX != 0):
                # The other consumer may be multiplying the same keys with queries: it has no use for the results.
                _wait_copied(ring, half, block % 2, block)
                zero_unwritten(ring[0].index(half * 2 + block % 2), unwritten, BOX)
            mbarrier.wait(q_full, num_done & 1)
            is_own = (block % 2 == half).to(gl.int32)
            if is_own != 0:
                score_MK = warpgroup_mma_wait(0, deps=[_start_scores(half, block, queries, ring)])
                acc_MV, max_M, sum_M = _add_own(
                    half, start, score_MK, acc_MV, max_M, sum_M, limit_M, seen_by_all, scale_log2, ring
                )
                block += 1
                start -= KEYS
            num_left = num_blocks - is_own
            for _ in range(num_left // 2):
                adding_MV, max_M, sum_M = _start_other(half, block, acc_MV, max_M, ring)
                scores_MK = _start_scores(half, block + 1, queries, ring)
                acc_MV = warpgroup_mma_wait(3, deps=[adding_MV])
                _leave(ring, half, 1 - half)
                score_MK = warpgroup_mma_wait(0, deps=[scores_MK])
                acc_MV, max_M, sum_M = _add_own(
                    half, start - KEYS, score_MK, acc_MV, max_M, sum_M, limit_M, seen_by_all, scale_log2, ring
                )
                block += 2
                start -= 2 * KEYS
            mbarrier.arrive(q_empty, count=1)
            if num_left % 2 != 0:
                adding_MV, max_M, sum_M = _start_other(half, block, acc_MV, max_M, ring)
                acc_MV = warpgroup_mma_wait(0, deps=[adding_MV])
                _leave(ring, half, 1 - half)
                block += 1
            num_done += 1

            if visible <= keys_per_split:
                line = query_start * H + first_pair
                _store_output(half, acc_MV, max_M, sum_M, out_ptr, lse_ptr, line, query_len * H - first_pair)
            else:
                part_ptr = partials_ptr + (first_partial + split).to(gl.int64) * (_TILE * (2 * _HALF + 2))
                _store_part(half, acc_MV, max_M, sum_M, part_ptr)
        turn += 1
        work = work_of(turn)
        item = load_item(items_ptr, work, work < num_work, _ITEM)


@launched
@jit(do_not_specialize=["table_width"])
def _attention_kernel(
    q_desc,
    cache_desc,
    cache_ptr,
    block_table_ptr,
    items_ptr,
    header_ptr,
    partials_ptr,
    out_ptr,
    lse_ptr,  # None: it is not asked for
    table_width,
    scale_log2,
    H: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,  # else all tokens of a row see all of its keys
):
    """Lay out shared memory, then run a producer and two consumers. `q_desc`: [T · H, R + P] in boxes [64, 64]; `cache_desc`:
    [blocks · B, R + P] in boxes [X, 64]."""
    BOX: gl.constexpr = cache_desc.block_type.shape[0]
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, _TILE, _HALF], q_desc.layout)
    q_rotated_smem = gl.allocate_shared_memory(q_desc.dtype, [1, _TILE, _ROTATED], q_desc.layout)
    # Of both stages the first halves, then the second ones; below likewise maxima, then sums.
    latent_smem = gl.allocate_shared_memory(q_desc.dtype, [4, KEYS, _HALF], q_desc.layout)
    rotated_smem = gl.allocate_shared_memory(q_desc.dtype, [2, KEYS, _ROTATED], q_desc.layout)
    known_smem = gl.allocate_shared_memory(gl.float32, [4, _TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    max_known = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weights_known = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for part in gl.static_range(4):
        mbarrier.init(full.index(part), count=1)
        mbarrier.init(empty.index(part), count=1)
        if part < 2:
            mbarrier.init(max_known.index(part), count=1)
            mbarrier.init(weights_known.index(part), count=1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    wait_for_previous()

    tensors = (q_desc, cache_desc, cache_ptr, block_table_ptr, table_width)
    targets = (out_ptr, lse_ptr, partials_ptr)
    plan = (items_ptr, header_ptr)
    queries = (q_smem, q_rotated_smem, q_full, q_empty)
    ring = (latent_smem, rotated_smem, full, empty, max_known, weights_known, known_smem)
    gl.warp_specialize(
        [
            (_consume, (0, targets, plan, scale_log2, queries, ring, H, BOX, CAUSAL)),
            (_consume, (1, targets, plan, scale_log2, queries, ring, H, BOX, CAUSAL)),
            (_produce, (tensors, plan, queries, ring, H, BLOCK_SIZE, CAUSAL)),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


def attend(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    num_programs: int,
    *,
    causal: bool,
) -> None:
    """Do the items of a plan, as the kernel for any GPU does, where `hopper_serves`. Where queries and entries lie is copied into
    the launch, and so into a graph that captures it."""
    num_tokens, num_heads, entry_size = q.shape
    num_blocks, block_size, _ = cache.shape
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def lines(tensor: Tensor, count: int, box: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, [count, entry_size], [entry_size, 1], [box, COLUMNS.value], layout)

    _attention_kernel[(num_programs,)](
        lines(q, num_tokens * num_heads, _TILE.value),
        lines(cache, num_blocks * block_size, math.gcd(block_size, KEYS.value)),
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
        BLOCK_SIZE=block_size,
        CAUSAL=causal,
        num_warps=4,
        **LAUNCH,
    )
