"""Triton kernel of `expanded_attention`, which has another one for what `hopper_serves` says.

Shapes in the kernel: M tokens of a tile, which is of one head; K keys of one inner iteration; N, P, V as of the operator,
where N is A numbers, a power of two, and then B others. Blocks of numbers are padded to a power of two.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.attention.geometry import ITEM_SIZE
from stepgraph.ops.attention.triton import LOG2_E, load_item, work_of
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.expanded_attention.geometry import TILE, hopper_serves
from stepgraph.ops.launched import launched
from stepgraph.platforms.kernels import kernel_tuning


@dataclass(frozen=True)
class Launch:
    """What the sizes of a launch leave open."""

    keys: int  # of one inner iteration
    num_warps: int
    num_stages: int


def launch_of(head_dim: int, itemsize: int) -> Launch:
    """For padded dimensions of keys and values together, and the bytes of a number: what a Hopper GPU's registers and shared
    memory hold."""
    if itemsize == 4:
        return Launch(keys=16, num_warps=8, num_stages=2)
    if head_dim > 384:
        return Launch(keys=32, num_warps=8, num_stages=2)
    return Launch(keys=64, num_warps=8, num_stages=3)


@triton.jit
def _load(line_K, inside_K, FIRST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[K, BLOCK]: DIM numbers of each line from its number FIRST on, then zeros; if MASKED, zeros of lines not inside."""
    dim_D = tl.arange(0, BLOCK)
    source_KD = line_K[:, None] + (FIRST + dim_D)[None, :]
    if MASKED:
        return tl.load(source_KD, mask=inside_K[:, None] & (dim_D < DIM)[None, :], other=0.0)
    if DIM < BLOCK:
        return tl.load(source_KD, mask=(dim_D < DIM)[None, :], other=0.0)
    return tl.load(source_KD)


@triton.jit
def _attend(
    q_MA,
    q_MB,
    q_MP,
    acc_MV,
    max_M,
    sum_M,
    token_M,
    begin,
    end,
    kv_row_ptr,
    key_row_ptr,
    kv_stride,
    key_stride,
    scale_log2,
    N: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,  # some keys are unseen by some queries, or `end - begin` is no multiple of KEYS
):
    """Online softmax over a row's tokens begin … end-1; scores are in units of log 2."""
    for start in range(begin, end, KEYS):
        line_K = tl.arange(0, KEYS)
        key_K = start + line_K
        inside_K = key_K < end
        kv_line_K = kv_row_ptr + tl.cast(start, tl.int64) * kv_stride + line_K * kv_stride
        key_line_K = key_row_ptr + tl.cast(start, tl.int64) * key_stride + line_K * key_stride
        k_KA = _load(kv_line_K, inside_K, 0, A, BLOCK_A, MASKED)
        score_MK = tl.dot(q_MA, tl.trans(k_KA), input_precision="ieee")
        if A < N:
            k_KB = _load(kv_line_K, inside_K, A, N - A, BLOCK_B, MASKED)
            score_MK = tl.dot(q_MB, tl.trans(k_KB), acc=score_MK, input_precision="ieee")
        k_KP = _load(key_line_K, inside_K, 0, P, BLOCK_P, MASKED)
        score_MK = tl.dot(q_MP, tl.trans(k_KP), acc=score_MK, input_precision="ieee")
        if MASKED:  # a tile's keys end with its last token
            score_MK = tl.where(key_K[None, :] <= token_M[:, None], score_MK, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MK, axis=1) * scale_log2)  # finite: all see the row's first token
        weight_MK = tl.exp2(score_MK * scale_log2 - new_max_M[:, None])
        decay_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * decay_M + tl.sum(weight_MK, axis=1)
        v_KV = _load(kv_line_K, inside_K, N, V, BLOCK_V, MASKED)
        acc_MV = tl.dot(weight_MK.to(v_KV.dtype), v_KV, acc=acc_MV * decay_M[:, None], input_precision="ieee")
        max_M = new_max_M
    return acc_MV, max_M, sum_M


