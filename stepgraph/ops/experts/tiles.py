"""Experts' products in tiles of pairs that share a read of their expert's weight, on tensor cores.

A constant grid covers the worst split of the pairs among the experts; each program finds its tile on the device, and those behind
the last tile do nothing. Programs of an expert are neighbours, and among them those that read the same part of its weight, so
that memory is read once: first for the gates and their partners, then for the products with the down projection, which a last
kernel adds up, a token's in the order in which its experts were chosen.

The weight is the left operand, whose rows fill a tensor-core instruction; the pairs are the right one, of which 8 do. Of 8 bits
it is widened in registers, which loses nothing; scales of whole outputs multiply the finished sum, those of groups each group's
part of it.

How a product is cut follows from the sizes alone, and what a tile adds up for one of its rows does not depend on the others: so
a token's result depends on the number of tokens and on the token; with `by_row`, on the token alone.

Shapes: T tokens, K experts of a token, P pairs, N experts, O outputs, I inputs; `_W` rows of a block of the weight, `_B` outputs
of a block, `_S` pairs of a tile, `_J` inputs of an iteration.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepgraph.ops.capacity import max_tiles
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.fp8_linear.reference import GROUP_SIZE
from stepgraph.ops.launched import launched
from stepgraph.ops.linear.ends import GEGLU, RELU2, STORE, SWIGLU
from stepgraph.ops.relu2.triton import squared_relu
from stepgraph.ops.swiglu.triton import gated
from stepgraph.platforms.kernels import kernel_tuning
from stepgraph.platforms.tuning import ExpertTile

_GROUP = tl.constexpr(GROUP_SIZE)
FLOAT32_TILE = ExpertTile(rows=16, outputs=32, inputs=32, num_warps=4, num_stages=2)
"""Not on tensor cores, which round float32: for checks rather than speed."""
BY_ROW_TILE = ExpertTile(rows=64, outputs=128, inputs=64, num_warps=4, num_stages=3)
"""One for any number of pairs, as another one might add up otherwise: wide enough for a prompt, and narrow enough for a read of
the weights to last longer than its products."""
COMBINED_OUTPUTS = 1024
"""Of a program that adds up: 128 threads load 16 bytes each of a 16-bit dtype."""
TUNING = kernel_tuning()


@triton.jit
def find_tile(ends_ptr, program, N, BLOCKS, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, TILES: tl.constexpr):
    """Which part of the work is a program's: its expert, the first of its pairs, the end of the expert's pairs, and its block of
    the weight. The end is 0 for programs behind the last tile.

    Programs of an expert come in groups of up to TILES tiles, of which all read the same block of the weight, and then the next.
    """
    expert_N = tl.arange(0, BLOCK_N)
    end_N = tl.load(ends_ptr + expert_N, mask=expert_N < N, other=0)
    begin_N = tl.load(ends_ptr + expert_N - 1, mask=(expert_N > 0) & (expert_N < N), other=0)
    tiles_N = tl.cdiv(end_N - begin_N, BLOCK_S)
    behind_N = tl.cumsum(tiles_N) * BLOCKS
    first_N = behind_N - tiles_N * BLOCKS
    mine_N = (first_N <= program) & (program < behind_N)  # of one expert, or of none
    expert = tl.sum(tl.where(mine_N, expert_N, 0))
    begin = tl.sum(tl.where(mine_N, begin_N, 0))
    end = tl.sum(tl.where(mine_N, end_N, 0))
    place = program - tl.sum(tl.where(mine_N, first_N, 0))
    group = place // (TILES * BLOCKS)
    place -= group * (TILES * BLOCKS)
    tiles = tl.maximum(tl.minimum(TILES, tl.cdiv(end - begin, BLOCK_S) - group * TILES), 1)
    return expert, begin + (group * TILES + place % tiles) * BLOCK_S, end, place // tiles


@triton.jit
def _add_product(sum_DS, block_DJ, x_JS, scale_D, inside_D, GROUPS: tl.constexpr):
    """Add a product of a block of a weight, with its scales if those are of groups. `scale_D`: pointers to them."""
    block_DJ = block_DJ.to(x_JS.dtype)
    if GROUPS > 1:
        part_DS = tl.dot(block_DJ, x_JS, out_dtype=tl.float32, input_precision="ieee")
        return sum_DS + part_DS * tl.load(scale_D, mask=inside_D, other=0.0)[:, None]
    return tl.dot(block_DJ, x_JS, sum_DS, input_precision="ieee")


@triton.jit
def _compute_tile(
    x_ptr,
    weight,
    scale_ptr,
    bias_ptr,
    order_ptr,
    out_ptr,
    expert,
    begin,
    end,
    column,
    END: tl.constexpr,
    K: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    GROUPS: tl.constexpr,
    COPIED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """The products of some pairs with BLOCK_W rows of their expert's weight, of which half are partners of gates, if it has them.

    Args:
        weight: its descriptor if COPIED, or else its pointer.
        begin, end: the first of the pairs, and the end of the expert's.
        column: the first of the outputs.
        others: see `_product_kernel`.
    """
    FIRST: tl.constexpr = END != "store"  # of an expert's two products
    GATED: tl.constexpr = END == "swiglu" or END == "geglu"
    FLAT: tl.constexpr = GATED and BLOCK_W == 64 and not COPIED  # one product, as half would not fill an instruction
    BLOCK_B: tl.constexpr = BLOCK_W // 2 if GATED else BLOCK_W
    BLOCK_D: tl.constexpr = BLOCK_W if FLAT else BLOCK_B
    place_S = begin + tl.arange(0, BLOCK_S)
    inside_S = place_S < end
    pair_S = tl.load(order_ptr + place_S, mask=inside_S, other=0)
    row_S = pair_S // K if FIRST else place_S
    matrix = expert * 2 if GATED else expert
    place_D, input_J = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_J)
    column_D = column + place_D % BLOCK_B
    row_D = (matrix + place_D // BLOCK_B).to(tl.int64) * O + column_D
    inside_D = column_D < O
    scale_D = scale_ptr + row_D * GROUPS if GROUPS > 0 else row_D
    weight_DJ = row_D if COPIED else weight + row_D[:, None] * I + input_J[None, :]
    x_JS = x_ptr + row_S.to(tl.int64)[None, :] * I + input_J[:, None]
    sum_DS = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    up_DS = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    for start in tl.range(0, I, BLOCK_J, num_stages=STAGES):
        group = start // _GROUP
        inside_JS, inside_DJ = inside_S[None, :], inside_D[:, None]
        if I % BLOCK_J != 0:
            inside_J = start + input_J < I
            inside_JS, inside_DJ = inside_JS & inside_J[:, None], inside_DJ & inside_J[None, :]
        rows_JS = tl.load(x_JS + start, mask=inside_JS, other=0.0)
        if COPIED:
            block = tl.reshape(weight.load([matrix, column, start]), [BLOCK_D, BLOCK_J])
        else:
            block = tl.load(weight_DJ + start, mask=inside_DJ, other=0.0)
        sum_DS = _add_product(sum_DS, block, rows_JS, scale_D + group, inside_D, GROUPS)
        if GATED and not FLAT:
            if COPIED:
                block = tl.reshape(weight.load([matrix + 1, column, start]), [BLOCK_D, BLOCK_J])
            else:
                block = tl.load(weight_DJ + O * I + start, mask=inside_DJ, other=0.0)
            up_DS = _add_product(up_DS, block, rows_JS, scale_D + O * GROUPS + group, inside_D, GROUPS)
    if GROUPS == 1:
        sum_DS *= tl.load(scale_D, mask=inside_D, other=0.0)[:, None]
        if GATED and not FLAT:
            up_DS *= tl.load(scale_D + O, mask=inside_D, other=0.0)[:, None]
    if bias_ptr is not None:
        sum_DS += tl.load(bias_ptr + row_D, mask=inside_D, other=0.0).to(tl.float32)[:, None]
        if GATED and not FLAT:
            up_DS += tl.load(bias_ptr + row_D + O, mask=inside_D, other=0.0).to(tl.float32)[:, None]
    if FLAT:
        sum_DS, up_DS = tl.split(tl.permute(tl.reshape(sum_DS, [2, BLOCK_B, BLOCK_S]), 1, 2, 0))
    column_B = column + tl.arange(0, BLOCK_B)
    row_S = place_S if FIRST else pair_S
    out_BS = out_ptr + row_S.to(tl.int64)[None, :] * O + column_B[:, None]
    inside_BS = (column_B < O)[:, None] & inside_S[None, :]
    if GATED:
        sum_DS = gated(sum_DS, up_DS, END == "geglu", LIMIT, ALPHA)
    elif FIRST:
        sum_DS = squared_relu(sum_DS)
    tl.store(out_BS, sum_DS.to(out_ptr.dtype.element_ty), mask=inside_BS)


@launched
@triton.jit
def _product_kernel(
    x_ptr,  # [T, I], or, of pairs that are sorted, [P, I]
    weight,  # [matrices, O, I]: of each expert one, or the gates' and that of their partners; its pointer, or its descriptor
    scale_ptr,
    bias_ptr,  # [matrices, O]; None: there is none
    order_ptr,
    ends_ptr,
    out_ptr,
    END: tl.constexpr,  # what becomes of the product, see `stepgraph.ops.linear.ends`
    K: tl.constexpr,
    N: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    GROUPS: tl.constexpr,  # scales of a row of the weight; 0: there are none
    COPIED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
    TILES: tl.constexpr,
    LIMIT: tl.constexpr,  # of `gated`
    ALPHA: tl.constexpr,
):
    """One program per tile of pairs and block of outputs. With an activation at the end, rows of `x` are tokens' and outputs lie
    as `order` has the pairs; without, rows of `x` lie so, and outputs by the pairs' numbers. Of the last pairs of an expert, half
    a tile does if it holds them."""
    BLOCK_B: tl.constexpr = BLOCK_W if END == "store" or END == "relu2" else BLOCK_W // 2
    HALF: tl.constexpr = BLOCK_S // 2
    wait_for_previous()
    expert, begin, end, block = find_tile(ends_ptr, tl.program_id(0), N, tl.cdiv(O, BLOCK_B), BLOCK_N, BLOCK_S, TILES)
    column = block * BLOCK_B
    if end > 0:
        if BLOCK_S >= 128 and end - begin <= HALF:
            _compute_tile(
                x_ptr,
                weight,
                scale_ptr,
                bias_ptr,
                order_ptr,
                out_ptr,
                expert,
                begin,
                end,
                column,
                END,
                K,
                O,
                I,
                GROUPS,
                COPIED,
                BLOCK_W,
                HALF,
                BLOCK_J,
                STAGES,
                LIMIT,
                ALPHA,
            )
        else:
            _compute_tile(
                x_ptr,
                weight,
                scale_ptr,
                bias_ptr,
                order_ptr,
                out_ptr,
                expert,
                begin,
                end,
                column,
                END,
                K,
                O,
                I,
                GROUPS,
                COPIED,
                BLOCK_W,
                BLOCK_S,
                BLOCK_J,
                STAGES,
                LIMIT,
                ALPHA,
            )


@launched
@triton.jit(do_not_specialize=["first", "N"])
def _combine_kernel(
    down_ptr,
    expert_ptr,
    pair_weight_ptr,
    out_ptr,
    multiplier,
    first,
    N,
    K: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    ADD: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program per token and block of outputs."""
    token = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside_B = column_B < O
    sum_B = tl.zeros([BLOCK_B], tl.float32)
    some = False
    wait_for_previous()
    for k in tl.static_range(K):
        pair = token * K + k
        local = tl.load(expert_ptr + pair) - first
        here = (local >= 0) & (local < N)
        some |= here
        down_B = tl.load(down_ptr + pair * O + column_B, mask=inside_B & here, other=0.0)
        sum_B += down_B.to(tl.float32) * tl.load(pair_weight_ptr + pair, mask=here, other=0.0)
    out_B = out_ptr + token * O + column_B
    sum_B *= multiplier
    if ADD:
        inside_B = inside_B & some
        sum_B += tl.load(out_B, mask=inside_B, other=0.0).to(tl.float32)
    tl.store(out_B, sum_B.to(out_ptr.dtype.element_ty), mask=inside_B)


