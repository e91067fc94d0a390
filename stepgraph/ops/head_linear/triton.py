"""Triton kernel of `head_linear`, whose product `latent_queries` has too.

A few tokens are a read of the weights, which heads and their outputs are enough to spread over all multiprocessors, so that no
sum is split between programs. Many tokens are a read of the tokens and a write of the results: the weights stay in the cache.

Shapes: T tokens, H heads, K inputs and O outputs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.platforms.kernels import kernel_tuning

TUNING = kernel_tuning()


@dataclass(frozen=True)
class HeadTile:
    """What one program of a product of heads computes, and how. All are powers of two, but `num_stages`."""

    tokens: int
    outputs: int
    inputs: int  # per iteration
    num_warps: int
    num_stages: int
    weight_first: bool = False  # all that the program reads of the weight is under way before the previous kernel ends


FLOAT32_TILE = HeadTile(tokens=32, outputs=32, inputs=32, num_warps=4, num_stages=2)
"""Not on tensor cores, which round float32: for checks rather than speed."""
DETERMINISTIC_TILE = HeadTile(tokens=64, outputs=32, inputs=64, num_warps=4, num_stages=4)
"""One for any number of tokens. A row of a tensor-core product does not depend on the others, nor on its place."""
LARGE_TILE = HeadTile(tokens=128, outputs=128, inputs=64, num_warps=8, num_stages=3)
MEDIUM_TILE = HeadTile(tokens=64, outputs=64, inputs=64, num_warps=4, num_stages=4)
FIRST_TOKENS = 16
"""Up to so many, which a tensor-core instruction takes anyway, programs hold their part of the weight in registers."""
FIRST_NUMBERS = 16384
"""Of the weight, in each of those programs. On an H200, one token times 16 heads' weights of 128 by 512 takes 2.0 us, beside 2.4
with half as many; of GLM-4.7-Flash's 20 heads, 2.9 beside 5.2; of 128 heads, 6.1 beside 13.4."""


def choose_tile(x: Tensor, num_heads: int, outputs: int, inputs: int, *, deterministic: bool) -> HeadTile:
    """The tile for so many tokens and heads: by their number and the weight's size only, or if deterministic by neither."""
    tokens = x.shape[0]
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    if deterministic:
        return DETERMINISTIC_TILE
    if tokens <= FIRST_TOKENS:
        block = min(64, triton.next_power_of_2(outputs), FIRST_NUMBERS // triton.next_power_of_2(inputs))
        block = max(16, block)
        num_warps = 8 if triton.cdiv(outputs, block) * num_heads <= TUNING.min_large_tiles else 4
        return HeadTile(FIRST_TOKENS, block, inputs=64, num_warps=num_warps, num_stages=1, weight_first=True)
    for tile in (LARGE_TILE, MEDIUM_TILE):
        programs = triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs) * num_heads
        if programs >= TUNING.min_large_tiles and 2 * tokens > tile.tokens:
            return tile
    return DETERMINISTIC_TILE


@triton.jit
def multiply_head(
    x_T1,  # where each token's inputs are
    inside_T1,
    weight_O,  # where each output's first number is
    inside_O,
    input_stride,  # of the weight
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    """A tile of tokens times a part of one head's weight, [T, O] float32; calls `wait_for_previous`."""
    input_K = tl.arange(0, BLOCK_K)
    x_TK = x_T1 + input_K[None, :]
    weight_KO = weight_O[None, :] + input_K[:, None] * input_stride
    sum_TO = tl.zeros([x_T1.shape[0], weight_O.shape[0]], tl.float32)
    if WEIGHT_FIRST:
        weights = ()
        for start in tl.static_range(0, K, BLOCK_K):
            inside_KO = (start + input_K < K)[:, None] & inside_O[None, :]
            weights += (tl.load(weight_KO + start * input_stride, mask=inside_KO, other=0.0),)
        wait_for_previous()
        tokens = ()
        for start in tl.static_range(0, K, BLOCK_K):
            tokens += (tl.load(x_TK + start, mask=inside_T1 & (start + input_K < K)[None, :], other=0.0),)
        for index in tl.static_range(0, (K + BLOCK_K - 1) // BLOCK_K):  # products that do not wait for each other
            sum_TO += tl.dot(tokens[index], weights[index])
    else:
        wait_for_previous()
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            inside_K = start + input_K < K
            sum_TO = tl.dot(
                tl.load(x_TK + start, mask=inside_T1 & inside_K[None, :], other=0.0),
                tl.load(weight_KO, mask=inside_K[:, None] & inside_O[None, :], other=0.0),
                sum_TO,
                input_precision="ieee",
            )
            weight_KO += BLOCK_K * input_stride
    return sum_TO


@launched
@triton.jit(do_not_specialize=["T"])
def _head_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    head_stride,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    """One program per tile. Programs of the same tokens and head are neighbours, then those of the same head."""
    output_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    token_T = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(2).to(tl.int64)
    inside_O, inside_T1 = output_O < O, (token_T < T)[:, None]
    place_T1 = (token_T * H + head)[:, None]
    weight_O = weight_ptr + head * head_stride + output_O * K
    sum_TO = multiply_head(x_ptr + place_T1 * K, inside_T1, weight_O, inside_O, 1, K, BLOCK_K, STAGES, WEIGHT_FIRST)
    out_TO = out_ptr + place_T1 * O + output_O[None, :]
    tl.store(out_TO, sum_TO.to(out_ptr.dtype.element_ty), mask=inside_T1 & inside_O[None, :])


def head_linear(x: Tensor, weight: Tensor, deterministic: bool) -> Tensor:
    """See `stepgraph.ops.head_linear.head_linear`."""
    H, O, K = weight.shape  # noqa: E741
    out = x.new_empty(x.shape[0], H * O)
    multiply(x, weight, out, choose_tile(x, H, O, K, deterministic=deterministic))
    return out


def multiply(x: Tensor, weight: Tensor, out: Tensor, tile: HeadTile) -> None:
    """`head_linear` in tiles of this kind, into `out`."""
    (H, O, K), T = weight.shape, x.shape[0]  # noqa: E741
    _head_linear_kernel[(triton.cdiv(O, tile.outputs), triton.cdiv(T, tile.tokens), H)](
        x,
        weight,
        out,
        weight.stride(0),
        T,
        H=H,
        K=K,
        O=O,
        BLOCK_T=tile.tokens,
        BLOCK_O=tile.outputs,
        BLOCK_K=tile.inputs,
        STAGES=tile.num_stages,
        WEIGHT_FIRST=tile.weight_first,
        num_warps=tile.num_warps,
        **LAUNCH,
    )
