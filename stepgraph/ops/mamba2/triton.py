"""Triton kernel of `mamba2`: goes through each row's chunks (`stepgraph.ops.mamba2.chunks` has the formulas, and their names), or
tokens, one by one; its programs have a part of the values of one head of one row.

Shapes in the kernel: C tokens of a chunk, N size of B and C, D of a block of values, E of all values of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.gated_delta.triton import ANY_LENGTH, decays, softplus
from stepgraph.ops.launched import launched
from stepgraph.ops.mamba2.chunks import CHUNK, FEW

_VALUES = 32
"""Of a head, in a program."""


@triton.jit
def _step(dt_ptr, dt_bias, least_step, most_step, mask):
    """Δ of tokens whose `dt` lies at `dt_ptr`; zero where masked, so that such tokens bring nothing and decay nothing."""
    dt = tl.load(dt_ptr, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, tl.minimum(tl.maximum(softplus(dt + dt_bias), least_step), most_step), 0.0)


@triton.jit
def _run_tokens(
    state_ND,
    first,
    count,
    xbc_ptr,
    dt_ptr,
    out_ptr,
    rate,
    dt_bias,
    skip,
    least_step,
    most_step,
    dt_stride,
    head,
    entry_D,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The state after `count` tokens from `first` on, one by one. `rate`: exp(a_log)."""
    WIDTH: tl.constexpr = HEADS * E + 2 * GROUPS * N
    entry_N = tl.arange(0, BLOCK_N)
    inside_N, inside_D = entry_N < N, entry_D < E
    group = head // (HEADS // GROUPS)
    for index in range(count):
        token = (first + index).to(tl.int64)
        row_ptr = xbc_ptr + token * WIDTH
        x_D = tl.load(row_ptr + head * E + entry_D, mask=inside_D, other=0.0).to(tl.float32)
        b_N = tl.load(row_ptr + HEADS * E + group * N + entry_N, mask=inside_N, other=0.0).to(tl.float32)
        c_N = tl.load(row_ptr + HEADS * E + (GROUPS + group) * N + entry_N, mask=inside_N, other=0.0).to(tl.float32)
        step = _step(dt_ptr + token * dt_stride + head, dt_bias, least_step, most_step, index < count)
        state_ND = state_ND * tl.exp(-rate * step) + b_N[:, None] * (x_D * step)[None, :]
        out_D = tl.sum(state_ND * c_N[:, None], axis=0) + skip * x_D
        tl.store(out_ptr + (token * HEADS + head) * E + entry_D, out_D.to(out_ptr.dtype.element_ty), mask=inside_D)
    return state_ND


