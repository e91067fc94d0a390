"""`route` on the CPU: our own kernel where it takes the weight, else the reference, which is as right and reads `counts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.packed import BLOCK
from stepgraph.ops.route import reference

_route = native.declare(
    "route(Tensor x, Tensor weight, Tensor bias, Tensor counts, int top, int sigmoid, int normalise, float least_sum, "
    "float scale, int groups, int kept_groups, int group_top, Tensor(a!) totals, Tensor(b!) expert, Tensor(c!) pair_weight, "
    "Tensor? logit_bias=None) -> ()"
)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, totals: Tensor, *routing: Any
) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.route.route`."""
    found: tuple[Tensor, Tensor] = route_natively(x, weight, bias, counts, totals, *routing)
    return reference.route(x, weight, bias, counts, totals, *routing) if found is NotImplemented else found


def route_natively(
    x: Tensor,
    weight: Tensor,
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
    logit_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
) -> Any:
    """`route` by our own kernel, as a recording may hold it; NotImplemented where it does not take the weight."""
    if x.shape[1] % BLOCK or not native.available():
        return NotImplemented
    expert_TK = torch.empty(x.shape[0], top, dtype=torch.int32)
    weight_TK = torch.empty(x.shape[0], top)
    bias_N = torch.empty(0) if bias is None else bias
    routing = top, sigmoid, normalise, least_sum, scale, groups, kept_groups, group_top
    _route(x.float(), weight, bias_N, counts, *routing, totals, expert_TK, weight_TK, logit_bias)
    return expert_TK, reference.scaled(weight_TK, expert_TK, expert_scale)
