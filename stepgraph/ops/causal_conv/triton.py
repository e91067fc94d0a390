"""Triton kernel of `causal_conv`.

A row's first W - 1 tokens and its state are one program's: it reads the old state before it writes the new one. Those behind need
nothing but tokens of the step, and are spread over blocks of tokens.

Shapes in the kernel: R rows, B tokens of a block, C channels of a block, W width, P = W - 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched

_TOKENS, _CHANNELS = 16, 256
_MANY_ROWS, _MANY_CHANNELS = 128, 512
"""Of more rows, a program takes more channels: on an H200, 256 rows of 8,192 channels take 27 us in place of 44, and 64 rows
would take 6.3 in place of 5.1."""


@triton.jit
def _end(sum, bias, SILU: tl.constexpr):
    sum += bias
    return sum / (1.0 + tl.exp(-sum)) if SILU else sum


@launched
@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _causal_conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    out_ptr,
    read_line_ptr,
    write_line_ptr,
    query_start_ptr,
    start_ptr,
    num_stored_ptr,
    x_stride,
    num_tokens,
    num_rows,
    CHANNELS: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # at least num_rows
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first `num_rows` programs along axis 1 take a row each, the others a block of tokens."""
    P: tl.constexpr = W - 1
    channel_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = channel_C < CHANNELS
    bias_C = tl.load(bias_ptr + channel_C, mask=inside_C & HAS_BIAS, other=0.0).to(tl.float32)
    program = tl.program_id(1)
    is_row = program < num_rows
    first = tl.load(query_start_ptr + program, mask=is_row, other=0)
    length = tl.load(query_start_ptr + program + 1, mask=is_row, other=0) - first
    stored = tl.load(num_stored_ptr + program, mask=is_row, other=0)
    read = tl.load(read_line_ptr + program, mask=is_row, other=0).to(tl.int64)
    write = tl.load(write_line_ptr + program, mask=is_row, other=0).to(tl.int64)
    has_state = tl.load(start_ptr + program, mask=is_row, other=0) > 0
    wait_for_previous()  # the plan is older
    if is_row:
        if length > 0:
            state_C = state_ptr + read * (P * CHANNELS) + channel_C
            new_state_C = state_ptr + write * (P * CHANNELS) + channel_C
            x_C = x_ptr + first.to(tl.int64) * x_stride + channel_C
            for place in tl.static_range(P):
                if place < length:  # of decodes, one: the others would read the state again
                    sum_C = tl.zeros((BLOCK_C,), tl.float32)
                    for tap in tl.static_range(W):
                        if place + tap >= P:  # P - tap tokens before
                            input_C = tl.load(x_C + (place + tap - P) * x_stride, mask=inside_C, other=0.0)
                        else:
                            input_C = tl.load(state_C + (place + tap) * CHANNELS, mask=inside_C & has_state, other=0.0)
                        tap_C = tl.load(weight_ptr + channel_C * W + tap, mask=inside_C, other=0.0)
                        sum_C += input_C.to(tl.float32) * tap_C.to(tl.float32)
                    out_C = out_ptr + (first + place).to(tl.int64) * CHANNELS + channel_C
                    tl.store(out_C, _end(sum_C, bias_C, SILU).to(out_ptr.dtype.element_ty), mask=inside_C)
            # Entry i takes what entry i + stored holds, or a token: where both lines are one, later entries are read before they
            # are written.
            for entry in tl.static_range(P):
                source = stored + entry - P
                kept_C = tl.load(
                    state_C + (stored + entry) * CHANNELS, mask=inside_C & has_state & (source < 0), other=0.0
                )
                token_C = tl.load(x_C + source * x_stride, mask=inside_C & (source >= 0), other=0.0)
                tl.store(new_state_C + entry * CHANNELS, tl.where(source < 0, kept_C, token_C), mask=inside_C)
    else:
        token_B = (program - num_rows) * BLOCK_B + tl.arange(0, BLOCK_B)
        row_R = tl.arange(0, ROWS)
        real_R = row_R < num_rows
        end_R = tl.load(query_start_ptr + row_R + 1, mask=real_R, other=0)
        begin_R = tl.load(query_start_ptr + row_R, mask=real_R, other=0)
        holds_BR = (begin_R[None, :] <= token_B[:, None]) & (token_B[:, None] < end_R[None, :])
        first_B = tl.sum(tl.where(holds_BR, begin_R[None, :], 0), axis=1)
        is_later_B = (tl.sum(holds_BR.to(tl.int32), axis=1) > 0) & (token_B - first_B >= P) & (token_B < num_tokens)
        if tl.sum(is_later_B.to(tl.int32), axis=0) > 0:
            mask_BC = is_later_B[:, None] & inside_C[None, :]
            sum_BC = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
            for tap in tl.static_range(W):
                source_B = (token_B - (P - tap)).to(tl.int64)
                input_BC = tl.load(x_ptr + source_B[:, None] * x_stride + channel_C[None, :], mask=mask_BC, other=0.0)
                tap_C = tl.load(weight_ptr + channel_C * W + tap, mask=inside_C, other=0.0)
                sum_BC += input_BC.to(tl.float32) * tap_C.to(tl.float32)[None, :]
            out_BC = out_ptr + token_B.to(tl.int64)[:, None] * CHANNELS + channel_C[None, :]
            tl.store(out_BC, _end(sum_BC, bias_C[None, :], SILU).to(out_ptr.dtype.element_ty), mask=mask_BC)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    silu: bool,
) -> Tensor:
    """See `stepgraph.ops.causal_conv.causal_conv`."""
    (num_tokens, channels), num_rows = x.shape, read_line.shape[0]
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert state.is_contiguous()
    assert read_line.is_contiguous()
    assert write_line.is_contiguous()
    out = x.new_empty(num_tokens, channels)
    block_channels = _MANY_CHANNELS if num_rows > _MANY_ROWS else _CHANNELS
    grid = triton.cdiv(channels, block_channels), num_rows + triton.cdiv(num_tokens, _TOKENS)
    _causal_conv_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        state,
        out,
        read_line,
        write_line,
        query_start,
        start,
        num_stored,
        x.stride(0),
        num_tokens,
        num_rows,
        CHANNELS=channels,
        W=weight.shape[1],
        HAS_BIAS=bias is not None,
        SILU=silu,
        ROWS=row_capacity(num_rows),
        BLOCK_B=_TOKENS,
        BLOCK_C=block_channels,
        num_warps=4,
        **LAUNCH,
    )
    return out
