"""CUDA kernel of `sort_pairs`: a counting sort without a pass that all programs have to wait for.

Shapes: P pairs, N experts that are kept here; `_B` is a block of pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

MAX_BLOCK = 8192
"""Pairs that a program looks at together."""


@triton.jit
def _load_experts(expert_ptr, pair_B, first, N, P):
    """Places of the pairs' experts among the N that are kept here; N or more for pairs of others, and behind the last pair."""
    local_B = tl.load(expert_ptr + pair_B, mask=pair_B < P, other=0) - first
    return tl.where((pair_B < P) & (local_B >= 0), local_B, N)


@launched
@triton.jit(do_not_specialize=["first", "N", "P"])
def _sort_pairs_kernel(expert_ptr, order_ptr, ends_ptr, first, N, P, BLOCK_P: tl.constexpr):
    """One program per expert. Each counts the pairs of the experts before its own, behind which it then writes its own pairs in
    their order: no two write the same place, and none waits for another."""
    expert = tl.program_id(0)
    place_B = tl.arange(0, BLOCK_P)
    before_B = tl.zeros([BLOCK_P], tl.int32)
    wait_for_previous()
    for start in range(0, P, BLOCK_P):
        before_B += (_load_experts(expert_ptr, start + place_B, first, N, P) < expert).to(tl.int32)
    end = tl.sum(before_B)
    for start in range(0, P, BLOCK_P):
        mine_B = _load_experts(expert_ptr, start + place_B, first, N, P) == expert
        rank_B = tl.cumsum(mine_B.to(tl.int32))
        tl.store(order_ptr + end + rank_B - 1, start + place_B, mask=mine_B)
        end += tl.sum(mine_B.to(tl.int32))
    tl.store(ends_ptr + expert, end)


def sort_pairs(expert: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.experts.ExpertWork`. Pairs of an expert stay in their order."""
    num_pairs = expert.numel()
    order = torch.empty(num_pairs, dtype=torch.int32, device=expert.device)
    ends = torch.empty(count, dtype=torch.int32, device=expert.device)
    block = min(max(128, triton.next_power_of_2(num_pairs)), MAX_BLOCK)
    _sort_pairs_kernel[(count,)](
        expert, order, ends, first, count, num_pairs, BLOCK_P=block, num_warps=max(1, block // 256), **LAUNCH
    )
    return order, ends
