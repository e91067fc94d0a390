"""Experts by the kernels of `stepgraph.native`: weights in a GGUF file's blocks, or plain, in float32 or bfloat16.

No value is read on the host, and with operands that are not rounded a token's result depends, bit for bit, on that token only.

Shapes: T tokens, K experts of a token, P = T·K pairs, N experts, I inputs, O outputs, B bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.packed import bfloat16_from
from stepgraph.ops.relu2.reference import relu2
from stepgraph.ops.swiglu.reference import clamped_swiglu, geglu, swiglu

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
    bias: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    gated: bool = True,
) -> Tensor:
    """See `stepgraph.ops.experts.gated_experts`.

    Args:
        x: [T, I] float32.
        codes: [N, 2M, B], or [N, M, B], uint8: blocks, or the bytes of plain weights; I is a multiple of 32.
        expert, first, order, ends, gelu, gated: as there.
        exact_tokens: of an expert with more rows, operands may be rounded to bfloat16; None: of none.
        bias: as there.
        clamp: limit and alpha, as there.
    """
    top, is_sorted, least = expert.shape[1], order is not None, bfloat16_from(exact_tokens)
    if order is None or ends is None:
        order, ends = sort_pairs(expert, first, codes.shape[0])
    is_plain = bias is None and clamp is None and gated
    if is_plain and not gelu and codes.shape[1] % (2 * native.LANES) == 0:
        return _gated_experts(x, codes, order, ends, top, is_sorted, True, least)
    product = _gated_experts(x, codes, order, ends, top, is_sorted, False, least)
    if bias is not None:
        local_P = expert.flatten() - first
        if is_sorted:  # places of pairs whose experts are not here hold anything
            local_P = local_P.index_select(0, order.clamp(0, len(local_P) - 1))
        product += bias.index_select(0, local_P.clamp(0, len(bias) - 1)).float()
    if not gated:
        return relu2(product)
    if clamp is not None:
        return clamped_swiglu(product, *clamp)
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
    bias: Tensor | None = None,
) -> None:
    """See `stepgraph.ops.experts.sum_experts`.

    Args:
        hidden: [P, I] float32.
        codes: [N, O, B] uint8, as of `gated_experts`.
        expert, pair_weight, first, order, ends, add, multiplier, bias: as there.
        out: [T, O] float32.
        exact_tokens: as of `gated_experts`.
    """
    is_sorted, least = order is not None, bfloat16_from(exact_tokens)
    if order is None or ends is None:
        order, ends = sort_pairs(expert, first, codes.shape[0])
    _sum_experts(hidden, codes, order, ends, pair_weight, is_sorted, out, add, multiplier, least)
    if bias is not None:
        local_TK = expert - first
        here_TK = (local_TK >= 0) & (local_TK < len(bias))
        weight_TK = torch.where(here_TK, pair_weight * multiplier, 0.0)
        for k in range(expert.shape[1]):
            out += bias.index_select(0, local_TK[:, k].clamp(0, len(bias) - 1)).float() * weight_TK[:, k, None]
