"""Experts on the CPU: by our own kernels where they take the weights (`stepgraph.ops.experts.native`), else one product of the
library for each expert that has rows, as in `stepgraph.ops.linear.cpu`.

Of 32 experts of 256, four a token, hidden size 512, a layer takes, on one core with AVX2, in ms for 1, 8, 64 and 256 tokens (the
best of some calls, by scripts/time_cpu_experts.py, on a machine that others used too): in float32 0.17, 2.3, 6.6 and 23, by the
library 0.88, 7.9, 16 and 45; in bfloat16 0.16, 0.71, 4.6 and 40, by the library 0.73, 3.7, 66 and 233.

Shapes: T tokens, K experts of a token, P = T·K pairs, of which J have their experts here, N experts, E hidden size, M width of an
expert, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.experts import native as kernels
from stepgraph.ops.experts import reference
from stepgraph.ops.fp8_linear.reference import dequantize
from stepgraph.ops.linear.cpu import linear, linear_by_row
from stepgraph.ops.packed import BLOCK
from stepgraph.ops.relu2.reference import relu2
from stepgraph.ops.swiglu.reference import clamped_swiglu, geglu, swiglu

Product = Callable[[Tensor, int], Tensor]
"""Of rows [rows, I] with the weight of an expert, by its number among those that are kept: [rows, O]."""


class _Groups(NamedTuple):
    """The pairs whose experts are here, expert by expert."""

    pair: Tensor  # [J] int64: their numbers
    numbers: list[int]  # of the experts that have any
    lengths: list[int]  # how many each of them has

    def products(self, x_JI: Tensor, product: Product) -> Tensor:
        """[J, O]; J is not 0."""
        rows = x_JI.split(self.lengths)
        return torch.cat([product(row, number) for row, number in zip(rows, self.numbers, strict=True)])


def _groups(expert: Tensor, first: int, count: int, order: Tensor | None, ends: Tensor | None) -> _Groups:
    """Read them; arguments as of the operators."""
    pairs: dict[int, list[int]] = {}
    if order is None:
        for pair, number in enumerate(expert.flatten().tolist()):
            if first <= number < first + count:
                pairs.setdefault(number, []).append(pair)
        numbers = sorted(pairs)
        pair_J = torch.tensor([pair for number in numbers for pair in pairs[number]], dtype=torch.int64)
        return _Groups(pair_J, [number - first for number in numbers], [len(pairs[number]) for number in numbers])
    assert ends is not None
    end_N = ends.tolist()
    lengths = [end - begin for begin, end in zip([0, *end_N], end_N, strict=False)]
    numbers = [number for number, length in enumerate(lengths) if length]
    return _Groups(order[: end_N[-1]].long(), numbers, [lengths[number] for number in numbers])


def _weighted(
    hidden: Tensor, found: _Groups, product: Product, pair_weight: Tensor, width: int, *, sorted: bool
) -> Tensor:
    """Each token's sum over its experts here, [T, E] float32. `width`: E; `sorted`: whether rows of `hidden` are in the order of
    the groups, else in that of the pairs."""
    tokens, top = pair_weight.shape
    if not found.numbers:
        return torch.zeros(tokens, width)
    given_JM = hidden[: len(found.pair)] if sorted else hidden.index_select(0, found.pair)
    down_JE = found.products(given_JM, product).float()
    down_JE *= pair_weight.flatten().index_select(0, found.pair).unsqueeze(1)
    whole = len(found.pair) == tokens * top
    down_PE = down_JE.new_empty(tokens * top, width) if whole else down_JE.new_zeros(tokens * top, width)
    down_TKE = down_PE.index_copy_(0, found.pair, down_JE).view(tokens, top, width)
    # A product and a sum at a time: fused, or in `sum`, they would round by where vectors end.
    sum_TE = down_TKE[:, 0].clone()
    for k in range(1, top):
        sum_TE += down_TKE[:, k]
    return sum_TE


def sort_pairs(expert: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.experts.ExpertWork`."""
    return (kernels if native.available() else reference).sort_pairs(expert, first, count)


def gated_experts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    gelu: bool,
    by_row: bool,
    bias: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    gated: bool = True,
) -> Tensor:
    """See `stepgraph.ops.experts.gated_experts`."""
    pairs = expert, first, order, ends
    hidden_PM: Tensor = gated_experts_natively(x, weight, scale, *pairs, gelu, by_row, bias, limit, alpha, gated)
    if hidden_PM is NotImplemented:
        return gated_experts_by_library(x, weight, scale, *pairs, gelu, by_row, bias, limit, alpha, gated)
    return hidden_PM


