"""Which experts the pairs of few tokens go to: known, or what the router's logits choose, found out by whoever needs it.

Shapes: T tokens, K experts of a token, N experts of the layer, S slices of logits, R rows of a choice, one for each warp and all
the same, so that no warp waits for another.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.route import Routing
from stepgraph.ops.route.triton import choose, is_token, load_logits


@triton.jit
def chosen(
    logits_ptr,
    bias_ptr,
    counts_ptr,
    token,
    T,
    blocks,
    rounds,
    least_sum,
    scale,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    TOP: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`choose` for one token: experts and weights [TOP_BLOCK], and the last round's expert. A padding token's are N."""
    number_N = tl.arange(0, BLOCK_N)
    token_R = token + tl.zeros([ROWS], tl.int32)
    inside_RN = (token_R < T)[:, None] & (number_N < N)[None, :]
    counts = is_token(counts_ptr, token, T, blocks)
    # Every warp loads the logits: with one load for all, whose parts are added up between warps, a layer took 3 us more.
    logit_RN = tl.where(counts, load_logits(logits_ptr, token_R, inside_RN, number_N, T, N, SLICES), 0.0)
    expert_RK, weight_RK, last_R = choose(
        logit_RN,
        number_N,
        bias_ptr,
        rounds,
        N,
        TOP,
        TOP_BLOCK,
        SIGMOID,
        NORMALISE,
        least_sum,
        scale,
        GROUPS,
        KEPT_GROUPS,
        GROUP_TOP,
    )
    expert_K, weight_K = tl.max(expert_RK, axis=0), tl.max(weight_RK, axis=0)
    return tl.where(counts, expert_K, N), weight_K, tl.where(counts, tl.max(last_R, axis=0), N)


ONE = Routing(1)


@dataclass(frozen=True)
class Choice:
    """What the experts of tokens are, or come from."""

    expert: Tensor | None = None  # [T, K] int32
    weight: Tensor | None = None  # [T, K] float32
    logits: Tensor | None = None  # [S, T, N] float32, where there is no `expert`
    bias: Tensor | None = None
    counts: Tensor | None = None
    totals: Tensor | None = None
    routing: Routing = ONE

    def options(self, num_warps: int) -> dict[str, int | bool]:
        """Compile-time arguments of kernels that choose."""
        slices, num_experts = (1, 1) if self.logits is None else (self.logits.shape[0], self.logits.shape[2])
        return {
            "N": num_experts,
            "SLICES": slices,
            "TOP": self.routing.top,
            "SIGMOID": self.routing.sigmoid,
            "GROUPS": self.routing.groups,
            "KEPT_GROUPS": self.routing.kept_groups,
            "GROUP_TOP": self.routing.group_top,
            "BLOCK_N": triton.next_power_of_2(num_experts),
            "ROWS": num_warps,
        }

    @property
    def blocks(self) -> int:
        """Of tokens, with a count each."""
        return 1 if self.counts is None else self.counts.shape[0]
