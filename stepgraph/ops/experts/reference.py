"""Plain torch definition of the operators of `stepgraph.ops.experts`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops.fp8_linear.reference import dequantize
from stepgraph.ops.swiglu.reference import clamped_swiglu


def sort_pairs(expert: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.experts.ExpertWork`."""
    local_P = expert.flatten() - first
    local_P = torch.where((local_P >= 0) & (local_P < count), local_P, count)
    sorted_P, order_P = local_P.sort(dim=0, stable=True)
    numbers_N = torch.arange(count, dtype=sorted_P.dtype, device=expert.device)
    ends_N = torch.searchsorted(sorted_P, numbers_N, right=True, out_int32=True)
    return order_P.to(torch.int32), ends_N


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
    """See `stepgraph.ops.experts.gated_experts`. Opaque to a recording: it reads which experts there are."""
    num_experts, top = weight.shape[0], expert.shape[1]
    hidden_PM = x.new_zeros(expert.numel(), weight.shape[1] // 2 if gated else weight.shape[1])
    for number, row_J, pair_J in _each_expert(expert, first, num_experts, order, ends):
        product = F.linear(x[pair_J // top].float(), _values(weight, scale, number), _of(bias, number))
        gate, up = product.chunk(2, 1)
        if not gated:
            hidden = F.relu(product).square()
        elif limit:
            hidden = clamped_swiglu(product, limit, alpha)
        else:
            hidden = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
        hidden_PM[row_J] = hidden.to(x.dtype)
    return hidden_PM


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
    """See `stepgraph.ops.experts.sum_experts`. Opaque to a recording."""
    num_experts, top = weight.shape[0], expert.shape[1]
    down_PE = torch.zeros(expert.numel(), weight.shape[1])
    for number, row_J, pair_J in _each_expert(expert, first, num_experts, order, ends):
        down_PE[pair_J] = F.linear(hidden[row_J].float(), _values(weight, scale, number), _of(bias, number))
    here_TK = (expert >= first) & (expert < first + num_experts)
    sum_TE = torch.zeros(out.shape)
    for k in range(top):
        sum_TE += down_PE[k::top] * torch.where(here_TK, pair_weight, 0.0)[:, k, None]
    if add:
        some_T = here_TK.any(1)
        out[some_T] = (out[some_T].float() + sum_TE[some_T] * multiplier).to(out.dtype)
    else:
        out.copy_(sum_TE * multiplier)


def mixture(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    router: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    totals: Tensor,
    top: int,
    sigmoid: bool,
    normalise: bool,
    least_sum: float,
    scale: float,
    groups: int,
    kept_groups: int,
    group_top: int,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    first: int,
    gelu: bool,
    out: Tensor,
    add: bool,
    multiplier: float,
    logit_bias: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    gated: bool = True,
) -> Tensor:
    """See `stepgraph.ops.experts.mixture`: the operators that it joins, one after the other."""
    op = torch.ops.stepgraph
    normed = x if norm_weight is None else op.rms_norm(x, norm_weight, eps)
    routing = top, sigmoid, normalise, least_sum, scale, groups, kept_groups, group_top
    expert, pair_weight = op.route(normed, router, bias, counts, totals, *routing, logit_bias)
    hidden = op.gated_experts(
        normed, gate_up, gate_up_scale, expert, first, None, None, gelu, False, gate_up_bias, limit, alpha, gated
    )
    pairs = expert, pair_weight, first, None, None
    op.sum_experts(hidden, down, down_scale, *pairs, out, add, multiplier, False, down_bias)
    return normed if norm_weight is not None else x.new_empty(0)


def _each_expert(
    expert: Tensor, first: int, num_experts: int, order: Tensor | None, ends: Tensor | None
) -> list[tuple[int, Tensor, Tensor]]:
    """Each expert that has pairs: its place among those that are kept, the rows of its pairs, and their numbers."""
    found = []
    if order is not None:
        assert ends is not None
        begin = 0
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                found.append((number, torch.arange(begin, end), order[begin:end].long()))
            begin = end
        return found
    for number in range(num_experts):
        pair_J = (expert.flatten() == first + number).nonzero().flatten()
        if len(pair_J):
            found.append((number, pair_J, pair_J))
    return found


def _values(weight: Tensor, scale: Tensor | None, number: int) -> Tensor:
    return weight[number].float() if scale is None else dequantize(weight[number], scale[number])


def _of(bias: Tensor | None, number: int) -> Tensor | None:
    return None if bias is None else bias[number].float()
