"""CUDA kernels of `sort_pairs`: a counting sort.

Shapes: P pairs in C blocks, N experts that are kept here; `_B` is a block of pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

MAX_BLOCK = 4096
"""Pairs that a program looks at together."""


@triton.jit
def _load_experts(expert_ptr, pair_B, first, N, P):
    """Places of the pairs' experts among the N that are kept here; N or more for pairs of others, and behind the last pair."""
    local_B = tl.load(expert_ptr + pair_B, mask=pair_B < P, other=0) - first
    return tl.where((pair_B < P) & (local_B >= 0), local_B, N)


@launched
@triton.jit(do_not_specialize=["first", "N", "P"])
def _count_kernel(expert_ptr, counts_ptr, first, N, P, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program per block of pairs: how many of them each expert has, and other pairs as the last, [BLOCK_N]."""
    wait_for_previous()
    pair_B = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    local_B = tl.minimum(_load_experts(expert_ptr, pair_B, first, N, P), BLOCK_N - 1)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.histogram(local_B, BLOCK_N))


@launched
@triton.jit(do_not_specialize=["first", "N", "P", "C"])
def _sort_pairs_kernel(
    expert_ptr,
    counts_ptr,  # [C, BLOCK_N], from `_count_kernel`; None: all pairs are one block
    order_ptr,
    ends_ptr,
    first,
    N,
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least C
    BLOCK_N: tl.constexpr,
):
    """One program per expert and block of pairs. Each finds how many pairs come before: those of the experts before its own, and
    its own ones in blocks before. Behind them it writes those of its own block, in their order."""
    expert, block = tl.program_id(0), tl.program_id(1)
    pair_B = block * BLOCK_P + tl.arange(0, BLOCK_P)
    wait_for_previous()
    local_B = _load_experts(expert_ptr, pair_B, first, N, P)
    if counts_ptr is None:
        begin = tl.sum((local_B < expert).to(tl.int32))
    else:
        block_C, expert_N = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
        is_before_CN = (expert_N < expert) | ((expert_N == expert) & (block_C < block))
        count_CN = tl.load(counts_ptr + block_C * BLOCK_N + expert_N, mask=is_before_CN & (block_C < C), other=0)
        begin = tl.sum(count_CN)
    mine_B = local_B == expert
    rank_B = tl.cumsum(mine_B.to(tl.int32))
    tl.store(order_ptr + begin + rank_B - 1, pair_B, mask=mine_B)
    if block == C - 1:
        tl.store(ends_ptr + expert, begin + tl.sum(mine_B.to(tl.int32)))


def sort_pairs(expert: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.experts.ExpertWork`. Pairs of an expert stay in their order."""
    num_pairs = expert.numel()
    order = torch.empty(num_pairs, dtype=torch.int32, device=expert.device)
    ends = torch.empty(count, dtype=torch.int32, device=expert.device)
    block = min(max(128, triton.next_power_of_2(num_pairs)), MAX_BLOCK)
    blocks, experts = triton.cdiv(num_pairs, block), triton.next_power_of_2(count + 1)
    num_warps = max(1, block // 256)
    counts = None
    if blocks > 1:
        counts = torch.empty(blocks, experts, dtype=torch.int32, device=expert.device)
        _count_kernel[(blocks,)](
            expert, counts, first, count, num_pairs, BLOCK_P=block, BLOCK_N=experts, num_warps=num_warps, **LAUNCH
        )
    _sort_pairs_kernel[(count, blocks)](
        expert,
        counts,
        order,
        ends,
        first,
        count,
        num_pairs,
        blocks,
        BLOCK_P=block,
        BLOCK_C=triton.next_power_of_2(blocks),
        BLOCK_N=experts,
        num_warps=num_warps,
        **LAUNCH,
    )
    return order, ends
