"""Experts of 4 bits in tiles of pairs that share a read of their expert's weight, as `stepgraph.ops.experts.tiles` has them, and
with weights dequantised on the way to the tensor cores, as `stepgraph.ops.four_bit_linear` has them. Pairs that come unsorted
are sorted first.

Shapes: P pairs, N experts, O outputs, I inputs; `_D` rows of a block of the weight, `_B` outputs of a block, `_S` pairs of a
tile, `_P` bytes of codes, `_Q` pieces of them with a scale each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.capacity import max_tiles
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.experts.sort import sort_pairs
from stepgraph.ops.experts.tiles import combine, find_tile
from stepgraph.ops.four_bit_linear.kernels import HALF_CHUNK, input_of, scales, weights
from stepgraph.ops.four_bit_linear.reference import FourBitWeight
from stepgraph.ops.launched import launched
from stepgraph.ops.linear.ends import GEGLU, RELU2, STORE, SWIGLU
from stepgraph.ops.relu2.triton import squared_relu
from stepgraph.ops.swiglu.triton import gated as activate

BLOCK_OUTPUTS, BLOCK_BYTES, TILES = 64, 32, 16
"""Rows of the weight of a program, a gate's partners included; bytes of codes of an iteration; tiles that read a part of the
weight together."""


@launched
@triton.jit
def _experts_kernel(
    x_ptr,  # [T, I], or, of pairs, [P, I]
    codes_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    bias_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,  # [P, O]
    END: tl.constexpr,  # what becomes of the product, see `stepgraph.ops.linear.ends`
    K: tl.constexpr,
    N: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    P: tl.constexpr,
    GROUP: tl.constexpr,  # bytes of codes that share a scale
    IS_E2M1: tl.constexpr,
    SORTED: tl.constexpr,  # whether rows of what is between the two products lie as pairs are sorted, or by their numbers
    BLOCK_N: tl.constexpr,  # at least N
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
    LIMIT: tl.constexpr,  # of the activation
    ALPHA: tl.constexpr,
):
    """One program per tile of pairs and block of outputs."""
    GATED: tl.constexpr = END == "swiglu" or END == "geglu"
    FIRST: tl.constexpr = END != "store"  # of an expert's two products
    BLOCK_B: tl.constexpr = BLOCK_D // 2 if GATED else BLOCK_D
    PIECE: tl.constexpr = BLOCK_P if GROUP > BLOCK_P else GROUP
    GROUPS: tl.constexpr = (P + GROUP - 1) // GROUP
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    wait_for_previous()
    expert, begin, end, block = find_tile(ends_ptr, tl.program_id(0), N, tl.cdiv(O, BLOCK_B), BLOCK_N, BLOCK_S, TILES)
    if end > 0:
        place_S = begin + tl.arange(0, BLOCK_S)
        inside_S = place_S < end
        pair_S = tl.load(order_ptr + place_S, mask=inside_S, other=0)
        between_S = place_S if SORTED else pair_S
        row_S = (pair_S // K if FIRST else between_S).to(tl.int64)
        place_D, place_P = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
        place_Q, input_P = tl.arange(0, BLOCK_P // PIECE) * PIECE, input_of(place_P)
        column_D = block * BLOCK_B + place_D % BLOCK_B
        row_D = (expert * 2 + place_D // BLOCK_B if GATED else expert + place_D * 0).to(tl.int64) * O + column_D
        inside_D = column_D < O
        codes_DP = codes_ptr + row_D[:, None] * P + place_P[None, :]
        x_PS = x_ptr + row_S[None, :] * I + input_P[:, None]
        sum_DS = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
        for start in range(0, P, BLOCK_P):
            codes = tl.load(codes_DP + start, mask=inside_D[:, None] & (start + place_P < P)[None, :], other=0)
            low_P, high_P = 2 * start + input_P < I, 2 * start + input_P + HALF_CHUNK < I
            low_x_PS = tl.load(x_PS + 2 * start, mask=low_P[:, None] & inside_S[None, :], other=0.0)
            high_x_PS = tl.load(x_PS + 2 * start + HALF_CHUNK, mask=high_P[:, None] & inside_S[None, :], other=0.0)
            place_DQ = row_D[:, None] * GROUPS + ((start + place_Q) // GROUP)[None, :]
            inside_DQ = inside_D[:, None] & (start + place_Q < P)[None, :]
            scale_DQ, offset_DQ = scales(scale_ptr, zero_ptr, place_DQ, inside_DQ, IS_E2M1)
            low_DP = weights(codes, scale_DQ, offset_DQ, dtype, False, IS_E2M1)
            sum_DS = tl.dot(low_DP, low_x_PS, sum_DS, input_precision="ieee")
            high_DP = weights(codes, scale_DQ, offset_DQ, dtype, True, IS_E2M1)
            sum_DS = tl.dot(high_DP, high_x_PS, sum_DS, input_precision="ieee")
        if factor_ptr is not None:
            sum_DS *= tl.load(factor_ptr + row_D, mask=inside_D, other=0.0)[:, None]
        if bias_ptr is not None:
            sum_DS += tl.load(bias_ptr + row_D, mask=inside_D, other=0.0).to(tl.float32)[:, None]
        if GATED:
            gate_BS, up_BS = tl.split(tl.permute(tl.reshape(sum_DS, [2, BLOCK_B, BLOCK_S]), 1, 2, 0))
            out = activate(gate_BS, up_BS, END == "geglu", LIMIT, ALPHA)
        elif FIRST:
            out = squared_relu(sum_DS)
        else:
            out = sum_DS
        column_B = block * BLOCK_B + tl.arange(0, BLOCK_B)
        out_row_S = (between_S if FIRST else pair_S).to(tl.int64)
        out_BS = out_ptr + out_row_S[None, :] * O + column_B[:, None]
        tl.store(out_BS, out.to(out_ptr.dtype.element_ty), mask=(column_B < O)[:, None] & inside_S[None, :])


def four_bit_gated_experts(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    gelu: bool,
    by_row: bool,
    bias: Tensor | None,
    limit: float,
    alpha: float,
    gated: bool,
) -> Tensor:
    """See `stepgraph.ops.four_bit_experts.four_bit_gated_experts`."""
    weight = FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1)
    out = x.new_empty(expert.numel(), codes.shape[1] // (2 if gated else 1))
    end = RELU2 if not gated else GEGLU if gelu else SWIGLU
    _multiply(x, weight, bias, expert, first, order, ends, out, end, by_row=by_row, limit=limit, alpha=alpha)
    return out


def four_bit_sum_experts(
    hidden: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    expert: Tensor,
    pair_weight: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    add: bool,
    multiplier: float,
    by_row: bool,
    bias: Tensor | None,
) -> None:
    """See `stepgraph.ops.four_bit_experts.four_bit_sum_experts`. A pair's product is rounded before they are added up."""
    weight = FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1)
    down = hidden.new_empty(expert.numel(), codes.shape[1])
    _multiply(hidden, weight, bias, expert, first, order, ends, down, STORE, by_row=by_row)
    combine(down, expert, pair_weight, first, codes.shape[0], out, add, multiplier)


