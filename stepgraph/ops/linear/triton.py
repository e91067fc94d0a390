"""CUDA kernels of `linear` and its fused forms, which stream the weight once for one or two tokens, leave some more to
`few_tokens` and the rest to the library, and of `linear_by_row`.

Shapes: T tokens, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.linear import few_tokens
from stepgraph.ops.linear.ends import ADD, GEGLU, STORE, SWIGLU, before_add, finish
from stepgraph.ops.rms_norm.triton import rms_norm, scale_rounded
from stepgraph.ops.swiglu.triton import geglu, swiglu
from stepgraph.platforms.kernels import kernel_tuning

TUNING = kernel_tuning()


@triton.jit
def _load_rows(weight, start, input_K, inside_N, K: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Inputs start + `input_K` of rows of a weight that begin at `weight`; of whole pieces no input is beyond K."""
    inside_NK = inside_N[:, None] if IS_WHOLE else inside_N[:, None] & (start + input_K < K)[None, :]
    return tl.load(weight + start + input_K[None, :], mask=inside_NK, other=0.0)


@triton.jit
def _add_piece(sum_NT, block_NK, x_ptr, norm_K, scale, start, input_K, K: tl.constexpr, HAS_NORM: tl.constexpr):
    """`sum_NT` and what the inputs start + `input_K` of each token add to it; normalised first if there is a norm."""
    token_T = tl.arange(0, sum_NT.shape[1])
    for token in tl.static_range(sum_NT.shape[1]):
        x_K = tl.load(x_ptr + token * K + start + input_K, mask=start + input_K < K, other=0.0)
        if HAS_NORM:
            x_K = scale_rounded(x_K.to(tl.float32), scale, norm_K).to(x_K.dtype)
        sum_N = tl.sum(block_NK.to(tl.float32) * x_K.to(tl.float32)[None, :], axis=1)
        sum_NT += tl.where(token_T[None, :] == token, sum_N[:, None], 0.0)
    return sum_NT


@launched
@triton.jit(do_not_specialize=["N"])
def _stream_kernel(
    x_ptr,
    norm_ptr,  # None: x as it is; else K < 2 · BLOCK_K
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    multiplier,
    N,
    END: tl.constexpr,  # what becomes of the product, see `ends`
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at most K
    REST: tl.constexpr,  # a power of two that K % BLOCK_K fits in; 0: K is a multiple of BLOCK_K
):
    """One program per BLOCK_N outputs. It reads whole pieces of BLOCK_K inputs and one of the rest, all at once, since loops are
    unrolled; the first piece and the rest before the previous kernel ends."""
    is_gated: tl.constexpr = END == "swiglu" or END == "geglu"
    HAS_NORM: tl.constexpr = norm_ptr is not None
    WHOLE: tl.constexpr = K // BLOCK_K * BLOCK_K
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = output_N < N
    input_K, rest_J = tl.arange(0, BLOCK_K), tl.arange(0, max(REST, 1))
    token_T = tl.arange(0, TOKENS)
    row_N1 = weight_ptr + output_N.to(tl.int64)[:, None] * K
    up_row_N1 = row_N1 + tl.cast(N, tl.int64) * K
    first_NK = _load_rows(row_N1, 0, input_K, inside_N, K, True)
    if is_gated:
        first_up_NK = _load_rows(up_row_N1, 0, input_K, inside_N, K, True)
    if REST > 0:
        rest_NJ = _load_rows(row_N1, WHOLE, rest_J, inside_N, K, False)
        if is_gated:
            rest_up_NJ = _load_rows(up_row_N1, WHOLE, rest_J, inside_N, K, False)
    norm_K, norm_J = input_K, rest_J  # of nothing, unless there is a norm
    if HAS_NORM:
        norm_K = tl.load(norm_ptr + input_K)
        norm_J = tl.load(norm_ptr + WHOLE + rest_J, mask=WHOLE + rest_J < K, other=0.0)
    out_NT = out_ptr + token_T[None, :] * N + output_N[:, None]
    wait_for_previous()
    before_NT = before_add(out_NT, inside_N[:, None], END)
    scale = 1.0
    if HAS_NORM:
        x_K = tl.load(x_ptr + input_K).to(tl.float32)
        squares = tl.sum(x_K * x_K, axis=0)
        if REST > 0:
            x_J = tl.load(x_ptr + WHOLE + rest_J, mask=WHOLE + rest_J < K, other=0.0).to(tl.float32)
            squares += tl.sum(x_J * x_J, axis=0)
        scale = tl.rsqrt(squares / K + eps)
    sum_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    up_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for start in tl.static_range(0, WHOLE, BLOCK_K):
        block_NK = first_NK if start == 0 else _load_rows(row_N1, start, input_K, inside_N, K, True)
        if is_gated:
            up_NK = first_up_NK if start == 0 else _load_rows(up_row_N1, start, input_K, inside_N, K, True)
        sum_NT = _add_piece(sum_NT, block_NK, x_ptr, norm_K, scale, start, input_K, K, HAS_NORM)
        if is_gated:
            up_NT = _add_piece(up_NT, up_NK, x_ptr, norm_K, scale, start, input_K, K, HAS_NORM)
    if REST > 0:
        sum_NT = _add_piece(sum_NT, rest_NJ, x_ptr, norm_J, scale, WHOLE, rest_J, K, HAS_NORM)
        if is_gated:
            up_NT = _add_piece(up_NT, rest_up_NJ, x_ptr, norm_J, scale, WHOLE, rest_J, K, HAS_NORM)
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    finish(out_NT, sum_NT, up_NT, before_NT, multiplier, inside_N[:, None], END)


