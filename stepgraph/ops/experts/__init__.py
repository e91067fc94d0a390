"""The feed-forward layers of a mixture's experts: each token times the weights of its own experts.

A token and one of its experts are a *pair*. Which experts have how many pairs is data; how many pairs there are at most, and so
every grid, is not.

Shapes: T tokens, K experts of a token, P = T·K pairs, N experts that are kept here, E hidden size, M width of an expert, G groups
of inputs with a scale each.
"""

from __future__ import annotations

from dataclasses import astuple
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

from stepgraph.ops.experts import cpu, reference
from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.route import Chosen, Routing
from stepgraph.ops.swiglu import Clamp

__all__ = [
    "ExpertDispatch",
    "ExpertWeights",
    "ExpertWork",
    "expert_work",
    "gated_experts",
    "mixture",
    "sum_experts",
]

_sort_pairs = register(
    "sort_pairs(Tensor expert, int first, int count) -> (Tensor, Tensor)",
    {"cpu": Inlined(cpu.sort_pairs), "cuda": "stepgraph.ops.experts.sort:sort_pairs"},
)
_gated_experts = register(
    "gated_experts(Tensor x, Tensor weight, Tensor? scale, Tensor expert, int first, Tensor? order, Tensor? ends, bool gelu, "
    "bool by_row, Tensor? bias=None, float limit=0.0, float alpha=1.0, bool gated=True) -> Tensor",
    {
        "cpu": Inlined(cpu.gated_experts, cpu.gated_experts_natively),
        "cuda": "stepgraph.ops.experts.triton:gated_experts",
    },
)
_sum_experts = register(
    "sum_experts(Tensor hidden, Tensor weight, Tensor? scale, Tensor expert, Tensor pair_weight, int first, Tensor? order, "
    "Tensor? ends, Tensor(a!) out, bool add, float multiplier, bool by_row, Tensor? bias=None) -> ()",
    {
        "cpu": Inlined(cpu.sum_experts, cpu.sum_experts_natively),
        "cuda": "stepgraph.ops.experts.triton:sum_experts",
    },
)
_mixture = register(
    "mixture(Tensor x, Tensor? norm_weight, float eps, Tensor router, Tensor? bias, Tensor counts, Tensor(a!) totals, int top, "
    "bool sigmoid, bool normalise, float least_sum, float scale, int groups, int kept_groups, int group_top, Tensor gate_up, "
    "Tensor? gate_up_scale, Tensor down, Tensor? down_scale, int first, bool gelu, Tensor(b!) out, bool add, float multiplier, "
    "Tensor? logit_bias=None, Tensor? gate_up_bias=None, Tensor? down_bias=None, float limit=0.0, float alpha=1.0, "
    "bool gated=True) -> Tensor",
    {"cpu": Inlined(reference.mixture), "cuda": "stepgraph.ops.experts.pairs:mixture"},
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


def gated_experts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    work: ExpertWork,
    *,
    gelu: bool,
    by_row: bool = False,
    bias: Tensor | None = None,
    clamp: Clamp | None = None,
    gated: bool = True,
) -> Tensor:
    """``activation(gate(x)) · up(x)`` of each pair, accumulated in float32; of experts without gates, the square of ReLU of
    ``up(x)``. May run inside a graph.

    Args:
        x: [T, E] bfloat16, float16 or float32, contiguous.
        weight: [N, 2M, E], dtype of `x`, or float8_e4m3fn with a scale; contiguous. Of each expert, the gate comes first;
            without gates [N, M, E].
        scale: [N, 2M, G], or [N, M, G], float32; None of weights of the dtype of `x`.
        work: the pairs.
        gelu: whether the activation is GELU (by tanh), not SiLU.
        by_row: a pair's result depends, bit for bit, on its token and the weights only.
        bias: [N, 2M], dtype of `x`, added to gates and ups; None: nothing is.
        clamp: of the activation; None: it is as it says above.
        gated: whether experts have gates.

    Returns:
        [P, M], dtype of `x`: in the order of `work.order`, or else of the pairs. Rows of pairs whose experts are not here are
        unspecified.
    """
    pairs = work.expert, work.first, work.order, work.ends
    return _gated_experts(x, weight, scale, *pairs, gelu, by_row, bias, *(clamp or (0.0, 1.0)), gated)


def sum_experts(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    work: ExpertWork,
    out: Tensor,
    *,
    add: bool = False,
    multiplier: float = 1.0,
    by_row: bool = False,
    bias: Tensor | None = None,
) -> None:
    """Each token's sum over its experts of ``weight · down(hidden)``, accumulated in float32, in an order that is always the
    same; products may be rounded before. May run inside a graph.

    Args:
        hidden: [P, M], as `gated_experts` returns it.
        weight: [N, E, M], dtype of `hidden`, or float8_e4m3fn with a scale; contiguous.
        scale: [N, E, G] float32; None of weights of the dtype of `hidden`.
        work: the pairs.
        out: [T, E], dtype of `hidden`, contiguous; overwritten, with 0 where a token has no expert here, or added to.
        add: whether it is added, rounded once; tokens without an expert here leave `out` as it is.
        multiplier: of the sum.
        by_row: a token's result depends, bit for bit, on the token and the weights only.
        bias: [N, E], dtype of `hidden`, added to ``down(hidden)``; None: nothing is.
    """
    _sum_experts(
        hidden, weight, scale, work.expert, work.weight, work.first, work.order, work.ends, out, add, multiplier, by_row,
        bias,
    )  # fmt: skip


class ExpertWeights(NamedTuple):
    """Those that are kept here, as operators take them."""

    gate_up: Tensor  # [N, 2M, E], or [N, M, E], see `gated_experts`
    gate_up_scale: Tensor | None  # [N, 2M, G], or [N, M, G]
    down: Tensor  # [N, E, M], see `sum_experts`
    down_scale: Tensor | None  # [N, E, G]
    first: int  # number of the first expert
    gate_up_bias: Tensor | None = None  # [N, 2M]
    down_bias: Tensor | None = None  # [N, E]


def mixture(
    x: Tensor,
    norm: tuple[Tensor, float] | None,
    router: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    totals: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    out: Tensor,
    *,
    gelu: bool,
    add: bool = False,
    multiplier: float = 1.0,
    logit_bias: Tensor | None = None,
    clamp: Clamp | None = None,
    gated: bool = True,
) -> Tensor:
    """All of a mixture at once, for few tokens: `rms_norm`, `route`, `gated_experts` and `sum_experts` by pairs, up to the last
    bits. May run inside a graph.

    Args:
        x: [T, E] bfloat16, float16 or float32, contiguous.
        norm: weight and eps of the norm of `x`; None: `x` is normalised.
        router, bias, counts, totals, routing: as `weight` and so on of `route`.
        weights: of the experts.
        out, add, multiplier: as of `sum_experts`; `out` may be `x` if there is a norm.
        gelu, clamp, gated: as of `gated_experts`.
        logit_bias: as of `route`.

    Returns:
        `x` normalised.
    """
    norm_weight, eps = norm or (None, 0.0)
    *operands, gate_up_bias, down_bias = weights
    normed = _mixture(
        x, norm_weight, eps, router, bias, counts, totals, *astuple(routing), *operands, gelu, out, add, multiplier,
        logit_bias, gate_up_bias, down_bias, *(clamp or (0.0, 1.0)), gated,
    )  # fmt: skip
    return x if norm is None else normed
