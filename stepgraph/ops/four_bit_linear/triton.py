"""`four_bit_linear` and its fused forms on CUDA: which kernel, in which tiles.

Shapes: T tokens, N outputs, K inputs.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH
from stepgraph.ops.four_bit_linear.kernels import BLOCKS, block_kernel, flat_kernel, streamed_kernel
from stepgraph.ops.four_bit_linear.reference import CHUNK, FourBitWeight
from stepgraph.ops.linear.ends import ADD, GEGLU, STORE, SWIGLU
from stepgraph.ops.linear.triton import streams_at_once
from stepgraph.ops.rms_norm.triton import rms_norm
from stepgraph.ops.swiglu.triton import geglu, swiglu
from stepgraph.platforms.kernels import kernel_tuning
from stepgraph.platforms.tuning import FlatTile, tile_for


@dataclass(frozen=True)
class StreamedTile:
    """What a program does for one or two tokens: it multiplies and adds up on the way from memory."""

    outputs: int
    code_bytes: int  # per iteration
    num_warps: int


@dataclass(frozen=True)
class BlockTile:
    """For many tokens."""

    tokens: int
    outputs: int
    code_bytes: int  # per iteration
    num_warps: int
    num_stages: int


Tile = StreamedTile | FlatTile | BlockTile

MAX_GATED_TOKENS = 32
"""All tokens are in one tile: of more, with both halves, registers overflow."""
FLOAT32_TILE = BlockTile(tokens=32, outputs=32, code_bytes=16, num_warps=4, num_stages=2)
"""Not on tensor cores, which round float32: for checks rather than speed."""
BY_ROW_TILE = BlockTile(tokens=64, outputs=64, code_bytes=64, num_warps=4, num_stages=4)
"""One for any number of tokens, as another one might add up otherwise."""
TUNING = kernel_tuning()


def four_bit_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    bias: Tensor | None,
    by_row: bool,
) -> Tensor:
    """See `stepgraph.ops.four_bit_linear.four_bit_linear`."""
    weight = FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1)
    tile = choose_tile(x, weight, by_row=by_row)
    x, norm = _normed(x, norm_weight, eps, tile)
    out = x.new_empty(x.shape[0], codes.shape[0])
    multiply(x, weight, bias, out, tile, norm=norm)
    return out


def four_bit_linear_add(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    bias: Tensor | None,
    residual: Tensor,
    multiplier: float,
) -> None:
    """See `stepgraph.ops.four_bit_linear.four_bit_linear_add`."""
    weight = FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1)
    multiply(x, weight, bias, residual, choose_tile(x, weight), ADD, multiplier)


def four_bit_gated_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    group_size: int,
    is_e2m1: bool,
    gelu: bool,
) -> Tensor:
    """See `stepgraph.ops.four_bit_linear.four_bit_gated_linear`."""
    weight = FourBitWeight(codes, scale, zero, factor, group_size, is_e2m1)
    tile = choose_tile(x, weight)
    x, norm = _normed(x, norm_weight, eps, tile)
    if isinstance(tile, BlockTile) or x.shape[0] > MAX_GATED_TOKENS:
        product = x.new_empty(x.shape[0], codes.shape[0])
        multiply(x, weight, None, product, tile, norm=norm)
        return (geglu if gelu else swiglu)(product)
    out = x.new_empty(x.shape[0], codes.shape[0] // 2)
    multiply(x, weight, None, out, tile, GEGLU if gelu else SWIGLU, norm=norm)
    return out


class Norm(NamedTuple):
    """An RMS norm."""

    weight: Tensor
    eps: float


def _normed(x: Tensor, norm_weight: Tensor | None, eps: float, tile: Tile) -> tuple[Tensor, Norm | None]:
    """Tokens, and the norm of them that is left to a `StreamedTile`."""
    if norm_weight is None:
        return x, None
    if isinstance(tile, StreamedTile) and streams_at_once(x):
        return x, Norm(norm_weight, eps)
    return rms_norm(x, norm_weight, eps), None


def choose_tile(x: Tensor, weight: FourBitWeight, *, by_row: bool = False) -> Tile:
    """How to cut the product of these tokens, [T, K], and a weight."""
    tokens, inputs = x.shape
    outputs = weight.codes.shape[0]
    if by_row:
        return FLOAT32_TILE if x.dtype == torch.float32 else BY_ROW_TILE
    # A product of tensor cores takes 16 inputs at once, of which a group of 16 has 8 in lower halves.
    takes_flat = x.dtype != torch.float32 and weight.group_size > CHUNK
    if takes_flat and (few := _choose_flat(tokens, outputs)) is not None:
        return few
    if tokens <= TUNING.streamed_tokens:
        at_once = min(TUNING.streamed_inputs, max(2 * CHUNK, triton.next_power_of_2(inputs))) // 2
        rows = max(1, TUNING.streamed_4bit_bytes // max(at_once, TUNING.streamed_4bit_bytes // 16))
        return StreamedTile(outputs=rows, code_bytes=at_once, num_warps=8)
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    for tile in (
        BlockTile(tokens=256, outputs=128, code_bytes=32, num_warps=8, num_stages=4),
        BlockTile(tokens=128, outputs=64, code_bytes=64, num_warps=4, num_stages=3),
    ):
        programs = triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs)
        if 2 * tokens > tile.tokens and programs >= TUNING.min_fp8_programs:
            return tile
    rows = min(64, max(16, triton.next_power_of_2(tokens)))
    return BlockTile(tokens=rows, outputs=64, code_bytes=64, num_warps=4, num_stages=3)


@functools.cache
def _choose_flat(tokens: int, outputs: int) -> FlatTile | None:
    tile = tile_for(TUNING.few_tokens_4bit, tokens, outputs)
    assert tile is None or isinstance(tile, FlatTile)
    return tile


def multiply(
    x: Tensor,
    weight: FourBitWeight,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
    end: str = STORE,
    multiplier: float = 1.0,
    norm: Norm | None = None,
) -> None:
    """Write the product into `out`, or what `end` makes of it. May run inside a graph.

    Args:
        x, weight, bias: as of `four_bit_linear`; a weight of twice the outputs, and no bias, if `end` is an activation.
        out: [T, N], dtype of `x`, contiguous; overwritten, or added to.
        tile: a `StreamedTile` takes up to two tokens, a `FlatTile` those of 16 bits and groups of more than `CHUNK` inputs, up
            to `KernelTuning.few_tokens_4bit`, a `BlockTile` has no activations.
        end: see `stepgraph.ops.linear.ends`.
        multiplier: of what is added.
        norm: of `x`, which only a `StreamedTile` of all inputs has; None: no norm.
    """
    (tokens, inputs), outputs = x.shape, out.shape[1]
    code_bytes, group_bytes = weight.codes.shape[1], weight.group_size // 2
    parts = weight.codes, weight.scale, weight.zero, weight.factor
    match tile:
        case StreamedTile():
            norm_weight, eps = norm or (None, 0.0)
            streamed_kernel[(triton.cdiv(outputs, tile.outputs),)](
                x,
                norm_weight,
                *parts,
                bias,
                out,
                eps,
                multiplier,
                outputs,
                END=end,
                TOKENS=tokens,
                K=inputs,
                P=code_bytes,
                GROUP=group_bytes,
                IS_E2M1=weight.is_e2m1,
                BLOCK_N=tile.outputs,
                BLOCK_P=tile.code_bytes,
                num_warps=tile.num_warps,
                **LAUNCH,
            )
        case FlatTile():
            block_bytes = min(tile.inputs // (2 * BLOCKS), group_bytes)
            flat_kernel[(triton.cdiv(outputs, tile.outputs),)](
                x,
                *parts,
                bias,
                out,
                multiplier,
                tokens,
                outputs,
                inputs,
                code_bytes,
                END=end,
                GROUP=group_bytes,
                IS_E2M1=weight.is_e2m1,
                BLOCK_T=max(8, triton.next_power_of_2(tokens)),
                BLOCK_N=tile.outputs,
                BLOCK_P=block_bytes,
                IS_EVEN=inputs % (2 * block_bytes * BLOCKS) == 0,
                STAGES=tile.num_stages,
                num_warps=tile.num_warps,
                **LAUNCH,
            )
        case BlockTile():
            block_kernel[(triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs),)](
                x,
                *parts,
                bias,
                out,
                multiplier,
                tokens,
                outputs,
                inputs,
                code_bytes,
                END=end,
                GROUP=group_bytes,
                IS_E2M1=weight.is_e2m1,
                BLOCK_T=tile.tokens,
                BLOCK_N=tile.outputs,
                BLOCK_P=tile.code_bytes,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **LAUNCH,
            )
