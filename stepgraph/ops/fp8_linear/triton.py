"""CUDA kernels of `fp8_linear` and its fused forms: three ways to cut the product, by how many tokens share a read of the weight.

All widen the codes in registers, which loses nothing: bfloat16 and float16 hold every code. On tensor cores the weight is the
left operand, which Hopper's instructions take from registers; the right one would go back through shared memory. Scales of whole
outputs multiply the finished sum, those of groups each group's part of it.

Shapes: T tokens, N outputs, K inputs, G groups of inputs, S slices.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.fp8_linear.reference import GROUP_SIZE
from stepgraph.ops.launched import launched
from stepgraph.ops.linear.ends import ADD, GEGLU, STORE, SWIGLU, before_add, finish
from stepgraph.ops.linear.triton import streams_at_once
from stepgraph.ops.rms_norm.triton import normalise, rms_norm
from stepgraph.ops.swiglu.triton import geglu, swiglu
from stepgraph.platforms.kernels import kernel_tuning
from stepgraph.platforms.tuning import FewTokensTile, SlicedTile, tile_for

_GROUP = tl.constexpr(GROUP_SIZE)


@dataclass(frozen=True)
class StreamedTile:
    """What a program does for one or two tokens: it multiplies and adds up on the way from memory."""

    outputs: int
    inputs: int  # per iteration, a multiple of `GROUP_SIZE`
    num_warps: int


@dataclass(frozen=True)
class BlockTile:
    """For many tokens."""

    tokens: int
    outputs: int
    inputs: int  # per iteration; divides `GROUP_SIZE`
    num_warps: int
    num_stages: int


Tile = StreamedTile | SlicedTile | BlockTile

MAX_GATED_TOKENS = 32
"""All tokens are in one tile: of more, with both halves, registers overflow."""
FLOAT32_TILE = BlockTile(tokens=32, outputs=32, inputs=32, num_warps=4, num_stages=2)
"""Not on tensor cores, which round float32: for checks rather than speed."""
BY_ROW_TILE = BlockTile(tokens=64, outputs=64, inputs=128, num_warps=4, num_stages=4)
"""One for any number of tokens, as another one might add up otherwise."""
TUNING = kernel_tuning()


@triton.jit
def _load_scales(scale_ptr, output, group, inside, GROUPS: tl.constexpr):
    """Scales of these outputs and groups, whose shapes broadcast; zero for groups beyond the last."""
    return tl.load(scale_ptr + output * GROUPS + group, mask=inside & (group < GROUPS), other=0.0)


@triton.jit
def _sum_inputs(weight_NK, x_K, scale_NG, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A token's sums over a block of inputs, [BLOCK_N] float32, with their scales if those are of groups."""
    product_NK = weight_NK.to(tl.float32) * x_K[None, :]
    if GROUPS == 1:
        return tl.sum(product_NK, axis=1)
    part_NG = tl.sum(tl.reshape(product_NK, [BLOCK_N, BLOCK_K // _GROUP, _GROUP]), axis=2)
    return tl.sum(part_NG * scale_NG, axis=1)


@launched
@triton.jit(do_not_specialize=["N"])
def _streamed_kernel(
    x_ptr,
    norm_ptr,  # None: x as it is; else K ≤ BLOCK_K
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    eps,
    multiplier,
    N,
    END: tl.constexpr,  # what becomes of the product, see `ends`
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_N outputs. Loops are unrolled, so that all of its loads are under way at once; those of the first
    weights are before the previous kernel ends."""
    is_gated: tl.constexpr = END == "swiglu" or END == "geglu"
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = output_N < N
    input_K = tl.arange(0, BLOCK_K)
    group_G = tl.arange(0, BLOCK_K // _GROUP)
    token_T = tl.arange(0, TOKENS)
    weight_NK = weight_ptr + output_N.to(tl.int64)[:, None] * K + input_K[None, :]
    up_NK = weight_NK + tl.cast(N, tl.int64) * K
    first_inside_NK = inside_N[:, None] & (input_K < K)[None, :]
    first_NK = tl.load(weight_NK, mask=first_inside_NK, other=0.0)
    if is_gated:
        first_up_NK = tl.load(up_NK, mask=first_inside_NK, other=0.0)
    if norm_ptr is not None:
        norm_K = tl.load(norm_ptr + input_K, mask=input_K < K, other=0.0)
    out_NT = out_ptr + token_T[None, :] * N + output_N[:, None]
    wait_for_previous()
    before_NT = before_add(out_NT, inside_N[:, None], END)
    sum_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    up_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        inside_K = start + input_K < K
        inside_NK = inside_N[:, None] & inside_K[None, :]
        group_1G = start // _GROUP + group_G[None, :]
        block_NK = first_NK if start == 0 else tl.load(weight_NK + start, mask=inside_NK, other=0.0)
        scale_NG = _load_scales(scale_ptr, output_N[:, None], group_1G, inside_N[:, None], GROUPS)
        if is_gated:
            up_block_NK = first_up_NK if start == 0 else tl.load(up_NK + start, mask=inside_NK, other=0.0)
            up_scale_NG = _load_scales(scale_ptr, N + output_N[:, None], group_1G, inside_N[:, None], GROUPS)
        for token in tl.static_range(TOKENS):
            x_K = tl.load(x_ptr + token * K + start + input_K, mask=inside_K, other=0.0)
            if norm_ptr is not None:
                x_K = normalise(x_K.to(tl.float32), norm_K, eps, K).to(x_K.dtype)
            x_K = x_K.to(tl.float32)
            sum_N = _sum_inputs(block_NK, x_K, scale_NG, GROUPS, BLOCK_N, BLOCK_K)
            sum_NT += tl.where(token_T[None, :] == token, sum_N[:, None], 0.0)
            if is_gated:
                up_N = _sum_inputs(up_block_NK, x_K, up_scale_NG, GROUPS, BLOCK_N, BLOCK_K)
                up_NT += tl.where(token_T[None, :] == token, up_N[:, None], 0.0)
    if GROUPS == 1:
        sum_NT *= _load_scales(scale_ptr, output_N, 0, inside_N, 1)[:, None]
        if is_gated:
            up_NT *= _load_scales(scale_ptr, N + output_N, 0, inside_N, 1)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    finish(out_NT, sum_NT, up_NT, before_NT, multiplier, inside_N[:, None], END)


@launched
@triton.jit(do_not_specialize=["T", "N"])
def _sliced_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    multiplier,
    T,
    N,
    K,
    END: tl.constexpr,  # what becomes of the product, see `ends`
    GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,  # the number of warps: Triton gives each a batch entry of the product
    STAGES: tl.constexpr,
):
    """One program per BLOCK_N outputs; see `stepgraph.ops.linear.few_tokens`, from which it differs by widening and scales."""
    is_gated: tl.constexpr = END == "swiglu" or END == "geglu"
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_T = tl.arange(0, BLOCK_T)
    inside_N, inside_T = output_N < N, token_T < T
    slice_S = tl.arange(0, SLICES) * BLOCK_K
    input_SK = slice_S[:, None] + tl.arange(0, BLOCK_K)[None, :]
    weight_SNK = weight_ptr + output_N.to(tl.int64)[None, :, None] * K + input_SK[:, None, :]
    up_SNK = weight_SNK + tl.cast(N, tl.int64) * K
    x_SKT = x_ptr + token_T[None, None, :] * K + input_SK[:, :, None]
    sum_SNT = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    up_SNT = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    out_NT, inside_NT = out_ptr + token_T[None, :] * N + output_N[:, None], inside_N[:, None] & inside_T[None, :]
    wait_for_previous()
    before_NT = before_add(out_NT, inside_NT, END)
    for start in tl.range(0, K, SLICES * BLOCK_K, num_stages=STAGES):
        inside_SK = start + input_SK < K
        inside_SNK = inside_N[None, :, None] & inside_SK[:, None, :]
        x = tl.load(x_SKT + start, mask=inside_SK[:, :, None] & inside_T[None, None, :], other=0.0)
        weight = tl.load(weight_SNK + start, mask=inside_SNK, other=0.0).to(x.dtype)
        if GROUPS == 1:
            sum_SNT = tl.dot(weight, x, sum_SNT)
        else:
            group_S1 = ((start + slice_S) // _GROUP)[:, None]
            scale_SN = _load_scales(scale_ptr, output_N[None, :], group_S1, inside_N[None, :], GROUPS)
            sum_SNT += tl.dot(weight, x, out_dtype=tl.float32) * scale_SN[:, :, None]
        if is_gated:
            up = tl.load(up_SNK + start, mask=inside_SNK, other=0.0).to(x.dtype)
            if GROUPS == 1:
                up_SNT = tl.dot(up, x, up_SNT)
            else:
                up_scale_SN = _load_scales(scale_ptr, N + output_N[None, :], group_S1, inside_N[None, :], GROUPS)
                up_SNT += tl.dot(up, x, out_dtype=tl.float32) * up_scale_SN[:, :, None]
    sum_NT, up_NT = tl.sum(sum_SNT, axis=0), tl.sum(up_SNT, axis=0)
    if GROUPS == 1:
        sum_NT *= _load_scales(scale_ptr, output_N, 0, inside_N, 1)[:, None]
        if is_gated:
            up_NT *= _load_scales(scale_ptr, N + output_N, 0, inside_N, 1)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    finish(out_NT, sum_NT, up_NT, before_NT, multiplier, inside_NT, END)


@launched
@triton.jit(do_not_specialize=["T"])
def _block_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    multiplier,
    T,
    N,
    K,
    END: tl.constexpr,  # "store" or "add", see `ends`
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
    wait_for_previous()
    for start in range(0, K, BLOCK_K):
        inside_K = start + input_K < K
        weight = tl.load(weight_NK + start, mask=inside_N[:, None] & inside_K[None, :], other=0.0)
        x = tl.load(x_KT + start, mask=inside_K[:, None] & inside_T[None, :], other=0.0)
        if GROUPS == 1:
            sum_NT = tl.dot(weight.to(x.dtype), x, sum_NT, input_precision="ieee")
        else:
            scale_N = _load_scales(scale_ptr, output_N, start // _GROUP, inside_N, GROUPS)
            part_NT = tl.dot(weight.to(x.dtype), x, out_dtype=tl.float32, input_precision="ieee")
            sum_NT += part_NT * scale_N[:, None]
    if GROUPS == 1:
        sum_NT *= _load_scales(scale_ptr, output_N, 0, inside_N, 1)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    out_NT = out_ptr + token_T.to(tl.int64)[None, :] * N + output_N[:, None]
    inside_NT = inside_N[:, None] & inside_T[None, :]
    finish(out_NT, sum_NT, sum_NT, before_add(out_NT, inside_NT, END), multiplier, inside_NT, END)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, by_row: bool) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_linear`."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    multiply(x, weight, scale, bias, out, choose_tile(x, weight.shape[0], by_row=by_row))
    return out


def fp8_linear_add(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float
) -> None:
    """See `stepgraph.ops.fp8_linear.fp8_linear_add`."""
    multiply(x, weight, scale, bias, residual, choose_tile(x, weight.shape[0]), ADD, multiplier)


def fp8_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_norm_linear`."""
    if not streams_at_once(x):
        return fp8_linear(rms_norm(x, norm_weight, eps), weight, scale, bias, False)
    out = x.new_empty(1, weight.shape[0])
    multiply(x, weight, scale, bias, out, choose_tile(x, weight.shape[0]), norm=(norm_weight, eps))
    return out


def fp8_gated_linear(x: Tensor, weight: Tensor, scale: Tensor, gelu: bool) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_gated_linear`."""
    return _gated(x, weight, scale, gelu, norm=None)


def fp8_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor, gelu: bool
) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_norm_gated_linear`."""
    if streams_at_once(x):
        return _gated(x, weight, scale, gelu, norm=(norm_weight, eps))
    return _gated(rms_norm(x, norm_weight, eps), weight, scale, gelu, norm=None)


def _gated(x: Tensor, weight: Tensor, scale: Tensor, gelu: bool, norm: tuple[Tensor, float] | None) -> Tensor:
    tile = choose_tile(x, weight.shape[0])
    if isinstance(tile, BlockTile) or x.shape[0] > MAX_GATED_TOKENS:
        return (geglu if gelu else swiglu)(fp8_linear(x, weight, scale, None, False))
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    multiply(x, weight, scale, None, out, tile, GEGLU if gelu else SWIGLU, norm=norm)
    return out


def choose_tile(x: Tensor, outputs: int, *, by_row: bool = False) -> Tile:
    """How to cut the product of these tokens, [T, K], and a weight of so many outputs."""
    tokens, inputs = x.shape
    if by_row:
        return FLOAT32_TILE if x.dtype == torch.float32 else BY_ROW_TILE
    if tokens <= TUNING.streamed_tokens:
        at_once = min(TUNING.streamed_inputs, max(GROUP_SIZE, triton.next_power_of_2(inputs)))
        return StreamedTile(outputs=TUNING.streamed_fp8_bytes // at_once, inputs=at_once, num_warps=8)
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    if (few := _choose_sliced(tokens, outputs)) is not None:
        return few
    for tile in (
        BlockTile(tokens=256, outputs=128, inputs=64, num_warps=8, num_stages=4),
        BlockTile(tokens=128, outputs=64, inputs=128, num_warps=4, num_stages=3),
    ):
        programs = triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs)
        if 2 * tokens > tile.tokens and programs >= TUNING.min_fp8_programs:
            return tile
    return BlockTile(tokens=64, outputs=64, inputs=128, num_warps=4, num_stages=3)


@functools.cache
def _choose_sliced(tokens: int, outputs: int) -> FewTokensTile | None:
    return tile_for(TUNING.few_tokens_fp8, tokens, outputs)


def multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
    end: str = STORE,
    multiplier: float = 1.0,
    norm: tuple[Tensor, float] | None = None,
) -> None:
    """Write the product into `out`, or what `end` makes of it. May run inside a graph.

    Args:
        x, weight, scale, bias: as of `fp8_linear`; weight and scale of twice the outputs, and no bias, if `end` is an activation.
        out: [T, N], dtype of `x`, contiguous; overwritten, or added to.
        tile: a `StreamedTile` takes up to two tokens, a `SlicedTile` 16-bit ones up to those of `KernelTuning.few_tokens_fp8`, a
            `BlockTile` has no activations.
        end: see `stepgraph.ops.linear.ends`.
        multiplier: of what is added.
        norm: weight and eps of an RMS norm of `x`, which only a `StreamedTile` of all inputs has; None: no norm.
    """
    (tokens, inputs), outputs, groups = x.shape, out.shape[1], scale.shape[1]
    match tile:
        case StreamedTile():
            norm_weight, eps = norm or (None, 0.0)
            _streamed_kernel[(triton.cdiv(outputs, tile.outputs),)](
                x,
                norm_weight,
                weight,
                scale,
                bias,
                out,
                eps,
                multiplier,
                outputs,
                END=end,
                TOKENS=tokens,
                K=inputs,
                GROUPS=groups,
                BLOCK_N=tile.outputs,
                BLOCK_K=tile.inputs,
                num_warps=tile.num_warps,
                **LAUNCH,
            )
        case SlicedTile():
            _sliced_kernel[(triton.cdiv(outputs, tile.outputs),)](
                x,
                weight,
                scale,
                bias,
                out,
                multiplier,
                tokens,
                outputs,
                inputs,
                END=end,
                GROUPS=groups,
                BLOCK_T=max(8, triton.next_power_of_2(tokens)),
                BLOCK_N=tile.outputs,
                BLOCK_K=tile.inputs,
                SLICES=tile.slices,
                STAGES=tile.num_stages,
                num_warps=tile.slices,
                **LAUNCH,
            )
        case BlockTile():
            _block_kernel[(triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs),)](
                x,
                weight,
                scale,
                bias,
                out,
                multiplier,
                tokens,
                outputs,
                inputs,
                END=end,
                GROUPS=groups,
                BLOCK_T=tile.tokens,
                BLOCK_N=tile.outputs,
                BLOCK_K=tile.inputs,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **LAUNCH,
            )