def gated_experts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    order: Tensor,
    ends: Tensor,
    gelu: bool,
    bias: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    gated: bool = True,
    *,
    by_row: bool = False,
    tile: ExpertTile | None = None,
) -> Tensor:
    """See `stepgraph.ops.experts.gated_experts`, of pairs that are sorted.

    Args:
        x, weight, scale, gelu, bias, gated: as there.
        limit, alpha: of a clamped activation; 0: it is not.
        order, ends: as of `stepgraph.ops.experts.ExpertWork`.
        by_row: what a token becomes depends, bit for bit, on that token alone.
        tile: of each program; None: `choose_tile`.
    """
    num_pairs, (_, rows, inputs) = order.shape[0], weight.shape
    tile = tile or choose_tile(weight, x.dtype, num_pairs, by_row=by_row, is_gated=gated)
    width = rows // 2 if gated else rows
    out = x.new_empty(num_pairs, width)
    matrices = weight.view(-1, width, inputs)
    end = RELU2 if not gated else GEGLU if gelu else SWIGLU
    _multiply(x, matrices, scale, bias, order, ends, out, tile, end, limit=limit, alpha=alpha)
    return out


def sum_experts(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    order: Tensor,
    ends: Tensor,
    out: Tensor,
    add: bool,
    multiplier: float,
    bias: Tensor | None = None,
    *,
    by_row: bool = False,
) -> None:
    """See `stepgraph.ops.experts.sum_experts`, of pairs that are sorted. A pair's product is rounded before they are added up.

    Args:
        hidden, weight, scale, out, add, multiplier, bias: as there.
        expert, pair_weight, first, order, ends: as of `stepgraph.ops.experts.ExpertWork`.
        by_row: as of `gated_experts`.
    """
    down = down_experts(hidden, weight, scale, order, ends, bias, by_row=by_row)
    combine(down, expert, pair_weight, first, weight.shape[0], out, add, multiplier)