def gated_experts_by_library(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    gelu: bool,
    by_row: bool,
    bias: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    gated: bool = True,
) -> Tensor:
    """`gated_experts` by the library; opaque to a recording, which would hold the experts of one step."""
    found = _groups(expert, first, weight.shape[0], order, ends)
    hidden_PM = x.new_empty(expert.numel(), weight.shape[1] // 2 if gated else weight.shape[1])
    if found.numbers:
        x_JE = x.index_select(0, found.pair // expert.shape[1])
        product_JM = found.products(x_JE, _product(weight, scale, by_row, bias))
        if not gated:
            hidden_JM = relu2(product_JM)
        else:
            hidden_JM = clamped_swiglu(product_JM, limit, alpha) if limit else (geglu if gelu else swiglu)(product_JM)
        hidden_PM[found.pair if order is None else slice(len(hidden_JM))] = hidden_JM
    return hidden_PM


def gated_experts_natively(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    gelu: bool,
    by_row: bool,
    bias: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    gated: bool = True,
) -> Any:
    """`gated_experts` by our own kernels, as a recording may hold it; NotImplemented where they do not take the weights."""
    if (codes := _codes(weight, scale)) is None:
        return NotImplemented
    hidden_PM = kernels.gated_experts(
        x.float(),
        codes,
        expert,
        first,
        order,
        ends,
        gelu=gelu,
        exact_tokens=None,
        bias=bias,
        clamp=(limit, alpha) if limit else None,
        gated=gated,
    )
    return hidden_PM.to(x.dtype)


def sum_experts(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    add: bool,
    multiplier: float,
    by_row: bool,
    bias: Tensor | None = None,
) -> None:
    """See `stepgraph.ops.experts.sum_experts`."""
    operands = hidden, weight, scale, expert, pair_weight, first, order, ends
    ends_with = out, add, multiplier, by_row, bias
    if sum_experts_natively(*operands, *ends_with) is NotImplemented:
        sum_experts_by_library(*operands, *ends_with)


def sum_experts_by_library(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    add: bool,
    multiplier: float,
    by_row: bool,
    bias: Tensor | None = None,
) -> None:
    """`sum_experts` likewise."""
    found = _groups(expert, first, weight.shape[0], order, ends)
    product = _product(weight, scale, by_row, bias)
    sum_TE = _weighted(hidden, found, product, pair_weight, out.shape[1], sorted=order is not None)
    if multiplier != 1.0:
        sum_TE *= multiplier
    # Where a token has no expert here, 0 is added.
    out.add_(sum_TE) if add else out.copy_(sum_TE)


def sum_experts_natively(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    add: bool,
    multiplier: float,
    by_row: bool,
    bias: Tensor | None = None,
) -> Any:
    """`sum_experts` likewise."""
    if (codes := _codes(weight, scale)) is None:
        return NotImplemented
    sum_TE = out if out.dtype == torch.float32 else torch.empty(out.shape)
    kernels.sum_experts(
        hidden.float(),
        codes,
        expert,
        pair_weight,
        first,
        order,
        ends,
        sum_TE,
        add=add and sum_TE is out,
        multiplier=multiplier,
        exact_tokens=None,
        bias=bias,
    )
    if sum_TE is not out:
        out.add_(sum_TE) if add else out.copy_(sum_TE)
    return None


def _codes(weight: Tensor, scale: Tensor | None) -> Tensor | None:
    """[N, O, bytes of a row]: weights as our own kernels take them; None if they do not."""
    taken = scale is None and weight.dtype in (torch.float32, torch.bfloat16) and weight.shape[2] % BLOCK == 0
    return weight.view(torch.uint8) if taken and native.available() else None


def _product(weight: Tensor, scale: Tensor | None, by_row: bool, bias: Tensor | None) -> Product:
    """By the library."""

    def product(x_JI: Tensor, number: int) -> Tensor:
        weight_OI = weight[number]
        if scale is not None:  # widened at every call, as in `stepgraph.ops.fp8_linear.cpu`
            weight_OI = dequantize(weight_OI, scale[number])
        given_JI = x_JI.to(weight_OI.dtype)
        bias_O = None if bias is None else bias[number].to(weight_OI.dtype)
        if not by_row:
            return linear(given_JI, weight_OI, bias_O).to(x_JI.dtype)
        out_JO = given_JI.new_empty(len(given_JI), len(weight_OI))
        linear_by_row(given_JI, weight_OI, bias_O, out_JO)
        return out_JO.to(x_JI.dtype)

    return product
