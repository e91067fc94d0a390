"""CUDA kernels of the experts' products, by their dispatch."""

from torch import Tensor

from stepgraph.ops.experts import tiles


def gated_experts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    gelu: bool,
) -> Tensor:
    """See `stepgraph.ops.experts.gated_experts`."""
    assert order is not None, "pairs that are not sorted have no kernel"
    assert ends is not None
    return tiles.gated_experts(x, weight, scale, order, ends, gelu)


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
) -> None:
    """See `stepgraph.ops.experts.sum_experts`."""
    assert order is not None, "pairs that are not sorted have no kernel"
    assert ends is not None
    tiles.sum_experts(hidden, weight, scale, expert, pair_weight, first, order, ends, out, add, multiplier)
