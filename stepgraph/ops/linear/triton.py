"""CUDA kernels of `linear`, which streams the weight once for one or two tokens, leaves some more to `few_tokens` and the rest
to the library, and of `linear_by_row`.

Shapes: T tokens, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops.linear import few_tokens

MAX_STREAMED_TOKENS = 2
"""Up to this many tokens streaming beats the library's kernels: on an H100, one token times the four weights of a
Qwen3-0.6B layer takes 4.8 + 3.5 + 6.1 + 4.7 us against 5.9 + 6.0 + 7.2 + 7.9 us (the copy limit is 2.8 + 1.4 + 4.2 + 2.1);
at four tokens the arithmetic in its inner loop takes longer than the memory, and the two are even."""


@triton.jit(do_not_specialize=["N"])
def _stream_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_N outputs. Loops are unrolled, so that all of its loads are under way at once."""
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = output_N < N
    input_K = tl.arange(0, BLOCK_K)
    token_T = tl.arange(0, TOKENS)
    weight_N1 = weight_ptr + output_N.to(tl.int64)[:, None] * K
    sum_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        inside_K = start + input_K < K
        weight_NK = tl.load(
            weight_N1 + start + input_K[None, :], mask=inside_N[:, None] & inside_K[None, :], other=0.0
        ).to(tl.float32)
        for token in tl.static_range(TOKENS):
            x_K = tl.load(x_ptr + token * K + start + input_K, mask=inside_K, other=0.0).to(tl.float32)
            sum_N = tl.sum(weight_NK * x_K[None, :], axis=1)
            sum_NT += tl.where(token_T[None, :] == token, sum_N[:, None], 0.0)
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + token_T[None, :] * N + output_N[:, None], sum_NT, mask=inside_N[:, None])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.linear.linear`."""
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    tile = few_tokens.choose_tile(x, outputs) if tokens > 1 else None
    if tile is None and tokens > MAX_STREAMED_TOKENS:
        return F.linear(x, weight, bias)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if tile is not None:
        few_tokens.multiply(x, weight, bias, out, tile)
        return out
    block_outputs = 4 if inputs <= 1024 else 2  # about 8 KiB of weight under way per program
    _stream_kernel[(triton.cdiv(outputs, block_outputs),)](
        x,
        weight,
        bias,
        out,
        outputs,
        TOKENS=tokens,
        K=inputs,
        BLOCK_N=block_outputs,
        BLOCK_K=min(2048, triton.next_power_of_2(inputs)),
        num_warps=8,
    )
    return out


@dataclass(frozen=True)
class Tile:
    """What one program of `linear_by_row` computes, and how."""

    tokens: int
    outputs: int
    inputs: int  # per iteration
    num_warps: int
    num_stages: int


SMALL_TILE = Tile(tokens=64, outputs=32, inputs=128, num_warps=4, num_stages=4)
"""Many programs with 8 KiB of weight per stage: decodes wait for memory, whatever the 64 rows of a tensor-core instruction
hold. Fewer tokens per tile would leave Hopper's wgmma, and with it the bits of the large tile."""
LARGE_TILE = Tile(tokens=128, outputs=128, inputs=64, num_warps=8, num_stages=3)
FLOAT32_TILE = Tile(tokens=32, outputs=32, inputs=32, num_warps=4, num_stages=2)
"""Not on tensor cores, which round float32: for checks rather than speed."""
MIN_LARGE_TILES = 128
"""About one per multiprocessor."""


@triton.jit(do_not_specialize=["T"])
def _by_row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile. Programs that share a block of the weight are neighbours, so that it is read once."""
    blocks_T = tl.cdiv(T, BLOCK_T)
    token_T = tl.program_id(0) % blocks_T * BLOCK_T + tl.arange(0, BLOCK_T)
    output_N = tl.program_id(0) // blocks_T * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_T, inside_N = token_T < T, output_N < N
    input_K = tl.arange(0, BLOCK_K)
    x_TK = x_ptr + token_T.to(tl.int64)[:, None] * K + input_K[None, :]
    weight_KN = weight_ptr + output_N.to(tl.int64)[None, :] * K + input_K[:, None]
    sum_TN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside_K = start + input_K < K
        sum_TN = tl.dot(
            tl.load(x_TK + start, mask=inside_T[:, None] & inside_K[None, :], other=0.0),
            tl.load(weight_KN + start, mask=inside_K[:, None] & inside_N[None, :], other=0.0),
            sum_TN,
            input_precision="ieee",
        )
    if bias_ptr is not None:
        sum_TN += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    out_TN = out_ptr + token_T.to(tl.int64)[:, None] * N + output_N[None, :]
    tl.store(out_TN, sum_TN.to(out_ptr.dtype.element_ty), mask=inside_T[:, None] & inside_N[None, :])


def linear_out(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """See `stepgraph.ops.linear.linear`."""
    tile = few_tokens.choose_tile(x, weight.shape[0])
    if tile is None:
        torch.mm(x, weight.t(), out=out)
    else:
        few_tokens.multiply(x, weight, None, out, tile)


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See `stepgraph.ops.linear.linear_by_row`.

    A row of a tensor-core product does not depend on the other rows, and the sum runs over K in order: no two programs share
    one. The number of tokens chooses how many such instructions a program issues, but neither which instruction nor the
    order of the sum, so both tiles give the same bits (`tests/ops/test_linear.py` holds them to it).
    """
    tokens, outputs = out.shape
    if x.dtype == torch.float32:
        tile = FLOAT32_TILE
    elif triton.cdiv(tokens, LARGE_TILE.tokens) * triton.cdiv(outputs, LARGE_TILE.outputs) >= MIN_LARGE_TILES:
        tile = LARGE_TILE
    else:
        tile = SMALL_TILE
    launch_tiles(x, weight, bias, out, tile)


def launch_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile) -> None:
    """`linear_by_row` in tiles of this kind."""
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    _by_row_kernel[(triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs),)](
        x,
        weight,
        bias,
        out,
        tokens,
        N=outputs,
        K=inputs,
        BLOCK_T=tile.tokens,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
