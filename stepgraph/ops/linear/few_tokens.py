"""`linear` of a few tokens of 16 bits on tensor cores: a read of the weight, with the tokens along.

A step that verifies drafts multiplies a handful of tokens with every weight. That is still a read of the weight, but the
streaming kernel's arithmetic grows with the tokens, and the library's tiles are made for many. What counts here is that every
multiprocessor has enough of the weight under way from its first cycle on. A tile of few outputs gives enough programs without
splitting K between them, which would need scratch, a second pass and their order; its few outputs leave nothing to share
between warps, so the warps share K: each multiplies its own slice of every stretch of K, and they add up once, at the end.
No two programs write the same output, and the order of each sum is fixed: calls repeat bit for bit.

Shapes: T tokens, N outputs, K inputs, S slices.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.linear.ends import STORE, before_add, finish
from stepgraph.platforms.kernels import kernel_tuning
from stepgraph.platforms.tuning import FewTokensTile, FlatTile, tile_for

TUNING = kernel_tuning()


@launched
@triton.jit(do_not_specialize=["T", "N"])
def _few_tokens_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    multiplier,
    T,
    N,
    K,
    END: tl.constexpr,  # what becomes of the product, see `ends`
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,  # the number of warps: Triton gives each a batch entry of the product
    STAGES: tl.constexpr,
):
    """One program per BLOCK_N outputs. The weight is the left operand, whose rows fill a tensor-core instruction; the tokens
    are the right one, of which 8 do."""
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_T = tl.arange(0, BLOCK_T)
    inside_N, inside_T = output_N < N, token_T < T
    input_SK = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    weight_SNK = weight_ptr + output_N.to(tl.int64)[None, :, None] * K + input_SK[:, None, :]
    x_SKT = x_ptr + token_T[None, None, :] * K + input_SK[:, :, None]
    sum_SNT = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    up_SNT = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    is_gated: tl.constexpr = END == "swiglu" or END == "geglu"
    out_NT = out_ptr + token_T[None, :] * N + output_N[:, None]
    inside_NT = inside_N[:, None] & inside_T[None, :]
    wait_for_previous()
    before_NT = before_add(out_NT, inside_NT, END)
    for start in tl.range(0, K, SLICES * BLOCK_K, num_stages=STAGES):
        inside_SK = start + input_SK < K
        inside_SNK = inside_N[None, :, None] & inside_SK[:, None, :]
        x = tl.load(x_SKT + start, mask=inside_SK[:, :, None] & inside_T[None, None, :], other=0.0)
        sum_SNT = tl.dot(tl.load(weight_SNK + start, mask=inside_SNK, other=0.0), x, sum_SNT)
        if is_gated:
            up_weight_SNK = tl.load(weight_SNK + tl.cast(N, tl.int64) * K + start, mask=inside_SNK, other=0.0)
            up_SNT = tl.dot(up_weight_SNK, x, up_SNT)
    sum_NT = tl.sum(sum_SNT, axis=0)
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    finish(out_NT, sum_NT, tl.sum(up_SNT, axis=0), before_NT, multiplier, inside_NT, END)


@launched
@triton.jit(do_not_specialize=["T", "N"])
def _flat_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    multiplier,
    T,
    N,
    K,
    END: tl.constexpr,  # what becomes of the product, see `ends`
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,  # rows of the weight; with an activation at the end, a gate's and then its partners'
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per BLOCK_W rows of the weight, which are enough to keep all warps busy with one product."""
    is_gated: tl.constexpr = END == "swiglu" or END == "geglu"
    BLOCK_N: tl.constexpr = BLOCK_W // 2 if is_gated else BLOCK_W
    place_W = tl.arange(0, BLOCK_W)
    column_W = tl.program_id(0) * BLOCK_N + place_W % BLOCK_N
    row_W = column_W + place_W // BLOCK_N * N
    token_T = tl.arange(0, BLOCK_T)
    input_K = tl.arange(0, BLOCK_K)
    inside_W, inside_T = column_W < N, token_T < T
    weight_WK = weight_ptr + row_W.to(tl.int64)[:, None] * K + input_K[None, :]
    x_KT = x_ptr + token_T[None, :] * K + input_K[:, None]
    sum_WT = tl.zeros([BLOCK_W, BLOCK_T], tl.float32)
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < N
    out_NT = out_ptr + token_T[None, :] * N + column_N[:, None]
    inside_NT = inside_N[:, None] & inside_T[None, :]
    wait_for_previous()
    before_NT = before_add(out_NT, inside_NT, END)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside_K = start + input_K < K
        sum_WT = tl.dot(
            tl.load(weight_WK + start, mask=inside_W[:, None] & inside_K[None, :], other=0.0),
            tl.load(x_KT + start, mask=inside_K[:, None] & inside_T[None, :], other=0.0),
            sum_WT,
        )
    if is_gated:
        product_NT, up_NT = tl.split(tl.permute(tl.reshape(sum_WT, [2, BLOCK_N, BLOCK_T]), 1, 2, 0))
    else:
        product_NT, up_NT = sum_WT, sum_WT
    if bias_ptr is not None:
        product_NT += tl.load(bias_ptr + column_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    finish(out_NT, product_NT, up_NT, before_NT, multiplier, inside_NT, END)


def choose_tile(x: Tensor, outputs: int, *, gated: bool = False) -> FewTokensTile | None:
    """The tile for these tokens, [T, K], and a weight of so many outputs, a gate's partners included; None where the library
    is as fast, see `KernelTuning.few_tokens`. Tensor cores would round float32, and rows of the weight that are not aligned to
    16 bytes cannot be copied asynchronously: those go to the library too.
    """
    tokens, inputs = x.shape
    if x.dtype not in (torch.bfloat16, torch.float16) or inputs % 8:
        return None
    return _choose_tile(tokens, outputs, gated)


@functools.cache
def _choose_tile(tokens: int, outputs: int, gated: bool) -> FewTokensTile | None:
    return tile_for(TUNING.few_tokens, tokens, outputs, gated=gated)


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: FewTokensTile,
    end: str = STORE,
    multiplier: float = 1.0,
) -> None:
    """Write `x @ weight.T + bias`, accumulated in float32, into `out`, or what `end` makes of it. May run inside a graph.

    Args:
        x: [T, K] bfloat16 or float16, contiguous. All tokens are in one tile: of more than 64, registers overflow.
        weight: [N, K], same dtype, contiguous; [2N, K] if `end` is an activation.
        bias: [N] or None; None if `end` is an activation.
        out: [T, N], dtype of `x`, contiguous; overwritten, or added to.
        tile: of each program.
        end: see `stepgraph.ops.linear.ends`.
        multiplier: of what is added.
    """
    (tokens, inputs), outputs = x.shape, out.shape[1]
    if isinstance(tile, FlatTile):
        kernel, rows, own = _flat_kernel, weight.shape[0], {"BLOCK_W": tile.outputs, "num_warps": tile.num_warps}
    else:
        own = {"BLOCK_N": tile.outputs, "SLICES": tile.slices, "num_warps": tile.slices}
        kernel, rows = _few_tokens_kernel, outputs
    kernel[(triton.cdiv(rows, tile.outputs),)](
        x,
        weight,
        bias,
        out,
        multiplier,
        tokens,
        outputs,
        inputs,
        END=end,
        BLOCK_T=tile.tokens(tokens),
        BLOCK_K=tile.inputs,
        STAGES=tile.num_stages,
        **own,
        **LAUNCH,
    )
