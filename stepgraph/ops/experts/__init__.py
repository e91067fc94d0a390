"""The feed-forward layers of a mixture's experts: each token times the weights of its own experts.

A token and one of its experts are a *pair*. Which experts have how many pairs is data; how many pairs there are at most, and so
every grid, is not.

Shapes: T tokens, K experts of a token, P = T·K pairs, N experts that are kept here, E hidden size, M width of an expert, G groups
of inputs with a scale each.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

from stepgraph.ops.experts import cpu, reference
from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.route import Chosen

__all__ = ["ExpertDispatch", "ExpertWork", "expert_work", "gated_experts", "max_tiles", "sum_experts"]

_sort_pairs = register(
    "sort_pairs(Tensor expert, int first, int count) -> (Tensor, Tensor)",
    {"cpu": Inlined(cpu.sort_pairs), "cuda": "stepgraph.ops.experts.sort:sort_pairs"},
)
_gated_experts = register(
    "gated_experts(Tensor x, Tensor weight, Tensor? scale, Tensor expert, int first, Tensor? order, Tensor? ends, bool gelu) "
    "-> Tensor",
    {"cpu": reference.gated_experts, "cuda": "stepgraph.ops.experts.triton:gated_experts"},
)
_sum_experts = register(
    "sum_experts(Tensor hidden, Tensor weight, Tensor? scale, Tensor expert, Tensor pair_weight, int first, Tensor? order, "
    "Tensor? ends, Tensor(a!) out, bool add, float multiplier) -> ()",
    {"cpu": reference.sum_experts, "cuda": "stepgraph.ops.experts.triton:sum_experts"},
)


class ExpertDispatch(StrEnum):
    """How the tokens of a step come to the weights of their experts."""

    PAIRS = "pairs"
    """Each pair reads its expert's weights: for few tokens, that hardly share experts."""
    TILES = "tiles"
    """Pairs are sorted by expert, and tiles of them share a read."""


class ExpertWork(NamedTuple):
    """The pairs of some tokens."""

    expert: Tensor  # [T, K] int32, numbered as in the whole model
    weight: Tensor  # [T, K] float32
    first: int  # number of the first expert that is kept here
    order: Tensor | None
    """[P] int32 where pairs are sorted: numbers t·K + k of the pairs, those of the first expert first; after those of all experts
    that are kept here, anything."""
    ends: Tensor | None
    """[N] int32 where pairs are sorted: the place in `order` after each expert's last pair."""


def expert_work(chosen: Chosen, first: int, count: int, dispatch: ExpertDispatch) -> ExpertWork:
    """The pairs whose experts are kept here. May run inside a graph.

    Args:
        chosen: each token's experts.
        first, count: the experts that are kept here.
        dispatch: how tokens come to them.
    """
    if dispatch is ExpertDispatch.PAIRS:
        return ExpertWork(*chosen, first, None, None)
    order_P, ends_N = _sort_pairs(chosen.expert, first, count)
    return ExpertWork(*chosen, first, order_P, ends_N)


def gated_experts(x: Tensor, weight: Tensor, scale: Tensor | None, work: ExpertWork, *, gelu: bool) -> Tensor:
    """``activation(gate(x)) · up(x)`` of each pair, accumulated in float32. May run inside a graph.

    Args:
        x: [T, E] bfloat16, float16 or float32, contiguous.
        weight: [N, 2M, E], dtype of `x`, or float8_e4m3fn with a scale; contiguous. Of each expert, the gate comes first.
        scale: [N, 2M, G] float32; None of weights of the dtype of `x`.
        work: the pairs.
        gelu: whether the activation is GELU (by tanh), not SiLU.

    Returns:
        [P, M], dtype of `x`: in the order of `work.order`, or else of the pairs. Rows of pairs whose experts are not here are
        unspecified.
    """
    return _gated_experts(x, weight, scale, work.expert, work.first, work.order, work.ends, gelu)


def sum_experts(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    work: ExpertWork,
    out: Tensor,
    *,
    add: bool = False,
    multiplier: float = 1.0,
) -> None:
    """Each token's sum over its experts of ``weight · down(hidden)``, accumulated in float32, in the order in which they were
    chosen. May run inside a graph.

    Args:
        hidden: [P, M], as `gated_experts` returns it.
        weight: [N, E, M], dtype of `hidden`, or float8_e4m3fn with a scale; contiguous.
        scale: [N, E, G] float32; None of weights of the dtype of `hidden`.
        work: the pairs.
        out: [T, E], dtype of `hidden`, contiguous; overwritten, with 0 where a token has no expert here, or added to.
        add: whether it is added, rounded once; tokens without an expert here leave `out` as it is.
        multiplier: of the sum.
    """
    _sum_experts(
        hidden, weight, scale, work.expert, work.weight, work.first, work.order, work.ends, out, add, multiplier
    )


def max_tiles(num_pairs: int, num_experts: int, tile: int) -> int:
    """Most tiles of so many rows that any split of the pairs among the experts gives: a pair for each expert, then whole tiles
    more."""
    experts = min(num_pairs, num_experts)
    return experts + (num_pairs - experts) // tile
