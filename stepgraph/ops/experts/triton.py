"""Triton kernels of `gated_experts` and `sum_experts`: of pairs as they come, or sorted."""

from torch import Tensor

from stepgraph.ops.experts import pairs, tiles


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
    """See `stepgraph.ops.experts.gated_experts`. Each pair has its own program where they are not sorted, `by_row` or not."""
    if order is None or ends is None:
        return pairs.gated_experts(x, weight, scale, expert, first, gelu, bias, limit, alpha, gated)
    return tiles.gated_experts(x, weight, scale, order, ends, gelu, bias, limit, alpha, gated, by_row=by_row)


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
    """See `stepgraph.ops.experts.sum_experts`; likewise."""
    if order is None or ends is None:
        pairs.sum_experts(hidden, weight, scale, expert, pair_weight, first, out, add, multiplier, bias)
    else:
        tiles.sum_experts(
            hidden, weight, scale, expert, pair_weight, first, order, ends, out, add, multiplier, bias, by_row=by_row
        )
