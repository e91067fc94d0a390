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

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.experts import max_tiles
from stepgraph.ops.fp8_linear.reference import GROUP_SIZE
from stepgraph.ops.launched import launched
from stepgraph.ops.swiglu.triton import gated
from stepgraph.platforms.kernels import kernel_tuning
from stepgraph.platforms.tuning import ExpertTile

_GROUP = tl.constexpr(GROUP_SIZE)
FLOAT32_TILE = ExpertTile(rows=16, outputs=32, inputs=32, num_warps=4, num_stages=2)
"""Not on tensor cores, which round float32: for checks rather than speed."""
COMBINED_OUTPUTS = 1024
"""Of a program that adds up: 128 threads load 16 bytes each of a 16-bit dtype."""
TUNING = kernel_tuning()


@triton.jit
def _find_tile(ends_ptr, program, N, BLOCKS, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, TILES: tl.constexpr):
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
def _multiply(
    weight_W,
    scale_W,
    x_S,
    inside_W,
    inside_S,
    I: tl.constexpr,  # noqa: E741
    GROUPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of rows of a weight with rows of the pairs, [BLOCK_W, BLOCK_S] float32.

    Args:
        weight_W, x_S: pointers to the rows.
        scale_W: to the rows' scales; of no use if GROUPS is 0.
        inside_W, inside_S: which rows there are.
    """
    input_J = tl.arange(0, BLOCK_J)
    sum_WS = tl.zeros([BLOCK_W, BLOCK_S], tl.float32)
    weight_WJ = weight_W[:, None] + input_J[None, :]
    x_JS = x_S[None, :] + input_J[:, None]
    for start in tl.range(0, I, BLOCK_J, num_stages=STAGES):
        if I % BLOCK_J == 0:
            weight = tl.load(weight_WJ + start, mask=inside_W[:, None], other=0.0)
            x = tl.load(x_JS + start, mask=inside_S[None, :], other=0.0)
        else:
            inside_J = start + input_J < I
            weight = tl.load(weight_WJ + start, mask=inside_W[:, None] & inside_J[None, :], other=0.0)
            x = tl.load(x_JS + start, mask=inside_S[None, :] & inside_J[:, None], other=0.0)
        if GROUPS > 1:
            scale = tl.load(scale_W + start // _GROUP, mask=inside_W, other=0.0)
            part_WS = tl.dot(weight.to(x.dtype), x, out_dtype=tl.float32, input_precision="ieee")
            sum_WS += part_WS * scale[:, None]
        else:
            sum_WS = tl.dot(weight.to(x.dtype), x, sum_WS, input_precision="ieee")
    if GROUPS == 1:
        sum_WS *= tl.load(scale_W, mask=inside_W, other=0.0)[:, None]
    return sum_WS


@launched
@triton.jit
def _gated_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    GELU: tl.constexpr,
    GROUPS: tl.constexpr,  # scales of a row of the weight; 0: there are none
    BLOCK_N: tl.constexpr,  # at least N
    BLOCK_W: tl.constexpr,  # gates and then their partners
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program per tile of pairs and block of outputs. Pairs lie as `order` has them."""
    BLOCK_B: tl.constexpr = BLOCK_W // 2
    wait_for_previous()
    expert, begin, end, block = _find_tile(ends_ptr, tl.program_id(0), N, tl.cdiv(O, BLOCK_B), BLOCK_N, BLOCK_S, TILES)
    if end > 0:
        place_S = begin + tl.arange(0, BLOCK_S)
        inside_S = place_S < end
        token_S = tl.load(order_ptr + place_S, mask=inside_S, other=0) // K
        place_W = tl.arange(0, BLOCK_W)
        column_W = block * BLOCK_B + place_W % BLOCK_B
        row_W = expert.to(tl.int64) * (2 * O) + column_W + place_W // BLOCK_B * O
        sum_WS = _multiply(
            weight_ptr + row_W * I,
            scale_ptr + row_W * GROUPS if GROUPS > 0 else row_W,
            x_ptr + token_S.to(tl.int64) * I,
            column_W < O,
            inside_S,
            I,
            GROUPS,
            BLOCK_W,
            BLOCK_S,
            BLOCK_J,
            STAGES,
        )
        gate_BS, up_BS = tl.split(tl.permute(tl.reshape(sum_WS, [2, BLOCK_B, BLOCK_S]), 1, 2, 0))
        column_B = block * BLOCK_B + tl.arange(0, BLOCK_B)
        out_BS = out_ptr + place_S.to(tl.int64)[None, :] * O + column_B[:, None]
        inside_BS = (column_B < O)[:, None] & inside_S[None, :]
        tl.store(out_BS, gated(gate_BS, up_BS, GELU).to(out_ptr.dtype.element_ty), mask=inside_BS)


@launched
@triton.jit
def _down_kernel(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    N: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program per tile of pairs and block of outputs; those of a pair go to the row of its number."""
    wait_for_previous()
    expert, begin, end, block = _find_tile(ends_ptr, tl.program_id(0), N, tl.cdiv(O, BLOCK_W), BLOCK_N, BLOCK_S, TILES)
    if end > 0:
        place_S = begin + tl.arange(0, BLOCK_S)
        inside_S = place_S < end
        pair_S = tl.load(order_ptr + place_S, mask=inside_S, other=0)
        column_W = block * BLOCK_W + tl.arange(0, BLOCK_W)
        row_W = expert.to(tl.int64) * O + column_W
        sum_WS = _multiply(
            weight_ptr + row_W * I,
            scale_ptr + row_W * GROUPS if GROUPS > 0 else row_W,
            hidden_ptr + place_S.to(tl.int64) * I,
            column_W < O,
            inside_S,
            I,
            GROUPS,
            BLOCK_W,
            BLOCK_S,
            BLOCK_J,
            STAGES,
        )
        out_WS = out_ptr + pair_S.to(tl.int64)[None, :] * O + column_W[:, None]
        tl.store(out_WS, sum_WS.to(out_ptr.dtype.element_ty), mask=(column_W < O)[:, None] & inside_S[None, :])


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
    *,
    by_row: bool = False,
    tile: ExpertTile | None = None,
) -> Tensor:
    """See `stepgraph.ops.experts.gated_experts`, of pairs that are sorted.

    Args:
        x, weight, scale, gelu: as there.
        order, ends: as of `stepgraph.ops.experts.ExpertWork`.
        by_row: what a token becomes depends, bit for bit, on that token alone.
        tile: of each program; None: `choose_tile`.
    """
    (num_tokens, inputs), num_pairs, (num_experts, rows, _) = x.shape, order.shape[0], weight.shape
    tile = tile or choose_tile(weight, x.dtype, num_pairs, by_row=by_row, is_gated=True)
    out = x.new_empty(num_pairs, rows // 2)
    grid = max_tiles(num_pairs, num_experts, tile.rows) * triton.cdiv(rows // 2, tile.outputs // 2)
    _gated_kernel[(grid,)](
        x,
        weight,
        scale,
        order,
        ends,
        out,
        K=num_pairs // num_tokens,
        O=rows // 2,
        I=inputs,
        GELU=gelu,
        **_options(tile, scale, num_experts),
    )
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
    *,
    by_row: bool = False,
    tile: ExpertTile | None = None,
) -> None:
    """See `stepgraph.ops.experts.sum_experts`, of pairs that are sorted. A pair's product is rounded before they are added up.

    Args:
        hidden, weight, scale, out, add, multiplier: as there.
        expert, pair_weight, first, order, ends: as of `stepgraph.ops.experts.ExpertWork`.
        by_row, tile: as of `gated_experts`.
    """
    (num_experts, outputs, inputs), (num_tokens, top) = weight.shape, expert.shape
    tile = tile or choose_tile(weight, hidden.dtype, expert.numel(), by_row=by_row)
    down = hidden.new_empty(expert.numel(), outputs)
    grid = max_tiles(expert.numel(), num_experts, tile.rows) * triton.cdiv(outputs, tile.outputs)
    _down_kernel[(grid,)](
        hidden, weight, scale, order, ends, down, O=outputs, I=inputs, **_options(tile, scale, num_experts)
    )
    _combine_kernel[(num_tokens, triton.cdiv(outputs, COMBINED_OUTPUTS))](
        down,
        expert,
        pair_weight,
        out,
        multiplier,
        first,
        num_experts,
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
    tiles = TUNING.expert_tiles_fp8 if weight.dtype == torch.float8_e4m3fn else TUNING.expert_tiles
    if by_row:
        return tiles[0].gated if is_gated else tiles[0].down
    average = num_pairs / weight.shape[0]
    chosen = next((t for t in tiles if average <= t.max_average), tiles[-1])
    return chosen.gated if is_gated else chosen.down


def _options(tile: ExpertTile, scale: Tensor | None, num_experts: int) -> dict[str, int | bool]:
    """Options of a launch that both products have."""
    return {
        "N": num_experts,
        "GROUPS": 0 if scale is None else scale.shape[-1],
        "BLOCK_N": triton.next_power_of_2(num_experts),
        "BLOCK_W": tile.outputs,
        "BLOCK_S": tile.rows,
        "BLOCK_J": tile.inputs,
        "STAGES": tile.num_stages,
        "TILES": tile.group,
        "num_warps": tile.num_warps,
        **LAUNCH,
    }
