"""Triton kernels of experts for few tokens: each pair of a token and an expert is a read of the expert's weights.

Products are multiplied and added up on the way from memory. Pairs that share an expert read it at about the same time, so that
all but one find it in the L2 cache. Whole, from the stream of residuals to what is added to it, a mixture is three kernels: the
router's logits, of the tokens normalised; gate and up; down. The last two find out for themselves which experts the logits
choose, which takes less than a kernel of its own; the last one does so, and has its first weights under way, before the other one
ends.

Shapes: T tokens, K experts of a token, P = T·K pairs, N experts of the layer, E hidden size, M width of an expert, I inputs of a
block.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.experts.choice import Choice, chosen
from stepgraph.ops.fp8_linear.reference import GROUP_SIZE
from stepgraph.ops.launched import launched
from stepgraph.ops.relu2.triton import squared_relu
from stepgraph.ops.route import Routing
from stepgraph.ops.route.triton import write_logits
from stepgraph.ops.swiglu.triton import gated
from stepgraph.platforms.kernels import kernel_tuning
from stepgraph.platforms.tuning import PairTile

TUNING = kernel_tuning()


@launched
@triton.jit(do_not_specialize=["T", "blocks", "first"])
def _gated_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    own_bias_ptr,  # of experts; None: they have none
    expert_ptr,  # None: those that the logits choose
    logits_ptr,
    bias_ptr,
    counts_ptr,
    totals_ptr,
    out_ptr,
    T,
    blocks,
    first,
    COUNT: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    GROUPS_I: tl.constexpr,  # scales of an output; 0: none
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,  # of `gated`
    ALPHA: tl.constexpr,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    CHUNK: tl.constexpr,  # inputs under way
):
    """One program per pair and BLOCK_M outputs; those of the same outputs of all pairs are neighbours."""
    pair = tl.program_id(0)
    token = pair // TOP
    place_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = place_M < M
    input_I = tl.arange(0, BLOCK_I)
    wait_for_previous()
    if expert_ptr is not None:
        expert = tl.load(expert_ptr + pair)
    else:
        _expert_K, _weight_K, expert = chosen(
            logits_ptr,
            bias_ptr,
            counts_ptr,
            token,
            T,
            blocks,
            pair % TOP + 1,
            0.0,
            1.0,
            N,
            SLICES,
            TOP,
            1,
            SIGMOID,
            False,
            GROUPS,
            KEPT_GROUPS,
            GROUP_TOP,
            BLOCK_N,
            ROWS,
        )
        tl.atomic_add(totals_ptr + expert, 1, mask=(tl.program_id(1) == 0) & (expert < N), sem="relaxed")
    place = expert - first
    if (place >= 0) & (place < COUNT):
        ROWS_M: tl.constexpr = 2 * M if GATED else M
        gate_MI = weight_ptr + place.to(tl.int64) * (ROWS_M * E) + place_M[:, None] * E + input_I[None, :]
        # Every warp loads the inputs that it takes, from cache: sharing one load would have all wait for each other.
        x_MI = x_ptr + token.to(tl.int64) * E + input_I[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
        gate_sum_MI = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
        up_sum_MI = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
        if GROUPS_I > 0:
            scale_M = scale_ptr + place.to(tl.int64) * (ROWS_M * GROUPS_I) + place_M * GROUPS_I
        for chunk in range(0, E, CHUNK):
            for step in tl.static_range(0, CHUNK, BLOCK_I):
                start = chunk + step
                inside_I = start + input_I < E
                inside_MI = inside_M[:, None] & inside_I[None, :]
                x = tl.load(x_MI + start, mask=inside_MI, other=0.0).to(tl.float32)
                product_MI = tl.load(gate_MI + start, mask=inside_MI, other=0.0).to(tl.float32) * x
                if GATED:
                    up_MI = tl.load(gate_MI + M * E + start, mask=inside_MI, other=0.0).to(tl.float32) * x
                if GROUPS_I > 1:
                    group = start // BLOCK_I
                    inside = inside_M & (group < GROUPS_I)
                    product_MI *= tl.load(scale_M + group, mask=inside, other=0.0)[:, None]
                    if GATED:
                        up_MI *= tl.load(scale_M + M * GROUPS_I + group, mask=inside, other=0.0)[:, None]
                gate_sum_MI += product_MI
                if GATED:
                    up_sum_MI += up_MI
        gate_M, up_M = tl.sum(gate_sum_MI, axis=1), tl.sum(up_sum_MI, axis=1)
        if GROUPS_I == 1:
            gate_M *= tl.load(scale_M, mask=inside_M, other=0.0)
            if GATED:
                up_M *= tl.load(scale_M + M, mask=inside_M, other=0.0)
        if own_bias_ptr is not None:
            own_bias_M = own_bias_ptr + place.to(tl.int64) * ROWS_M + place_M
            gate_M += tl.load(own_bias_M, mask=inside_M, other=0.0).to(tl.float32)
            if GATED:
                up_M += tl.load(own_bias_M + M, mask=inside_M, other=0.0).to(tl.float32)
        out_M = out_ptr + pair.to(tl.int64) * M + place_M
        hidden_M = gated(gate_M, up_M, GELU, LIMIT, ALPHA) if GATED else squared_relu(gate_M)
        tl.store(out_M, hidden_M.to(out_ptr.dtype.element_ty), mask=inside_M)


@launched
@triton.jit(do_not_specialize=["T", "blocks", "first"])
def _sum_kernel(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    own_bias_ptr,  # of experts; None: they have none
    expert_ptr,  # None: those that the logits choose
    pair_weight_ptr,
    logits_ptr,
    bias_ptr,
    counts_ptr,
    out_ptr,
    T,
    blocks,
    first,
    multiplier,
    least_sum,
    scale,
    COUNT: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    GROUPS_I: tl.constexpr,  # scales of an output; 0: none
    ADD: tl.constexpr,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    CHUNK: tl.constexpr,  # inputs under way
):
    """One program per token and BLOCK_E outputs; those of the same outputs of all tokens are neighbours. What chose the experts
    is older than the previous kernel, which is the one that computed their gates."""
    token = tl.program_id(0)
    place_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    place_K = tl.arange(0, TOP_BLOCK)
    input_I = tl.arange(0, BLOCK_I)
    if expert_ptr is not None:
        expert_K = tl.load(expert_ptr + token * TOP + place_K, mask=place_K < TOP, other=-1)
        weight_K = tl.load(pair_weight_ptr + token * TOP + place_K, mask=place_K < TOP, other=0.0)
    else:
        expert_K, weight_K, _last = chosen(
            logits_ptr,
            bias_ptr,
            counts_ptr,
            token,
            T,
            blocks,
            TOP,
            least_sum,
            scale,
            N,
            SLICES,
            TOP,
            TOP_BLOCK,
            SIGMOID,
            NORMALISE,
            GROUPS,
            KEPT_GROUPS,
            GROUP_TOP,
            BLOCK_N,
            ROWS,
        )
    local_K = expert_K - first
    here_K = (local_K >= 0) & (local_K < COUNT) & (place_K < TOP)
    inside_E = place_E < E
    here_EK = inside_E[:, None] & here_K[None, :]
    row_EK = local_K.to(tl.int64)[None, :] * E + place_E[:, None]
    weight_EKI = weight_ptr + row_EK[:, :, None] * M + input_I[None, None, :]
    inside_EKI = here_EK[:, :, None] & (input_I < M)[None, None, :]
    first_EKI = tl.load(weight_EKI, mask=inside_EKI, other=0.0)
    inside_EKI = here_EK[:, :, None] & (BLOCK_I + input_I < M)[None, None, :]
    second_EKI = tl.load(weight_EKI + BLOCK_I, mask=inside_EKI, other=0.0)
    hidden_1KI = hidden_ptr + (token * TOP + place_K).to(tl.int64)[None, :, None] * M + input_I[None, None, :]
    out_E = out_ptr + token.to(tl.int64) * E + place_E
    wait_for_previous()
    before_E = tl.load(out_E, mask=inside_E & ADD, other=0.0)
    sum_EKI = tl.zeros([BLOCK_E, TOP_BLOCK, BLOCK_I], tl.float32)
    for chunk in range(0, M, CHUNK):
        for step in tl.static_range(0, CHUNK, BLOCK_I):
            start = chunk + step
            inside_I = start + input_I < M
            inside_1KI = here_K[None, :, None] & inside_I[None, None, :]
            h_1KI = tl.load(hidden_1KI + start, mask=inside_1KI, other=0.0).to(tl.float32)
            if CHUNK >= M and step == 0:
                block_EKI = first_EKI
            elif CHUNK >= M and step == BLOCK_I:
                block_EKI = second_EKI
            else:
                inside_EKI = here_EK[:, :, None] & inside_I[None, None, :]
                block_EKI = tl.load(weight_EKI + start, mask=inside_EKI, other=0.0)
            product_EKI = block_EKI.to(tl.float32) * h_1KI
            if GROUPS_I > 1:
                group = start // BLOCK_I
                inside_EK = here_EK & (group < GROUPS_I)
                scale_EK = tl.load(scale_ptr + row_EK * GROUPS_I + group, mask=inside_EK, other=0.0)
                product_EKI *= scale_EK[:, :, None]
            sum_EKI += product_EKI
    sum_EK = tl.sum(sum_EKI, axis=2)
    if GROUPS_I == 1:
        sum_EK *= tl.load(scale_ptr + row_EK, mask=here_EK, other=0.0)
    if own_bias_ptr is not None:
        sum_EK += tl.load(own_bias_ptr + row_EK, mask=here_EK, other=0.0).to(tl.float32)
    sum_E = tl.sum(sum_EK * tl.where(here_K, weight_K, 0.0)[None, :], axis=1) * multiplier
    tl.store(out_E, (before_E.to(tl.float32) + sum_E).to(out_ptr.dtype.element_ty), mask=inside_E)


def launch_gated(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    choice: Choice,
    first: int,
    gelu: bool,
    tile: PairTile,
    bias: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    gated: bool = True,
) -> Tensor:
    """`gated_experts` in such tiles."""
    T, (count, rows, inputs) = x.shape[0], weight.shape
    pairs, width = T * choice.routing.top, rows // 2 if gated else rows
    out = x.new_empty(pairs, width)
    groups = 0 if scale is None else scale.shape[2]
    block = GROUP_SIZE if groups > 1 else min(tile.inputs, max(16, triton.next_power_of_2(inputs)))
    _gated_kernel[(pairs, triton.cdiv(width, tile.outputs))](
        x,
        weight,
        scale,
        bias,
        choice.expert,
        choice.logits,
        choice.bias,
        choice.counts,
        choice.totals,
        out,
        T,
        choice.blocks,
        first,
        COUNT=count,
        E=inputs,
        M=width,
        GROUPS_I=groups,
        GELU=gelu,
        GATED=gated,
        LIMIT=limit,
        ALPHA=alpha,
        BLOCK_M=tile.outputs,
        BLOCK_I=block,
        CHUNK=block * _loads(triton.cdiv(inputs, block), tile.loads),
        **choice.options(tile.num_warps),
        num_warps=tile.num_warps,
        **LAUNCH,
    )
    return out


def launch_sum(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    choice: Choice,
    first: int,
    out: Tensor,
    add: bool,
    multiplier: float,
    tile: PairTile,
    bias: Tensor | None = None,
) -> None:
    """`sum_experts` in such tiles."""
    T, (count, outputs, inputs) = out.shape[0], weight.shape
    groups = 0 if scale is None else scale.shape[2]
    block = GROUP_SIZE if groups > 1 else min(tile.inputs, max(16, triton.next_power_of_2(inputs)))
    _sum_kernel[(T, triton.cdiv(outputs, tile.outputs))](
        hidden,
        weight,
        scale,
        bias,
        choice.expert,
        choice.weight,
        choice.logits,
        choice.bias,
        choice.counts,
        out,
        T,
        choice.blocks,
        first,
        multiplier,
        choice.routing.least_sum,
        choice.routing.scale,
        COUNT=count,
        E=outputs,
        M=inputs,
        GROUPS_I=groups,
        ADD=add,
        NORMALISE=choice.routing.normalise,
        TOP_BLOCK=triton.next_power_of_2(choice.routing.top),
        BLOCK_E=tile.outputs,
        BLOCK_I=block,
        CHUNK=block * _loads(triton.cdiv(inputs, block), tile.loads),
        **choice.options(tile.num_warps),
        num_warps=tile.num_warps,
        **LAUNCH,
    )


def _loads(blocks: int, most: int) -> int:
    """How many of a line's blocks are under way at once, as many each time."""
    return triton.cdiv(blocks, triton.cdiv(blocks, most))