def _multiply(
    x: Tensor,
    weight: FourBitWeight,
    bias: Tensor | None,
    expert: Tensor,
    first: int,
    order: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    end: str,
    *,
    by_row: bool,
    limit: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Write pairs' products into `out`; see `_experts_kernel`. Tiles are of the pairs of an average expert, or, by row, of one
    size: what a tile adds up for one of its rows does not depend on the others."""
    num_experts, _, code_bytes = weight.codes.shape
    (num_pairs, outputs), is_sorted = out.shape, order is not None
    if order is None or ends is None:
        order, ends = sort_pairs(expert, first, num_experts)
    rows = 64 if by_row else min(64, max(16, triton.next_power_of_2(num_pairs // num_experts)))
    is_float32 = x.dtype == torch.float32  # not on tensor cores
    rows, block_outputs = (16, 32) if is_float32 else (rows, BLOCK_OUTPUTS)
    own = 1 if end in (STORE, RELU2) else 2
    grid = max_tiles(num_pairs, num_experts, rows) * triton.cdiv(own * outputs, block_outputs)
    _experts_kernel[(grid,)](
        x,
        weight.codes,
        weight.scale,
        weight.zero,
        weight.factor,
        bias,
        order,
        ends,
        out,
        END=end,
        K=expert.shape[1],
        N=num_experts,
        O=outputs,
        I=x.shape[1],
        P=code_bytes,
        GROUP=weight.group_size // 2,
        IS_E2M1=weight.is_e2m1,
        SORTED=is_sorted,
        BLOCK_N=triton.next_power_of_2(num_experts),
        BLOCK_D=block_outputs,
        BLOCK_S=rows,
        BLOCK_P=16 if is_float32 else BLOCK_BYTES,
        TILES=TILES,
        LIMIT=limit,
        ALPHA=alpha,
        num_warps=4,
        num_stages=2 if is_float32 else 4,
        **LAUNCH,
    )