def stream(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    end: str = STORE,
    multiplier: float = 1.0,
    norm: tuple[Tensor, float] | None = None,
) -> None:
    """`few_tokens.multiply` for at most `KernelTuning.streamed_tokens` tokens of any dtype.

    Args:
        norm: weight and eps of an RMS norm of `x`, of at most `KernelTuning.streamed_inputs` inputs; None: no norm.
    """
    (tokens, inputs), outputs = x.shape, out.shape[1]
    block_inputs = min(TUNING.streamed_inputs, 1 << (inputs.bit_length() - 1))
    rest = inputs % block_inputs
    at_once = min(TUNING.streamed_inputs, inputs) * x.itemsize
    under_way = TUNING.streamed_bytes if norm is None or end != STORE else TUNING.streamed_normed_bytes
    block_outputs = triton.next_power_of_2(triton.cdiv(under_way, at_once))
    norm_weight, eps = norm or (None, 0.0)
    _stream_kernel[(triton.cdiv(outputs, block_outputs),)](
        x,
        norm_weight,
        weight,
        bias,
        out,
        eps,
        multiplier,
        outputs,
        END=end,
        TOKENS=tokens,
        K=inputs,
        BLOCK_N=block_outputs,
        BLOCK_K=block_inputs,
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=8,
        **LAUNCH,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.linear.linear`."""
    tokens, outputs = x.shape[0], weight.shape[0]
    tile = few_tokens.choose_tile(x, outputs) if tokens > 1 else None
    if tile is None and tokens > TUNING.streamed_tokens:
        return F.linear(x, weight, bias)
    out = x.new_empty(tokens, outputs)
    if tile is not None:
        few_tokens.multiply(x, weight, bias, out, tile)
    else:
        stream(x, weight, bias, out)
    return out


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float) -> None:
    """See `stepgraph.ops.linear.linear_add`."""
    tokens, outputs = x.shape[0], weight.shape[0]
    tile = few_tokens.choose_tile(x, outputs) if tokens > 1 else None
    if tile is not None:
        few_tokens.multiply(x, weight, bias, residual, tile, ADD, multiplier)
    elif tokens <= TUNING.streamed_tokens:
        stream(x, weight, bias, residual, ADD, multiplier)
    else:
        residual.addmm_(x, weight.t(), alpha=multiplier)
        if bias is not None:
            residual.add_(bias, alpha=multiplier)


def gated_linear(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    """See `stepgraph.ops.linear.gated_linear`."""
    tokens, width = x.shape[0], weight.shape[0] // 2
    end = GEGLU if gelu else SWIGLU
    streamed = streams_at_once(x)
    tile = None if streamed else few_tokens.choose_tile(x, 2 * width, gated=True)
    if tile is None and not streamed:
        return (geglu if gelu else swiglu)(linear(x, weight, None))
    out = x.new_empty(tokens, width)
    if tile is None:
        stream(x, weight, None, out, end)
    else:
        few_tokens.multiply(x, weight, None, out, tile, end)
    return out


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.linear.norm_linear`."""
    if not streams_at_once(x):
        return linear(rms_norm(x, norm_weight, eps), weight, bias)
    out = x.new_empty(1, weight.shape[0])
    stream(x, weight, bias, out, norm=(norm_weight, eps))
    return out


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, gelu: bool) -> Tensor:
    """See `stepgraph.ops.linear.norm_gated_linear`."""
    if not streams_at_once(x):
        return gated_linear(rms_norm(x, norm_weight, eps), weight, gelu)
    out = x.new_empty(1, weight.shape[0] // 2)
    stream(x, weight, None, out, GEGLU if gelu else SWIGLU, norm=(norm_weight, eps))
    return out


def streams_at_once(x: Tensor) -> bool:
    """Whether a program has all inputs that it streams the weight for at once, and so can normalise them: a second token would
    cost another pass."""
    return x.shape[0] == 1 and x.shape[1] <= TUNING.streamed_inputs


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


@launched
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
    elif triton.cdiv(tokens, LARGE_TILE.tokens) * triton.cdiv(outputs, LARGE_TILE.outputs) >= TUNING.min_large_tiles:
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
