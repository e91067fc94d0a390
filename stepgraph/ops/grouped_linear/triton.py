"""Triton kernel of `grouped_linear`: a constant grid of tiles, each of which finds its group on the device.

Shapes: S rows, N groups, K inputs, O outputs; `_B` is a block of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.capacity import max_tiles
from stepgraph.ops.launched import launched


@launched
@triton.jit(do_not_specialize=["S"])
def _grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    ends_ptr,
    out_ptr,
    S,
    weight_group_stride,
    weight_output_stride,
    weight_input_stride,
    N: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of rows and block of outputs. Tiles of a group are neighbours, so that its weight is read once."""
    group_N = tl.arange(0, BLOCK_N)
    end_N = tl.load(ends_ptr + group_N, mask=group_N < N, other=S)
    start_N = tl.load(ends_ptr + group_N - 1, mask=(group_N > 0) & (group_N < N), other=0)
    start_N = tl.where(group_N < N, start_N, S)
    tiles_N = tl.cdiv(end_N - start_N, BLOCK_S)
    first_N = tl.cumsum(tiles_N) - tiles_N
    tile = tl.program_id(0)
    mine_N = (first_N <= tile) & (tile < first_N + tiles_N)  # of one group, or of none: the grid is an upper bound
    end = tl.sum(tl.where(mine_N, end_N, 0))
    if end > 0:
        group = tl.sum(tl.where(mine_N, group_N, 0)).to(tl.int64)
        row_B = tl.sum(tl.where(mine_N, start_N + (tile - first_N) * BLOCK_S, 0)) + tl.arange(0, BLOCK_S)
        inside_B = row_B < end
        output_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        inside_O = output_O < O
        input_K = tl.arange(0, BLOCK_K)
        x_BK = x_ptr + row_B.to(tl.int64)[:, None] * K + input_K[None, :]
        weight_KO = weight_ptr + group * weight_group_stride
        weight_KO += output_O.to(tl.int64)[None, :] * weight_output_stride + input_K[:, None] * weight_input_stride
        sum_BO = tl.zeros([BLOCK_S, BLOCK_O], tl.float32)
        for start in range(0, K, BLOCK_K):
            inside_K = start + input_K < K
            sum_BO = tl.dot(
                tl.load(x_BK + start, mask=inside_B[:, None] & inside_K[None, :], other=0.0),
                tl.load(weight_KO, mask=inside_K[:, None] & inside_O[None, :], other=0.0),
                sum_BO,
                input_precision="ieee",
            )
            weight_KO += BLOCK_K * weight_input_stride
        out_BO = out_ptr + row_B.to(tl.int64)[:, None] * O + output_O[None, :]
        tl.store(out_BO, sum_BO.to(out_ptr.dtype.element_ty), mask=inside_B[:, None] & inside_O[None, :])


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See `stepgraph.ops.grouped_linear.grouped_linear`."""
    num_rows, num_inputs = x.shape
    num_groups, num_outputs, _ = weight.shape
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    block_rows = 16 if num_rows <= 16 * num_groups else 64  # by the rows of an average group
    block_outputs, block_inputs = (32, 32) if x.dtype == torch.float32 else (64, 64)
    _grouped_linear_kernel[(max_tiles(num_rows, num_groups, block_rows), triton.cdiv(num_outputs, block_outputs))](
        x,
        weight,
        ends,
        out,
        num_rows,
        *weight.stride(),
        N=num_groups,
        O=num_outputs,
        K=num_inputs,
        BLOCK_N=triton.next_power_of_2(num_groups),
        BLOCK_S=block_rows,
        BLOCK_O=block_outputs,
        BLOCK_K=block_inputs,
        num_warps=4,
        num_stages=3,
    )
    return out