@launched
@triton.jit
def _expanded_attention_kernel(
    q_ptr,
    absorbed_ptr,
    kv_ptr,
    key_ptr,
    context_ptr,
    lse_ptr,
    items_ptr,
    header_ptr,
    out_ptr,
    q_stride,
    kv_stride,
    key_stride,
    scale_log2,
    H: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    ITEM: tl.constexpr,
):
    num_work = tl.load(header_ptr) * H
    dim_V = tl.arange(0, BLOCK_V)
    work = tl.program_id(0)
    _, query_start, query_len, kv_len, tile, _, _ = load_item(items_ptr, work // H, work < num_work, ITEM)
    wait_for_previous()  # the plan is older
    turn = 0
    while work < num_work:
        head = work % H
        first_token = tile * TILE
        token_M = first_token + tl.arange(0, TILE)
        inside_M = token_M < query_len
        line_M = (query_start + token_M).to(tl.int64)
        q_line_M = q_ptr + line_M * q_stride + head * (N + P)
        q_MA = _load(q_line_M, inside_M, 0, A, BLOCK_A, True)
        q_MB = q_MA
        if A < N:
            q_MB = _load(q_line_M, inside_M, A, N - A, BLOCK_B, True)
        q_MP = _load(absorbed_ptr + (line_M * H + head) * (R + P), inside_M, R, P, BLOCK_P, True)

        offset_MV = (line_M * H + head)[:, None] * V + dim_V[None, :]
        inside_MV = inside_M[:, None] & (dim_V < V)[None, :]
        # Older keys are as one key: with the score that their sum of exponentials is that of, and the value that they gave.
        has_context_M = inside_M & (kv_len > query_len)
        max_M = tl.load(lse_ptr + line_M * H + head, mask=has_context_M, other=float("-inf"))
        sum_M = tl.where(has_context_M, 1.0, 0.0)
        acc_MV = tl.load(context_ptr + offset_MV, mask=inside_MV & (kv_len > query_len), other=0.0).to(tl.float32)

        kv_row_ptr = kv_ptr + query_start.to(tl.int64) * kv_stride + head * (N + V)
        key_row_ptr = key_ptr + query_start.to(tl.int64) * key_stride
        end = tl.minimum(first_token + TILE, query_len)
        masked_from = (first_token + 1) // KEYS * KEYS
        acc_MV, max_M, sum_M = _attend(
            q_MA, q_MB, q_MP, acc_MV, max_M, sum_M, token_M, 0, masked_from, kv_row_ptr, key_row_ptr, kv_stride, key_stride,
            scale_log2, N, P, V, A, BLOCK_A, BLOCK_B, BLOCK_P, BLOCK_V, KEYS, MASKED=False,
        )  # fmt: skip
        acc_MV, max_M, sum_M = _attend(
            q_MA, q_MB, q_MP, acc_MV, max_M, sum_M, token_M, masked_from, end, kv_row_ptr, key_row_ptr, kv_stride, key_stride,
            scale_log2, N, P, V, A, BLOCK_A, BLOCK_B, BLOCK_P, BLOCK_V, KEYS, MASKED=True,
        )  # fmt: skip
        tl.store(out_ptr + offset_MV, (acc_MV / sum_M[:, None]).to(out_ptr.dtype.element_ty), mask=inside_MV)
        turn += 1
        work = work_of(turn)
        _, query_start, query_len, kv_len, tile, _, _ = load_item(items_ptr, work // H, work < num_work, ITEM)


def expanded_attention(
    q: Tensor,
    absorbed: Tensor,
    kv: Tensor,
    key: Tensor,
    context: Tensor,
    context_lse: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    items: Tensor,
    header: Tensor,
    scale: float,
    tile: int,
    num_programs: int,
) -> Tensor:
    """See `stepgraph.ops.expanded_attention.expanded_attention`."""
    num_heads, rotated_dim = context_lse.shape[1], key.shape[1]
    key_dim = q.shape[1] // num_heads - rotated_dim
    value_dim = kv.shape[1] // num_heads - key_dim
    is_whole = kv.is_contiguous() and key.is_contiguous()
    if tile == TILE and is_whole and hopper_serves(kernel_tuning(), q.dtype, key_dim, rotated_dim, value_dim):
        from stepgraph.ops.expanded_attention import hopper

        return hopper.expanded_attention(q, absorbed, kv, key, context, context_lse, items, header, scale, num_programs)
    first = 1 << (key_dim.bit_length() - 1)
    block_a, block_b, block_p, block_v = (
        max(16, triton.next_power_of_2(dim)) for dim in (first, key_dim - first, rotated_dim, value_dim)
    )
    head_dim = block_a + (block_b if first < key_dim else 0) + block_p + block_v
    launch = launch_of(head_dim, q.element_size())
    out = context.new_empty(context.shape)
    _expanded_attention_kernel[(num_programs,)](
        q,
        absorbed,
        kv,
        key,
        context,
        context_lse,
        items,
        header,
        out,
        q.stride(0),
        kv.stride(0),
        key.stride(0),
        scale * LOG2_E,
        H=num_heads,
        N=key_dim,
        P=rotated_dim,
        V=value_dim,
        R=absorbed.shape[2] - rotated_dim,
        A=first,
        BLOCK_A=block_a,
        BLOCK_B=block_b,
        BLOCK_P=block_p,
        BLOCK_V=block_v,
        TILE=tile,
        KEYS=launch.keys,
        ITEM=ITEM_SIZE,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **LAUNCH,
    )
    return out
