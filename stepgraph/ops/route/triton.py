"""Triton kernels of `route`: logits on tensor cores, as exact as in float32, and a choice for each token.

Tensor cores take 11 bits of a float32. A weight is the sum of two such numbers, up to 2^-24 of it, which is what float32 rounds
anyway; activations of 16 bits are one such number (of float32, two). Every sum runs over slices of the inputs, and over the
slices in order, whatever the number of tokens: few tokens have a program for each slice, and whoever reads the logits adds up.

Shapes: T tokens, N experts, E hidden size, K inputs of a block, R rows of a choice, one token each, G groups of experts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.rms_norm.triton import scale_rounded

BLOCK_K = 128
"""Inputs of one product; a slice is a multiple."""
MAX_SLICES = 16
"""Whoever adds up has this many loads under way."""
FEW_EXPERTS, FEW_TOKENS = 16, 16
"""Of a program that has one slice of the inputs."""


@dataclass(frozen=True)
class LogitsTile:
    """What a program computes that has all inputs. Fewer than 64 experts, which are the rows of its products, keep Triton to the
    instruction of a slice's program, and so to its bits."""

    tokens: int
    experts: int
    num_stages: int


MANY = LogitsTile(tokens=32, experts=16, num_stages=3)
MOST = LogitsTile(tokens=64, experts=32, num_stages=2)
CHOSEN_TOKENS = 4
"""Of a program that chooses, whatever their number: another one might add up the scores in another order."""

_LOWEST = tl.constexpr(-(1 << 31))
_LAST = tl.constexpr((1 << 31) - 1)


