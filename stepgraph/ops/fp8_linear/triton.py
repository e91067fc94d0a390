"""CUDA kernels of `fp8_linear`: three ways to cut the product, by how many tokens share a read of the weight.

All widen the codes in registers, which loses nothing: bfloat16 and float16 hold every code. On tensor cores the weight is the
left operand, which Hopper's instructions take from registers; the right one would go back through shared memory. Scales of whole
outputs multiply the finished sum, those of groups each group's part of it.

Shapes: T tokens, N outputs, K inputs, G groups of inputs, S slices.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.fp8_linear.reference import GROUP_SIZE

_GROUP = tl.constexpr(GROUP_SIZE)


@dataclass(frozen=True)
class StreamedTile:
    """What a program does for one or two tokens: it multiplies and adds up on the way from memory."""

    outputs: int
    inputs: int  # per iteration, a multiple of `GROUP_SIZE`
    num_warps: int


@dataclass(frozen=True)
class SlicedTile:
    """For some tokens: one program has all of them and few outputs, and its warps share the inputs."""

    outputs: int
    inputs: int  # per slice and iteration; divides `GROUP_SIZE`
    slices: int  # warps
    num_stages: int


@dataclass(frozen=True)
class BlockTile:
    """For many tokens."""

    tokens: int
    outputs: int
    inputs: int  # per iteration; divides `GROUP_SIZE`
    num_warps: int
    num_stages: int


Tile = StreamedTile | SlicedTile | BlockTile

MAX_STREAMED_TOKENS = 2
MAX_SLICED_TOKENS = 64
"""All tokens are in one tile: of more, registers overflow."""
FLOAT32_TILE = BlockTile(tokens=32, outputs=32, inputs=32, num_warps=4, num_stages=2)
"""Not on tensor cores, which round float32: for checks rather than speed."""
BY_ROW_TILE = BlockTile(tokens=64, outputs=64, inputs=128, num_warps=4, num_stages=4)
"""One for any number of tokens, as another one might add up otherwise."""
MULTIPROCESSORS = 132
"""Of a Hopper GPU: fewer programs leave some of it idle."""


@triton.jit(do_not_specialize=["N"])
def _streamed_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    N,
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_N outputs. Loops are unrolled, so that all of its loads are under way at once."""
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = output_N < N
    input_K = tl.arange(0, BLOCK_K)
    group_G = tl.arange(0, BLOCK_K // _GROUP)
    token_T = tl.arange(0, TOKENS)
    weight_N1 = weight_ptr + output_N.to(tl.int64)[:, None] * K
    sum_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        inside_K = start + input_K < K
        weight_NK = tl.load(
            weight_N1 + start + input_K[None, :], mask=inside_N[:, None] & inside_K[None, :], other=0.0
        ).to(tl.float32)
        if GROUPS > 1:
            first = start // _GROUP
            scale_NG = tl.load(
                scale_ptr + output_N[:, None] * GROUPS + first + group_G[None, :],
                mask=inside_N[:, None] & (first + group_G < GROUPS)[None, :],
                other=0.0,
            )
        for token in tl.static_range(TOKENS):
            x_K = tl.load(x_ptr + token * K + start + input_K, mask=inside_K, other=0.0).to(tl.float32)
            product_NK = weight_NK * x_K[None, :]
            if GROUPS > 1:
                part_NG = tl.sum(tl.reshape(product_NK, [BLOCK_N, BLOCK_K // _GROUP, _GROUP]), axis=2)
                sum_N = tl.sum(part_NG * scale_NG, axis=1)
            else:
                sum_N = tl.sum(product_NK, axis=1)
            sum_NT += tl.where(token_T[None, :] == token, sum_N[:, None], 0.0)
    if GROUPS == 1:
        sum_NT *= tl.load(scale_ptr + output_N, mask=inside_N, other=0.0)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    out_NT = out_ptr + token_T[None, :] * N + output_N[:, None]
    tl.store(out_NT, sum_NT.to(out_ptr.dtype.element_ty), mask=inside_N[:, None])


@triton.jit(do_not_specialize=["T", "N"])
def _sliced_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    T,
    N,
    K,
    GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,  # the number of warps: Triton gives each a batch entry of the product
    STAGES: tl.constexpr,
):
    """One program per BLOCK_N outputs; see `stepgraph.ops.linear.few_tokens`, from which it differs by widening and scales."""
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_T = tl.arange(0, BLOCK_T)
    inside_N, inside_T = output_N < N, token_T < T
    slice_S = tl.arange(0, SLICES) * BLOCK_K
    input_SK = slice_S[:, None] + tl.arange(0, BLOCK_K)[None, :]
    weight_SNK = weight_ptr + output_N.to(tl.int64)[None, :, None] * K + input_SK[:, None, :]
    x_SKT = x_ptr + token_T[None, None, :] * K + input_SK[:, :, None]
    sum_SNT = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(0, K, SLICES * BLOCK_K, num_stages=STAGES):
        inside_SK = start + input_SK < K
        weight = tl.load(weight_SNK + start, mask=inside_N[None, :, None] & inside_SK[:, None, :], other=0.0)
        x = tl.load(x_SKT + start, mask=inside_SK[:, :, None] & inside_T[None, None, :], other=0.0)
        if GROUPS > 1:
            group_S = (start + slice_S) // _GROUP
            scale_SN = tl.load(
                scale_ptr + output_N[None, :] * GROUPS + group_S[:, None],
                mask=inside_N[None, :] & (group_S < GROUPS)[:, None],
                other=0.0,
            )
            sum_SNT += tl.dot(weight.to(x.dtype), x, out_dtype=tl.float32) * scale_SN[:, :, None]
        else:
            sum_SNT = tl.dot(weight.to(x.dtype), x, sum_SNT)
    sum_NT = tl.sum(sum_SNT, axis=0)
    if GROUPS == 1:
        sum_NT *= tl.load(scale_ptr + output_N, mask=inside_N, other=0.0)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    out_NT = out_ptr + token_T[None, :] * N + output_N[:, None]
    tl.store(out_NT, sum_NT.to(out_ptr.dtype.element_ty), mask=inside_N[:, None] & inside_T[None, :])


@triton.jit(do_not_specialize=["T"])
def _block_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
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
    x_KT = x_ptr + token_T.to(tl.int64)[None, :] * K + input_K[:, None]
    weight_NK = weight_ptr + output_N.to(tl.int64)[:, None] * K + input_K[None, :]
    sum_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside_K = start + input_K < K
        weight = tl.load(weight_NK + start, mask=inside_N[:, None] & inside_K[None, :], other=0.0)
        x = tl.load(x_KT + start, mask=inside_K[:, None] & inside_T[None, :], other=0.0)
        if GROUPS > 1:
            scale_N = tl.load(scale_ptr + output_N * GROUPS + start // _GROUP, mask=inside_N, other=0.0)
            part_NT = tl.dot(weight.to(x.dtype), x, out_dtype=tl.float32, input_precision="ieee")
            sum_NT += part_NT * scale_N[:, None]
        else:
            sum_NT = tl.dot(weight.to(x.dtype), x, sum_NT, input_precision="ieee")
    if GROUPS == 1:
        sum_NT *= tl.load(scale_ptr + output_N, mask=inside_N, other=0.0)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    out_NT = out_ptr + token_T.to(tl.int64)[None, :] * N + output_N[:, None]
    tl.store(out_NT, sum_NT.to(out_ptr.dtype.element_ty), mask=inside_N[:, None] & inside_T[None, :])


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, by_row: bool) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_linear`."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    multiply(x, weight, scale, bias, out, choose_tile(x, weight.shape[0], by_row=by_row))
    return out


def choose_tile(x: Tensor, outputs: int, *, by_row: bool) -> Tile:
    """How to cut the product of these tokens, [T, K], and a weight of so many outputs."""
    tokens, inputs = x.shape
    if by_row:
        return FLOAT32_TILE if x.dtype == torch.float32 else BY_ROW_TILE
    if tokens <= MAX_STREAMED_TOKENS:
        return StreamedTile(
            outputs=8 if inputs <= 1024 else 4,
            inputs=min(2048, max(GROUP_SIZE, triton.next_power_of_2(inputs))),
            num_warps=8,
        )
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    if tokens <= 16 or (tokens <= MAX_SLICED_TOKENS and outputs < 64 * MULTIPROCESSORS):
        return SlicedTile(outputs=16, inputs=128, slices=4, num_stages=4 if tokens <= 16 else 3)
    for tile in (
        BlockTile(tokens=128, outputs=128, inputs=64, num_warps=8, num_stages=4),
        BlockTile(tokens=64, outputs=128, inputs=128, num_warps=4, num_stages=3),
    ):
        if triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs) >= MULTIPROCESSORS:
            return tile
    return BlockTile(tokens=64, outputs=64, inputs=128, num_warps=4, num_stages=4)


def multiply(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, tile: Tile) -> None:
    """Write the product into `out`, [T, N] contiguous, cut in this way; arguments else as of `fp8_linear`. A `StreamedTile` takes
    up to two tokens, a `SlicedTile` of 16 bits up to `MAX_SLICED_TOKENS`. May run inside a graph."""
    (tokens, inputs), (outputs, groups) = x.shape, scale.shape
    operands = x, weight, scale, bias, out
    match tile:
        case StreamedTile():
            _streamed_kernel[(triton.cdiv(outputs, tile.outputs),)](
                *operands,
                outputs,
                TOKENS=tokens,
                K=inputs,
                GROUPS=groups,
                BLOCK_N=tile.outputs,
                BLOCK_K=tile.inputs,
                num_warps=tile.num_warps,
            )
        case SlicedTile():
            _sliced_kernel[(triton.cdiv(outputs, tile.outputs),)](
                *operands,
                tokens,
                outputs,
                inputs,
                GROUPS=groups,
                BLOCK_T=max(8, triton.next_power_of_2(tokens)),
                BLOCK_N=tile.outputs,
                BLOCK_K=tile.inputs,
                SLICES=tile.slices,
                STAGES=tile.num_stages,
                num_warps=tile.slices,
            )
        case BlockTile():
            _block_kernel[(triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs),)](
                *operands,
                tokens,
                N=outputs,
                K=inputs,
                GROUPS=groups,
                BLOCK_T=tile.tokens,
                BLOCK_N=tile.outputs,
                BLOCK_K=tile.inputs,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