def _gated_tile(num_tokens: int, weight: Tensor) -> PairTile:
    if weight.itemsize == 1:
        return TUNING.gated_pairs_fp8
    return TUNING.gated_pairs_of_one if num_tokens == 1 else TUNING.gated_pairs


def _sum_tile(scale: Tensor | None) -> PairTile:
    return TUNING.summed_pairs if scale is None else TUNING.summed_pairs_fp8


def gated_experts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    first: int,
    gelu: bool,
    bias: Tensor | None,
    limit: float,
    alpha: float,
    gated: bool,
) -> Tensor:
    """See `stepgraph.ops.experts.gated_experts`; pairs are not sorted."""
    choice, tile = Choice(expert, routing=Routing(expert.shape[1])), _gated_tile(x.shape[0], weight)
    return launch_gated(x, weight, scale, choice, first, gelu, tile, bias, limit, alpha, gated)


def sum_experts(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    out: Tensor,
    add: bool,
    multiplier: float,
    bias: Tensor | None,
) -> None:
    """See `stepgraph.ops.experts.sum_experts`; pairs are not sorted."""
    choice = Choice(expert, pair_weight, routing=Routing(expert.shape[1]))
    launch_sum(hidden, weight, scale, choice, first, out, add, multiplier, _sum_tile(scale), bias)


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
    """See `stepgraph.ops.experts.mixture`."""
    routing = Routing(top, sigmoid, normalise, least_sum, scale, groups, kept_groups, group_top)
    norm = None if norm_weight is None else (norm_weight, eps)
    logits, normed = write_logits(x, router, norm, bias=logit_bias)
    choice = Choice(logits=logits, bias=bias, counts=counts, totals=totals, routing=routing)
    tile, scoring = _gated_tile(x.shape[0], gate_up), (gate_up_bias, limit, alpha, gated)
    hidden = launch_gated(normed, gate_up, gate_up_scale, choice, first, gelu, tile, *scoring)
    launch_sum(hidden, down, down_scale, choice, first, out, add, multiplier, _sum_tile(down_scale), down_bias)
    return normed if norm_weight is not None else x.new_empty(0)
