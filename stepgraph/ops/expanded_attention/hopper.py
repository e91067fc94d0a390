"""`expanded_attention` for heads of DeepSeek's sizes on Hopper GPUs: loads, products and softmax run beside each other.

A program is divided as one of `stepgraph.ops.attention.hopper`: a warp copies blocks of keys and values into a ring of stages in
shared memory, and two groups of four warps each work on one half of a tile. Keys of this step lie one after the other, so a block
is one copy of each 64 columns. They are two matrices in shared memory, whose products with the queries' parts are added up.

The kernel is written in Gluon, which is experimental: only `stepgraph.ops.expanded_attention.geometry.hopper_serves` decides
whether this module is imported.

Shapes in the kernel: M tokens of a half, K keys of a block; N, P and V as of the operator.
"""

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

from stepgraph.ops.attention.geometry import ITEM_SIZE
from stepgraph.ops.attention.hopper import (
    COLUMNS,
    KEYS,
    STAGES,
    as_operand,
    boxes,
    pass_by,
    release,
    softmax,
    spread,
    stage_of,
    start_values,
    wait_filled,
)
from stepgraph.ops.attention.triton import LOG2_E, load_item, work_of
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.expanded_attention.geometry import TILE
from stepgraph.ops.launched import launched

_TILE = gl.constexpr(TILE)
_ROWS = gl.constexpr(TILE // 2)  # of a consumer: what its tensor-core product takes at least
_ITEM = gl.constexpr(ITEM_SIZE)
_N = gl.constexpr(128)
_P = gl.constexpr(64)
_V = gl.constexpr(128)
_CONSUMER_REGISTERS = gl.constexpr(240)
_PRODUCER_REGISTERS = gl.constexpr(24)


@jit
def _copy(desc, row, column, smem, full, stage):
    """Start to copy 64 lines of a tensor, from this one on, into a stage, in parts of 64 columns."""
    parts = boxes(smem, stage, KEYS)
    for part in gl.static_range(smem.shape[2] // COLUMNS):
        tma.async_copy_global_to_shared(desc, [row, column + part * COLUMNS], full.index(stage), parts.index(part))


@jit
def _produce(tensors, plan, key_smem, ring, H: gl.constexpr):
    """Copy the keys and values of all items, the last block of an item first."""
    kv_desc, key_desc = tensors
    items_ptr, header_ptr = plan
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    num_work = gl.load(header_ptr) * H
    block = 0
    turn = 0
    work = work_of(0)
    while work < num_work:
        _, query_start, query_len, _, tile, _, _ = load_item(items_ptr, work // H, work < num_work, _ITEM)
        column = work % H * (_N + _V)
        num_blocks = gl.cdiv(gl.minimum(tile * _TILE + _TILE, query_len), KEYS)
        row = query_start + (num_blocks - 1) * KEYS
        for _ in range(num_blocks):
            stage, parity = stage_of(block)
            mbarrier.wait(k_empty.index(stage), parity ^ 1)
            mbarrier.expect(k_full.index(stage), KEYS * (_N + _P) * 2)
            _copy(kv_desc, row, column, k_smem, k_full, stage)
            _copy(key_desc, row, 0, key_smem, k_full, stage)
            mbarrier.wait(v_empty.index(stage), parity ^ 1)
            mbarrier.expect(v_full.index(stage), KEYS * _V * 2)
            _copy(kv_desc, row, column + _N, v_smem, v_full, stage)
            block += 1
            row -= KEYS
        turn += 1
        work = work_of(turn)


@jit
def _start_scores(queries, key_smem, ring, block):
    """Start to multiply the queries with a block of keys, once it is there: [M, K]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    q_smem, rotated_smem = queries
    k_smem, _, k_full, _, _, _ = ring
    wait_filled(k_full, block)
    stage, _ = stage_of(block)
    zeros_MK = gl.zeros([_ROWS, KEYS], gl.float32, layout)
    score_MK = warpgroup_mma(q_smem, k_smem.index(stage).permute([1, 0]), zeros_MK, use_acc=False, is_async=True)
    return warpgroup_mma(rotated_smem, key_smem.index(stage).permute([1, 0]), score_MK, is_async=True)


@jit
def _attend(
    block, start, weight_MK, acc_MV, max_M, sum_M, token_M, scale_log2, queries, key_smem, ring, MASKED: gl.constexpr
):
    """Scores and weights of a block, whose first key is `start`, while the values of the one before it are multiplied.

    `weight_MK` are the weights of that block; those of this one are returned in their place.
    """
    _, v_smem, _, k_empty, v_full, v_empty = ring
    score_MK = _start_scores(queries, key_smem, ring, block)
    added_MV = start_values(weight_MK, v_smem, v_full, block - 1, acc_MV)
    score_MK = warpgroup_mma_wait(1, deps=[score_MK])
    release(k_empty, block)
    next_weight_MK, decay_M, max_M, sum_M = softmax(score_MK, max_M, sum_M, token_M, start, scale_log2, MASKED)
    next_weight_MK = as_operand(next_weight_MK, acc_MV, v_smem.dtype)
    # The values are there; see `stepgraph.ops.attention.hopper`.
    wait_filled(v_full, block - 1)
    acc_MV, next_weight_MK, sum_M = warpgroup_mma_wait(0, deps=[added_MV, next_weight_MK, sum_M])
    release(v_empty, block - 1)
    return next_weight_MK, acc_MV * spread(decay_M, acc_MV), max_M, sum_M


@jit
def _zero_others(v_smem, block, first, v_full):
    """Zero a block's values from its key `first` on, which are not the row's: they may be NaN, and 0 · NaN is NaN.

    Both consumers do this, with the same values.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    wait_filled(v_full, block)
    stage, _ = stage_of(block)
    inside_K = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout)) < first
    values = v_smem.index(stage)
    values.store(gl.where(inside_K[:, None], values.load(layout), 0.0))
    fence_async_shared()


@jit
def _consume(
    half: gl.constexpr, tensors, plan, q_stride, scale_log2, queries, key_smem, ring, H: gl.constexpr, R: gl.constexpr
):
    """Attention of the first or second half of every tile."""
    q_ptr, absorbed_ptr, context_ptr, lse_ptr, out_ptr = tensors
    items_ptr, header_ptr = plan
    q_smem, rotated_smem = queries
    _keys, v_smem, _full, k_empty, v_full, v_empty = ring
    WARPS: gl.constexpr = gl.num_warps()
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _V, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])  # 16 bytes a thread
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    SCORE_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)

    num_work = gl.load(header_ptr) * H
    block = 0  # how many were worked through
    turn = 0
    work = work_of(0)
    while work < num_work:
        _, query_start, query_len, kv_len, tile, _, _ = load_item(items_ptr, work // H, work < num_work, _ITEM)
        head = work % H
        end = gl.minimum(tile * _TILE + _TILE, query_len)
        num_blocks = gl.cdiv(end, KEYS)
        first_token = tile * _TILE + half * _ROWS
        if first_token >= query_len:
            block = pass_by(block, num_blocks, ring)
        else:
            wide_M = first_token + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, WIDE))
            line_M = (query_start + wide_M).to(gl.int64)
            inside_M1 = (wide_M < query_len)[:, None]
            q_MN = q_ptr + (line_M * q_stride + head * (_N + _P))[:, None]
            q_MN += gl.arange(0, _N, layout=gl.SliceLayout(0, WIDE))[None, :]
            q_smem.store(gl.load(q_MN, mask=inside_M1, other=0.0))
            narrow_M = first_token + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, NARROW))
            rotated_MP = absorbed_ptr + (((query_start + narrow_M).to(gl.int64) * H + head) * (R + _P) + R)[:, None]
            rotated_MP += gl.arange(0, _P, layout=gl.SliceLayout(0, NARROW))[None, :]
            rotated_smem.store(gl.load(rotated_MP, mask=(narrow_M < query_len)[:, None], other=0.0))
            fence_async_shared()

            # Older keys are as one key: with the score that their sum of exponentials is that of, and the value that they gave.
            token_M = first_token + gl.arange(0, _ROWS, layout=SCORE_ROW)
            has_context_M = (token_M < query_len) & (kv_len > query_len)
            lse_M = lse_ptr + (query_start + token_M).to(gl.int64) * H + head
            max_M = gl.load(lse_M, mask=has_context_M, other=float("-inf"))
            sum_M = gl.where(has_context_M, 1.0, 0.0)
            out_M = first_token + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, OUT))
            context_MV = context_ptr + (((query_start + out_M).to(gl.int64) * H + head) * _V)[:, None]
            context_MV += gl.arange(0, _V, layout=gl.SliceLayout(0, OUT))[None, :]
            with_context_M = (out_M < query_len) & (kv_len > query_len)
            acc_MV = gl.load(context_MV, mask=with_context_M[:, None], other=0.0).to(gl.float32)

            start = (num_blocks - 1) * KEYS
            if end - start < KEYS:
                _zero_others(v_smem, block, end - start, v_full)
            # The last block, which has no weights to multiply values with yet.
            score_MK = warpgroup_mma_wait(0, deps=[_start_scores(queries, key_smem, ring, block)])
            release(k_empty, block)
            weight_MK, decay_M, max_M, sum_M = softmax(score_MK, max_M, sum_M, token_M, start, scale_log2, True)
            weight_MK = as_operand(weight_MK, acc_MV, v_smem.dtype)
            acc_MV = acc_MV * spread(decay_M, acc_MV)
            # Then those that some tokens do not see all of, then the others.
            num_masked = num_blocks - 1 - (first_token + 1) // KEYS
            for unmasked in gl.static_range(2):
                for _ in range(num_blocks - 1 - num_masked if unmasked else num_masked):
                    block += 1
                    start -= KEYS
                    weight_MK, acc_MV, max_M, sum_M = _attend(
                        block, start, weight_MK, acc_MV, max_M, sum_M, token_M, scale_log2, queries, key_smem, ring,
                        unmasked == 0,
                    )  # fmt: skip
            acc_MV = warpgroup_mma_wait(0, deps=[start_values(weight_MK, v_smem, v_full, block, acc_MV)])
            release(v_empty, block)
            block += 1

            q_smem.store((acc_MV / spread(sum_M, acc_MV)).to(q_smem.dtype))
            out_MV = out_ptr + ((line_M * H + head) * _V)[:, None]
            out_MV += gl.arange(0, _V, layout=gl.SliceLayout(0, WIDE))[None, :]
            gl.store(out_MV, q_smem.load(WIDE), mask=inside_M1)
        turn += 1
        work = work_of(turn)


