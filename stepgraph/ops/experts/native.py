"""Experts by the kernels of `stepgraph.native`: weights in a GGUF file's blocks, or plain, in float32 or bfloat16.

No value is read on the host, and with operands that are not rounded a token's result depends, bit for bit, on that token only.

Shapes: T tokens, K experts of a token, P = T·K pairs, N experts, I inputs, O outputs, B bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.packed import bfloat16_from
from stepgraph.ops.swiglu.reference import geglu, swiglu

_sort_pairs = native.declare("sort_pairs(Tensor expert, int first, Tensor(a!) order, Tensor(b!) ends) -> ()")
_gated_experts = native.declare(
    "gated_experts(Tensor x, Tensor codes, Tensor order, Tensor ends, int top, int sorted, int gate, int bfloat16_from) -> Tensor"
)
_sum_experts = native.declare(
    "sum_experts(Tensor hidden, Tensor codes, Tensor order, Tensor ends, Tensor pair_weight, int sorted, Tensor(a!) out, "
    "int add, float multiplier, int bfloat16_from) -> ()"
)


def sort_pairs(expert: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.experts.ExpertWork`. Pairs of one expert stay in their order."""
    order_P = torch.empty(expert.numel(), dtype=torch.int32)
    ends_N = torch.empty(count, dtype=torch.int32)
    _sort_pairs(expert, first, order_P, ends_N)
    return order_P, ends_N


def gated_experts(
    x: Tensor,
    codes: Tensor,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    *,
    gelu: bool,
    exact_tokens: int | None,
) -> Tensor:
    """See `stepgraph.ops.experts.gated_experts`.

    Args:
        x: [T, I] float32.
        codes: [N, 2M, B] uint8: blocks, or the bytes of plain weights; I is a multiple of 32.
        expert, first, order, ends, gelu: as there.
        exact_tokens: of an expert with more rows, operands may be rounded to bfloat16; None: of none.
    """
    top, is_sorted, least = expert.shape[1], order is not None, bfloat16_from(exact_tokens)
    if order is None or ends is None:
        order, ends = sort_pairs(expert, first, codes.shape[0])
    if not gelu and codes.shape[1] % (2 * native.LANES) == 0:
        return _gated_experts(x, codes, order, ends, top, is_sorted, True, least)
    product = _gated_experts(x, codes, order, ends, top, is_sorted, False, least)
    return (geglu if gelu else swiglu)(product)


def sum_experts(
    hidden: Tensor,
    codes: Tensor,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    *,
    add: bool,
    multiplier: float,
    exact_tokens: int | None,
) -> None:
    """See `stepgraph.ops.experts.sum_experts`.

    Args:
        hidden: [P, I] float32.
        codes: [N, O, B] uint8, as of `gated_experts`.
        expert, pair_weight, first, order, ends, add, multiplier: as there.
        out: [T, O] float32.
        exact_tokens: as of `gated_experts`.
    """
    is_sorted, least = order is not None, bfloat16_from(exact_tokens)
    if order is None or ends is None:
        order, ends = sort_pairs(expert, first, codes.shape[0])
    _sum_experts(hidden, codes, order, ends, pair_weight, is_sorted, out, add, multiplier, least)