@triton.jit
def _pieces(values):
    """A float32 as the sum of two whose 13 last bits are zero."""
    high = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    rest = (values - high).to(tl.int32, bitcast=True)
    return high, ((rest + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _add_products(weight_NK, x_TK, high_NT, low_NT):
    """Add a block of inputs to the two parts of the sums, large and small."""
    high_NK, low_NK = _pieces(weight_NK)
    if x_TK.dtype == tl.float32:
        x_high_TK, x_low_TK = _pieces(x_TK)
        low_NT = tl.dot(high_NK, tl.trans(x_low_TK), low_NT, input_precision="tf32")
    else:
        x_high_TK = x_TK.to(tl.float32)
    x_KT = tl.trans(x_high_TK)
    return (
        tl.dot(high_NK, x_KT, high_NT, input_precision="tf32"),
        tl.dot(low_NK, x_KT, low_NT, input_precision="tf32"),
    )


@launched
@triton.jit(do_not_specialize=["T"])
def _few_logits_kernel(
    x_ptr,
    norm_ptr,  # None: x as it is
    normed_ptr,  # where x is stored normalised, if it is
    weight_ptr,
    bias_ptr,  # None: none
    logits_ptr,  # [slices, T, N] float32
    eps,
    T,
    N: tl.constexpr,
    E: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM_K: tl.constexpr,
):
    """One program per block of experts, slice of the inputs and block of tokens."""
    blocks_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    slice = tl.program_id(0) // blocks_N
    expert_N = tl.program_id(0) % blocks_N * BLOCK_N + tl.arange(0, BLOCK_N)
    token_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T, inside_N = token_T < T, expert_N < N
    input_K = slice * SLICE + tl.arange(0, BLOCK_K)
    weight_NK = weight_ptr + expert_N[:, None] * E + input_K[None, :]
    x_TK = x_ptr + token_T.to(tl.int64)[:, None] * E
    first_NK = tl.load(weight_NK, mask=inside_N[:, None] & (input_K < E)[None, :], other=0.0)
    wait_for_previous()
    if norm_ptr is not None:
        square_TK = tl.zeros([BLOCK_T, NORM_K], tl.float32)
        all_K = tl.arange(0, NORM_K)
        for start in tl.static_range(0, E, NORM_K):
            inside_TK = inside_T[:, None] & (start + all_K < E)[None, :]
            x = tl.load(x_TK + start + all_K[None, :], mask=inside_TK, other=0.0).to(tl.float32)
            square_TK += x * x
        inverse_T = tl.rsqrt(tl.sum(square_TK, axis=1) / E + eps)
    high_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    low_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.static_range(0, SLICE, BLOCK_K):
        inside_K = start + input_K < E
        inside_TK = inside_T[:, None] & inside_K[None, :]
        block_NK = first_NK
        if start > 0:
            block_NK = tl.load(weight_NK + start, mask=inside_N[:, None] & inside_K[None, :], other=0.0)
        x = tl.load(x_TK + start + input_K[None, :], mask=inside_TK, other=0.0)
        if norm_ptr is not None:
            norm_K = tl.load(norm_ptr + start + input_K, mask=inside_K, other=0.0)
            x = scale_rounded(x.to(tl.float32), inverse_T[:, None], norm_K[None, :]).to(x.dtype)
            normed_TK = normed_ptr + token_T.to(tl.int64)[:, None] * E + start + input_K[None, :]
            tl.store(normed_TK, x, mask=inside_TK & (tl.program_id(0) % blocks_N == 0))
        high_NT, low_NT = _add_products(block_NK, x, high_NT, low_NT)
    logits_NT = logits_ptr + (slice * T + token_T).to(tl.int64)[None, :] * N + expert_N[:, None]
    logit_NT = high_NT + low_NT
    if bias_ptr is not None:  # the first slice has it
        logit_NT += tl.load(bias_ptr + expert_N, mask=inside_N & (slice == 0), other=0.0)[:, None]
    tl.store(logits_NT, logit_NT, mask=inside_N[:, None] & inside_T[None, :])


@launched
@triton.jit(do_not_specialize=["T"])
def _many_logits_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None: none
    logits_ptr,  # [T, N] float32
    T,
    N: tl.constexpr,
    E: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per block of experts and of tokens."""
    expert_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T, inside_N = token_T < T, expert_N < N
    input_K = tl.arange(0, BLOCK_K)
    weight_NK = weight_ptr + expert_N[:, None] * E + input_K[None, :]
    x_TK = x_ptr + token_T.to(tl.int64)[:, None] * E + input_K[None, :]
    wait_for_previous()
    sum_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + expert_N, mask=inside_N, other=0.0)[:, None]
    high_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    low_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(0, E, BLOCK_K):
        inside_K = start + input_K < E
        if SLICE == BLOCK_K:
            high_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            low_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        else:  # what is there is of the slice before, if this block is a slice's first
            is_first = start % SLICE == 0
            sum_NT += tl.where(is_first, high_NT + low_NT, 0.0)
            high_NT = tl.where(is_first, 0.0, high_NT)
            low_NT = tl.where(is_first, 0.0, low_NT)
        high_NT, low_NT = _add_products(
            tl.load(weight_NK + start, mask=inside_N[:, None] & inside_K[None, :], other=0.0),
            tl.load(x_TK + start, mask=inside_T[:, None] & inside_K[None, :], other=0.0),
            high_NT,
            low_NT,
        )
        if SLICE == BLOCK_K:
            sum_NT += high_NT + low_NT
    if SLICE != BLOCK_K:
        sum_NT += high_NT + low_NT
    logits_NT = logits_ptr + token_T.to(tl.int64)[None, :] * N + expert_N[:, None]
    tl.store(logits_NT, sum_NT, mask=inside_N[:, None] & inside_T[None, :])


@triton.jit
def load_logits(logits_ptr, token_R, inside_RN, number_N, T, N: tl.constexpr, SLICES: tl.constexpr):
    """Logits of these tokens, [R, N] float32: the sums over the slices, in order."""
    logit_RN = logits_ptr + token_R.to(tl.int64)[:, None] * N + number_N[None, :]
    sum_RN = tl.load(logit_RN, mask=inside_RN, other=0.0)
    for slice in tl.static_range(1, SLICES):
        sum_RN += tl.load(logit_RN + tl.cast(T, tl.int64) * (slice * N), mask=inside_RN, other=0.0)
    return sum_RN


@triton.jit
def _sortable(values):
    """Integers in the order of these float32; zeros of both signs are equal."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float(sortable):
    return (sortable ^ ((sortable >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_highest(sortable_RN, number_N):
    """Number of each row's highest, the first of equal ones, and what it is: two [R] int32."""
    highest_R = tl.max(sortable_RN, axis=1)
    return tl.min(tl.where(sortable_RN == highest_R[:, None], number_N[None, :], _LAST), axis=1), highest_R


@triton.jit
def choose(
    logit_RN,
    number_N,
    bias_ptr,
    rounds,  # so many of TOP
    N: tl.constexpr,
    TOP: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    least_sum,
    scale,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
):
    """The experts of each row, in `rounds` rounds: those of all, [R, TOP_BLOCK], with -1 where there is none, their weights,
    which are right after TOP rounds, and that of the last round, [R].

    Without a bias, experts are in the order of their logits, which is that of the scores."""
    inside_N = number_N < N
    if SIGMOID:
        score_RN = 1.0 / (1.0 + tl.exp(-logit_RN))
    else:
        highest_R = tl.max(tl.where(inside_N[None, :], logit_RN, -float("inf")), axis=1)
        power_RN = tl.where(inside_N[None, :], tl.exp(logit_RN - highest_R[:, None]), 0.0)
        score_RN = power_RN / tl.sum(power_RN, axis=1)[:, None]
    if bias_ptr is not None:
        ranked_RN = score_RN + tl.load(bias_ptr + number_N, mask=inside_N, other=0.0)[None, :]
    elif GROUPS > 1:
        ranked_RN = score_RN
    else:
        ranked_RN = logit_RN
    sortable_RN = tl.where(inside_N[None, :], _sortable(ranked_RN), _LOWEST)
    if GROUPS > 1:
        group_N = number_N // (N // GROUPS)
        group_G = tl.arange(0, triton.next_power_of_2(GROUPS))
        group_score_RG = tl.full([logit_RN.shape[0], group_G.shape[0]], -float("inf"), tl.float32)
        for group in range(GROUPS):
            left_RN = tl.where((group_N == group)[None, :], sortable_RN, _LOWEST)
            sum_R = tl.zeros([logit_RN.shape[0]], tl.float32)
            for _ in tl.static_range(GROUP_TOP):
                first_R, found_R = _first_highest(left_RN, number_N)
                sum_R += _float(found_R)
                left_RN = tl.where(number_N[None, :] == first_R[:, None], _LOWEST, left_RN)
            group_score_RG = tl.where(group_G[None, :] == group, sum_R[:, None], group_score_RG)
        left_RG = tl.where((group_G < GROUPS)[None, :], _sortable(group_score_RG), _LOWEST)
        kept_RN = sortable_RN != sortable_RN
        for _ in tl.static_range(KEPT_GROUPS):
            first_R, found_R = _first_highest(left_RG, group_G)
            left_RG = tl.where(group_G[None, :] == first_R[:, None], _LOWEST, left_RG)
            kept_RN = kept_RN | (group_N[None, :] == first_R[:, None])
        out_of_groups = _LOWEST + 1  # before what is beyond the last expert, or chosen already
        sortable_RN = tl.where(kept_RN | ~inside_N[None, :], sortable_RN, out_of_groups)
    place_K = tl.arange(0, TOP_BLOCK)
    expert_RK = tl.full([logit_RN.shape[0], TOP_BLOCK], -1, tl.int32)
    weight_RK = tl.zeros([logit_RN.shape[0], TOP_BLOCK], tl.float32)
    sum_R = tl.zeros([logit_RN.shape[0]], tl.float32)
    expert_R = tl.zeros([logit_RN.shape[0]], tl.int32)
    for place in range(rounds):
        expert_R, found_R = _first_highest(sortable_RN, number_N)
        is_chosen_RN = number_N[None, :] == expert_R[:, None]
        weight_R = tl.sum(tl.where(is_chosen_RN, score_RN, 0.0), axis=1)
        sum_R += weight_R
        sortable_RN = tl.where(is_chosen_RN, _LOWEST, sortable_RN)
        expert_RK = tl.where(place_K[None, :] == place, expert_R[:, None], expert_RK)
        weight_RK = tl.where(place_K[None, :] == place, weight_R[:, None], weight_RK)
    if NORMALISE:
        weight_RK = weight_RK / tl.maximum(sum_R, least_sum)[:, None]
    return expert_RK, weight_RK * scale, expert_R


@triton.jit
def is_token(counts_ptr, token, T, blocks):
    """Whether these are tokens, not padding."""
    length = T // blocks
    return token % length < tl.load(counts_ptr + token // length, mask=token < T, other=0)


@launched
@triton.jit(do_not_specialize=["T", "blocks"])
def _choose_kernel(
    logits_ptr,
    bias_ptr,
    expert_scale_ptr,  # None: none
    counts_ptr,
    totals_ptr,
    expert_ptr,
    weight_ptr,
    T,
    blocks,
    least_sum,
    scale,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
):
    """One program per BLOCK_R tokens."""
    token_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    number_N = tl.arange(0, BLOCK_N)
    place_K = tl.arange(0, TOP_BLOCK)
    wait_for_previous()
    is_token_R = is_token(counts_ptr, token_R, T, blocks)
    inside_RN = is_token_R[:, None] & (number_N < N)[None, :]
    expert_RK, weight_RK, _ = choose(
        load_logits(logits_ptr, token_R, inside_RN, number_N, T, N, SLICES),
        number_N,
        bias_ptr,
        TOP,
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
    place_RK = token_R.to(tl.int64)[:, None] * TOP + place_K[None, :]
    inside_RK = (token_R < T)[:, None] & (place_K < TOP)[None, :]
    if expert_scale_ptr is not None:
        weight_RK *= tl.load(expert_scale_ptr + expert_RK, mask=inside_RK & is_token_R[:, None], other=0.0)
    tl.store(expert_ptr + place_RK, tl.where(is_token_R[:, None], expert_RK, N), mask=inside_RK)
    tl.store(weight_ptr + place_RK, tl.where(is_token_R[:, None], weight_RK, 0.0), mask=inside_RK)
    tl.atomic_add(totals_ptr + expert_RK, 1, mask=inside_RK & is_token_R[:, None], sem="relaxed")


def write_logits(
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, float] | None = None,
    *,
    bias: Tensor | None = None,
    tile: LogitsTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and the tokens that they are of. May run inside a graph.

    Args:
        x: [T, E], contiguous.
        weight: [N, E] float32, contiguous.
        norm: weight and eps of an RMS norm of `x`; None: no norm.
        bias: [N] float32, added to logits; None: nothing is.
        tile: of programs that have all inputs of their tokens, which then have no norm; None: they have a slice.

    Returns:
        [S, T, N] float32, to be added up in order; `x` after the norm.
    """
    (T, E), N = x.shape, weight.shape[0]
    slice_size = BLOCK_K * triton.cdiv(E, BLOCK_K * MAX_SLICES)
    if tile is not None:
        logits = x.new_empty(1, T, N, dtype=torch.float32)
        _many_logits_kernel[(triton.cdiv(N, tile.experts), triton.cdiv(T, tile.tokens))](
            x,
            weight,
            bias,
            logits,
            T,
            N=N,
            E=E,
            SLICE=slice_size,
            BLOCK_T=tile.tokens,
            BLOCK_N=tile.experts,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=tile.num_stages,
            **LAUNCH,
        )
        return logits, x
    slices = triton.cdiv(E, slice_size)
    logits = x.new_empty(slices, T, N, dtype=torch.float32)
    norm_weight, eps = norm or (None, 0.0)
    normed = x if norm is None else torch.empty_like(x)
    block_tokens = min(FEW_TOKENS, max(8, triton.next_power_of_2(T)))
    _few_logits_kernel[(triton.cdiv(N, FEW_EXPERTS) * slices, triton.cdiv(T, block_tokens))](
        x,
        norm_weight,
        normed,
        weight,
        bias,
        logits,
        eps,
        T,
        N=N,
        E=E,
        SLICE=slice_size,
        BLOCK_T=block_tokens,
        BLOCK_N=FEW_EXPERTS,
        BLOCK_K=BLOCK_K,
        NORM_K=min(1024, triton.next_power_of_2(E)),
        num_warps=4,
        **LAUNCH,
    )
    return logits, normed


def choose_tile(num_tokens: int) -> LogitsTile | None:
    """For so many. Of all, a token's logits have the same bits. On an H200, hidden size 2,048, 128 experts, in us: slices take
    2.5, 8.7, 15 and 28 for 16, 128, 256 and 512 tokens, `MANY` 12 and 30 for 256 and 2,048, `MOST` 23 and 24."""
    if num_tokens <= 160:
        return None
    return MANY if num_tokens <= 1024 else MOST


def route(
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
) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.route.route`."""
    (T, _), N = x.shape, weight.shape[0]
    logits, _ = write_logits(x, weight, bias=logit_bias, tile=choose_tile(T))
    expert = x.new_empty(T, top, dtype=torch.int32)
    pair_weight = x.new_empty(T, top, dtype=torch.float32)
    _choose_kernel[(triton.cdiv(T, CHOSEN_TOKENS),)](
        logits,
        bias,
        expert_scale,
        counts,
        totals,
        expert,
        pair_weight,
        T,
        counts.shape[0],
        least_sum,
        scale,
        N=N,
        SLICES=logits.shape[0],
        TOP=top,
        SIGMOID=sigmoid,
        NORMALISE=normalise,
        GROUPS=groups,
        KEPT_GROUPS=kept_groups,
        GROUP_TOP=group_top,
        BLOCK_R=CHOSEN_TOKENS,
        BLOCK_N=triton.next_power_of_2(N),
        TOP_BLOCK=triton.next_power_of_2(top),
        num_warps=4,
        **LAUNCH,
    )
    return expert, pair_weight