@launched
@jit
def _expanded_attention_kernel(
    q_ptr,
    absorbed_ptr,
    kv_desc,
    key_desc,
    context_ptr,
    lse_ptr,
    items_ptr,
    header_ptr,
    out_ptr,
    q_stride,
    scale_log2,
    H: gl.constexpr,
    R: gl.constexpr,
):
    """Lay out shared memory, then run a producer and two consumers. `kv_desc`: [T, H · (N + V)], `key_desc`: [T, P], in boxes
    [64, 64]."""
    dtype: gl.constexpr = kv_desc.dtype
    layout: gl.constexpr = kv_desc.layout
    q_smem = gl.allocate_shared_memory(dtype, [2, _ROWS, _N], layout)
    rotated_smem = gl.allocate_shared_memory(dtype, [2, _ROWS, _P], layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, _N], layout)
    key_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, _P], layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, _V], layout)
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

    tensors = (q_ptr, absorbed_ptr, context_ptr, lse_ptr, out_ptr)
    plan = (items_ptr, header_ptr)
    ring = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    first = (q_smem.index(0), rotated_smem.index(0))
    second = (q_smem.index(1), rotated_smem.index(1))
    gl.warp_specialize(
        [
            (_consume, (0, tensors, plan, q_stride, scale_log2, first, key_smem, ring, H, R)),
            (_consume, (1, tensors, plan, q_stride, scale_log2, second, key_smem, ring, H, R)),
            (_produce, ((kv_desc, key_desc), plan, key_smem, ring, H)),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


def expanded_attention(
    q: Tensor,
    absorbed: Tensor,
    kv: Tensor,
    key: Tensor,
    context: Tensor,
    context_lse: Tensor,
    items: Tensor,
    header: Tensor,
    scale: float,
    num_programs: int,
) -> Tensor:
    """See `stepgraph.ops.expanded_attention.expanded_attention`; for what `hopper_serves` asks, in a plan of tiles of TILE."""
    num_heads, rotated_dim = context_lse.shape[1], key.shape[1]
    out = context.new_empty(context.shape)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    kv_desc, key_desc = (
        TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [KEYS.value, COLUMNS.value], layout)
        for tensor in (kv, key)
    )
    _expanded_attention_kernel[(num_programs,)](
        q,
        absorbed,
        kv_desc,
        key_desc,
        context,
        context_lse,
        items,
        header,
        out,
        q.stride(0),
        scale * LOG2_E,
        H=num_heads,
        R=absorbed.shape[2] - rotated_dim,
        num_warps=4,
        **LAUNCH,
    )
    return out
