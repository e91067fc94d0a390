"""`gated_experts` and `sum_experts` with weights of 4 bits, see `stepgraph.ops.experts` and `stepgraph.ops.four_bit_linear`.

Shapes: T tokens, K experts of a token, P = T·K pairs, N experts that are kept here, E hidden size, M width of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stepgraph.ops.four_bit_experts import cpu
from stepgraph.ops.four_bit_linear.reference import FourBitWeight
from stepgraph.ops.registry import register
from stepgraph.ops.swiglu import Clamp

if TYPE_CHECKING:
    from stepgraph.ops.experts import ExpertWork

_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero, Tensor? factor, int group_size, bool is_e2m1"

_four_bit_gated_experts = register(
    f"four_bit_gated_experts(Tensor x, {_WEIGHT}, Tensor expert, int first, Tensor? order, Tensor? ends, bool gelu, bool by_row, "
    "Tensor? bias, float limit, float alpha, bool gated) -> Tensor",
    {"cpu": cpu.four_bit_gated_experts, "cuda": "stepgraph.ops.four_bit_experts.triton:four_bit_gated_experts"},
)
_four_bit_sum_experts = register(
    f"four_bit_sum_experts(Tensor hidden, {_WEIGHT}, Tensor expert, Tensor pair_weight, int first, Tensor? order, Tensor? ends, "
    "Tensor(a!) out, bool add, float multiplier, bool by_row, Tensor? bias) -> ()",
    {"cpu": cpu.four_bit_sum_experts, "cuda": "stepgraph.ops.four_bit_experts.triton:four_bit_sum_experts"},
)


def four_bit_gated_experts(
    x: Tensor,
    weight: FourBitWeight,
    work: ExpertWork,
    *,
    gelu: bool,
    by_row: bool = False,
    bias: Tensor | None = None,
    clamp: Clamp | None = None,
    gated: bool = True,
) -> Tensor:
    """`stepgraph.ops.experts.gated_experts` with dequantised weights, rounded to the dtype of `x`. May run inside a graph.

    Args:
        x, work, gelu, by_row, bias, clamp, gated: as there.
        weight: its tensors with a dimension before for the experts: codes [N, 2M, …], without gates [N, M, …].

    Returns:
        [P, M], as there.
    """
    pairs = work.expert, work.first, work.order, work.ends
    return _four_bit_gated_experts(x, *weight, *pairs, gelu, by_row, bias, *(clamp or (0.0, 1.0)), gated)


def four_bit_sum_experts(
    hidden: Tensor,
    weight: FourBitWeight,
    work: ExpertWork,
    out: Tensor,
    *,
    add: bool = False,
    multiplier: float = 1.0,
    by_row: bool = False,
    bias: Tensor | None = None,
) -> None:
    """`stepgraph.ops.experts.sum_experts`; likewise. May run inside a graph.

    Args:
        hidden, work, out, add, multiplier, by_row, bias: as there.
        weight: codes [N, E, …] and so on.
    """
    pairs = work.expert, work.weight, work.first, work.order, work.ends
    _four_bit_sum_experts(hidden, *weight, *pairs, out, add, multiplier, by_row, bias)