def down_experts(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    order: Tensor,
    ends: Tensor,
    bias: Tensor | None = None,
    *,
    by_row: bool = False,
    tile: ExpertTile | None = None,
) -> Tensor:
    """Each pair's product with the down projection of its expert.

    Args:
        hidden, weight, scale, order, ends, bias: as of `sum_experts`.
        by_row, tile: as of `gated_experts`.

    Returns:
        [P, E], dtype of `hidden`, in the order of the pairs' numbers. Rows of pairs whose experts are not here are unspecified.
    """
    num_pairs = order.shape[0]
    tile = tile or choose_tile(weight, hidden.dtype, num_pairs, by_row=by_row)
    down = hidden.new_empty(num_pairs, weight.shape[1])
    _multiply(hidden, weight, scale, bias, order, ends, down, tile, STORE)
    return down


def combine(
    down: Tensor,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    count: int,
    out: Tensor,
    add: bool,
    multiplier: float,
) -> None:
    """Each token's weighted sum, see `sum_experts`.

    Args:
        down: from `down_experts`.
        expert, pair_weight, out, add, multiplier: as of `sum_experts`.
        first, count: the experts that are kept here.
    """
    (num_tokens, top), outputs = expert.shape, down.shape[1]
    _combine_kernel[(num_tokens, triton.cdiv(outputs, COMBINED_OUTPUTS))](
        down,
        expert,
        pair_weight,
        out,
        multiplier,
        first,
        count,
        K=top,
        O=outputs,
        ADD=add,
        BLOCK_B=COMBINED_OUTPUTS,
        num_warps=4,
        **LAUNCH,
    )


