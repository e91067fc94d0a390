"""Experts of 4 bits on the CPU: dequantised, all of a layer, at every call. For trying them without a GPU."""

import torch
from torch import Tensor

from stepgraph.ops.four_bit_linear.reference import FourBitWeight, dequantize


def four_bit_gated_experts(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    gelu: bool,
    by_row: bool,
    bias: Tensor | None,
    limit: float,
    alpha: float,
    gated: bool,
) -> Tensor:
    """See `stepgraph.ops.four_bit_experts.four_bit_gated_experts`."""
    weight = values(FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1), x)
    pairs = expert, first, order, ends
    return torch.ops.stepgraph.gated_experts(x, weight, None, *pairs, gelu, by_row, bias, limit, alpha, gated)


def four_bit_sum_experts(
    hidden: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    add: bool,
    multiplier: float,
    by_row: bool,
    bias: Tensor | None,
) -> None:
    """See `stepgraph.ops.four_bit_experts.four_bit_sum_experts`."""
    weight = values(FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1), hidden)
    pairs = expert, pair_weight, first, order, ends
    torch.ops.stepgraph.sum_experts(hidden, weight, None, *pairs, out, add, multiplier, by_row, bias)


def values(weight: FourBitWeight, x: Tensor) -> Tensor:
    """The weights [N, O, I] that experts' codes [N, O, …] stand for, in the dtype of what they are multiplied with, [·, I]."""
    experts, outputs = weight.codes.shape[:2]
    zero, factor = (None if t is None else t.flatten(0, 1) for t in (weight.zero, weight.factor))
    flat = weight._replace(codes=weight.codes.flatten(0, 1), scale=weight.scale.flatten(0, 1), zero=zero, factor=factor)
    return dequantize(flat, x.shape[1]).to(x.dtype).view(experts, outputs, -1)