@triton.jit
def _run_chunks(
    state_ND,
    first,
    count,
    xbc_ptr,
    dt_ptr,
    out_ptr,
    rate,
    dt_bias,
    skip,
    least_step,
    most_step,
    dt_stride,
    head,
    entry_D,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state after `count` tokens from `first` on, a chunk at a time."""
    WIDTH: tl.constexpr = HEADS * E + 2 * GROUPS * N
    entry_N = tl.arange(0, BLOCK_N)
    group = head // (HEADS // GROUPS)
    element = xbc_ptr.dtype.element_ty
    for offset in range(0, count, CHUNK):
        place_C = offset + tl.arange(0, CHUNK)
        real_C = place_C < count
        token_C = (first + place_C).to(tl.int64)
        step_C = _step(dt_ptr + token_C * dt_stride + head, dt_bias, least_step, most_step, real_C)
        total_C = tl.cumsum(-rate * step_C, axis=0)
        total = tl.sum(-rate * step_C, axis=0)
        mask_CN = real_C[:, None] & (entry_N < N)[None, :]
        mask_CD = real_C[:, None] & (entry_D < E)[None, :]
        row_CN = xbc_ptr + token_C[:, None] * WIDTH + HEADS * E + group * N + entry_N[None, :]
        b_CN = tl.load(row_CN, mask=mask_CN, other=0.0)
        c_CN = tl.load(row_CN + GROUPS * N, mask=mask_CN, other=0.0)
        x_ptr = xbc_ptr + token_C[:, None] * WIDTH + head * E + entry_D[None, :]
        x_CD = tl.load(x_ptr, mask=mask_CD, other=0.0).to(tl.float32)
        brought_CD = x_CD * step_C[:, None]
        read_CC = tl.dot(c_CN, tl.trans(b_CN), input_precision=PRECISION) * decays(total_C, False, CHUNK)
        out_CD = tl.dot(c_CN, state_ND.to(element), input_precision=PRECISION) * tl.exp(total_C)[:, None]
        out_CD = tl.dot(read_CC.to(element), brought_CD.to(element), out_CD, input_precision=PRECISION)
        target_CD = out_ptr + (token_C[:, None] * HEADS + head) * E + entry_D[None, :]
        tl.store(target_CD, (out_CD + skip * x_CD).to(out_ptr.dtype.element_ty), mask=mask_CD)
        kept_CD = (brought_CD * tl.exp(total - total_C)[:, None]).to(element)
        state_ND = tl.dot(tl.trans(b_CN), kept_CD, state_ND * tl.exp(total), input_precision=PRECISION)
    return state_ND


@triton.jit
def _run(
    state_ND,
    first,
    count,
    xbc_ptr,
    dt_ptr,
    out_ptr,
    rate,
    dt_bias,
    skip,
    least_step,
    most_step,
    dt_stride,
    head,
    entry_D,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state after `count` tokens from `first` on."""
    if CHUNKED:
        state_ND = _run_chunks(
            state_ND, first, count, xbc_ptr, dt_ptr, out_ptr, rate, dt_bias, skip, least_step, most_step, dt_stride, head,
            entry_D, HEADS, GROUPS, N, E, CHUNK, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        state_ND = _run_tokens(
            state_ND, first, count, xbc_ptr, dt_ptr, out_ptr, rate, dt_bias, skip, least_step, most_step, dt_stride, head,
            entry_D, HEADS, GROUPS, N, E, BLOCK_N,
        )  # fmt: skip
    return state_ND


@launched
@triton.jit
def _scan_kernel(
    xbc_ptr,
    dt_ptr,
    a_log_ptr,
    dt_bias_ptr,
    skip_ptr,
    state_ptr,
    out_ptr,
    read_line_ptr,
    write_line_ptr,
    query_start_ptr,
    start_ptr,
    num_stored_ptr,
    dt_stride,
    least_step,
    most_step,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKED: tl.constexpr,  # else token by token
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """One program per block of values, head and row of `LEAST` to `MOST` tokens."""
    head, row = tl.program_id(1), tl.program_id(2)
    first = tl.load(query_start_ptr + row)
    length = tl.load(query_start_ptr + row + 1) - first
    if (length >= LEAST) & (length <= MOST):
        stored = tl.load(num_stored_ptr + row)
        has_state = tl.load(start_ptr + row) > 0
        rate, dt_bias = tl.exp(tl.load(a_log_ptr + head)), tl.load(dt_bias_ptr + head)
        skip = tl.load(skip_ptr + head)
        entry_N, entry_D = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside_ND = (entry_N < N)[:, None] & (entry_D < E)[None, :]
        read, write = tl.load(read_line_ptr + row).to(tl.int64), tl.load(write_line_ptr + row).to(tl.int64)
        place_ND = entry_N[:, None] * E + entry_D[None, :]
        state_ND = tl.load(
            state_ptr + (read * HEADS + head) * (N * E) + place_ND, mask=inside_ND & has_state, other=0.0
        )
        state_ND = _run(
            state_ND, first, stored, xbc_ptr, dt_ptr, out_ptr, rate, dt_bias, skip, least_step, most_step, dt_stride, head,
            entry_D, HEADS, GROUPS, N, E, CHUNK, BLOCK_N, CHUNKED, PRECISION,
        )  # fmt: skip
        tl.store(state_ptr + (write * HEADS + head) * (N * E) + place_ND, state_ND, mask=inside_ND)
        if stored < length:
            _run(
                state_ND, first + stored, length - stored, xbc_ptr, dt_ptr, out_ptr, rate, dt_bias, skip, least_step,
                most_step, dt_stride, head, entry_D, HEADS, GROUPS, N, E, CHUNK, BLOCK_N, CHUNKED, PRECISION,
            )  # fmt: skip


def mamba2(
    xbc: Tensor,
    dt: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    least_step: float,
    most_step: float,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.mamba2.mamba2`."""
    (num_tokens, width), num_rows, (heads, N, E) = xbc.shape, read_line.shape[0], state.shape[1:]
    assert xbc.is_contiguous()
    assert state.is_contiguous()
    assert read_line.is_contiguous()
    assert write_line.is_contiguous()
    assert dt.stride(1) == 1
    # Products of float32 keep all bits; what is of 16 bits is no more exact than three products of TF32.
    precision = "ieee" if xbc.dtype == torch.float32 else "tf32x3"
    sizes = {"HEADS": heads, "GROUPS": (width - heads * E) // (2 * N), "N": N, "E": E, "CHUNK": CHUNK}
    block_d = max(16, min(_VALUES, triton.next_power_of_2(E)))
    sizes |= {"PRECISION": precision, "BLOCK_N": max(16, triton.next_power_of_2(N)), "BLOCK_D": block_d, "num_warps": 4}
    out = xbc.new_empty(num_tokens, heads * E)
    grid = triton.cdiv(E, block_d), heads, num_rows
    inputs = xbc, dt, a_log, dt_bias, skip, state, out, read_line, write_line, query_start, start, num_stored
    numbers = dt.stride(0), least_step, most_step
    # Apart, so that rows of few tokens, which wait for their states, share a multiprocessor with many: chunks take its memory.
    parts = [(True, FEW + 1, ANY_LENGTH), (False, 1, FEW)]
    if deterministic or num_tokens <= FEW:
        parts = [(False, 1, ANY_LENGTH)]
    for chunked, least, most in parts:
        _scan_kernel[grid](*inputs, *numbers, **sizes, CHUNKED=chunked, LEAST=least, MOST=most)
    return out