def choose_tile(
    weight: Tensor, dtype: torch.dtype, num_pairs: int, *, by_row: bool = False, is_gated: bool = False
) -> ExpertTile:
    """How to cut the product of so many pairs of a dtype with a weight, [N, O, I]: by the pairs of an average expert."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    if by_row:
        return BY_ROW_TILE
    tiles = TUNING.expert_tiles_fp8 if weight.dtype == torch.float8_e4m3fn else TUNING.expert_tiles
    average = num_pairs / weight.shape[0]
    chosen = next((t for t in tiles if average <= t.max_average), tiles[-1])
    return chosen.gated if is_gated else chosen.down


def _multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    order: Tensor,
    ends: Tensor,
    out: Tensor,
    tile: ExpertTile,
    end: str,
    *,
    limit: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Write pairs' products into `out`; see `_product_kernel`."""
    (_, outputs, inputs), num_experts, num_pairs = weight.shape, ends.shape[0], order.shape[0]
    parts = weight.shape[0] // num_experts
    is_copied = tile.copied and inputs * weight.element_size() % 16 == 0
    operand: Tensor | TensorDescriptor = weight
    if is_copied:
        operand = TensorDescriptor.from_tensor(weight, [1, tile.outputs // parts, tile.inputs])
    grid = max_tiles(num_pairs, num_experts, tile.rows) * triton.cdiv(parts * outputs, tile.outputs)
    _product_kernel[(grid,)](
        x,
        operand,
        scale,
        bias,
        order,
        ends,
        out,
        END=end,
        K=num_pairs // x.shape[0],
        N=num_experts,
        O=outputs,
        I=inputs,
        GROUPS=0 if scale is None else scale.shape[-1],
        COPIED=is_copied,
        BLOCK_N=triton.next_power_of_2(num_experts),
        BLOCK_W=tile.outputs,
        BLOCK_S=tile.rows,
        BLOCK_J=tile.inputs,
        STAGES=tile.num_stages,
        TILES=tile.group,
        LIMIT=limit,
        ALPHA=alpha,
        num_warps=tile.num_warps,
        **LAUNCH,
    )
