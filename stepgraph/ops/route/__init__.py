"""Which experts of a mixture each token goes to, and with which weights."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple

from torch import Tensor

from stepgraph.ops.registry import Inlined, register
from stepgraph.ops.route import cpu

_route = register(
    "route(Tensor x, Tensor weight, Tensor? bias, Tensor counts, Tensor(a!) totals, int top, bool sigmoid, bool normalise, "
    "float least_sum, float scale, int groups, int kept_groups, int group_top, Tensor? logit_bias=None, "
    "Tensor? expert_scale=None) -> (Tensor, Tensor)",
    {"cpu": Inlined(cpu.route, cpu.route_natively), "cuda": "stepgraph.ops.route.triton:route"},
)


@dataclass(frozen=True)
class Routing:
    """How a model's routers choose.

    The score of an expert is the softmax, over all experts, or the sigmoid of its logit. Softmax over the chosen alone is
    softmax over all, normalised.
    """

    top: int
    """Experts of a token."""
    sigmoid: bool = False
    normalise: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    least_sum: float = 0.0
    """Where their sum is less, what they are divided by."""
    scale: float = 1.0
    """Of the weights, at the end."""
    groups: int = 1
    """In which the experts lie, equally many in each."""
    kept_groups: int = 1
    """Of a token: those with the highest scores. Its experts are of these."""
    group_top: int = 2
    """A group's score is the sum of so many of its highest."""


class Chosen(NamedTuple):
    """The experts of each token."""

    expert: Tensor
    """[T, K] int32, by descending score; of padding tokens the number of experts, which is none."""
    weight: Tensor
    """[T, K] float32; of padding tokens 0."""


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    totals: Tensor,
    routing: Routing,
    logit_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
) -> Chosen:
    """Choose each token's experts. Logits, scores and weights are of float32. Of equal scores, the expert with the lower number
    is chosen. A token's result depends, bit for bit, on the token alone. May run inside a graph.

    Shapes: T tokens in B blocks of equal length, E hidden size, N experts, K chosen of a token.

    Args:
        x: [T, E] bfloat16, float16 or float32, contiguous. Padding tokens may hold anything, NaN too.
        weight: [N, E] float32, contiguous.
        bias: [N] float32, of scores where experts and groups are chosen, and not of weights; or None.
        counts: [B] int32: so many tokens of each block, the first ones, are tokens; the others are padding.
        totals: [N] int64; the number of tokens that chose each expert is added.
        routing: how.
        logit_bias: [N] float32, added to logits; None: nothing is.
        expert_scale: [N] float32, what the weight of each expert is multiplied by at the very end; None: nothing.

    Source: Shazeer et al., "Outrageously Large Neural Networks" (2017); groups and bias: DeepSeek-AI, "DeepSeek-V3 Technical
    Report" (2024).
    """
    expert_TK, weight_TK = _route(x, weight, bias, counts, totals, *astuple(routing), logit_bias, expert_scale)
    return Chosen(expert_TK, weight_TK)
