"""Triton kernels of `gated_delta`.

`_prepare_kernel` does what the chunks of a step need of their own tokens alone, all chunks side by side: it solves their systems
(`stepgraph.ops.gated_delta.chunks` has the formulas, and their names). Which chunks there are, each program finds among all rows:
the grid is the most that rows of so many tokens have. `_scan_kernel` then goes through each row's chunks, or tokens, one by one;
its programs have a part of the values of one head of one row.

Shapes in the kernels: R rows, C tokens of a chunk, N size of keys, D of a block of values, E of all values of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.capacity import row_capacity
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.gated_delta.chunks import CHUNK, FEW
from stepgraph.ops.launched import launched

_VALUES = 32
"""Of a head, in a program of the scan."""
_BLOCK = 16
"""Rows of a chunk's system that are solved one by one; blocks of them then follow from each other."""
_FEW_WARPS = 1
"""Of a program that goes token by token, which waits for its state: on an H200, 256 rows with 32 heads of 128 keys and values
take 350 us, and 425 with four warps; one row 3.5 and 3.6."""
ANY_LENGTH = 1 << 30
"""More tokens than a row has."""


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _gates(ba_ptr, a_log, dt_bias, head, mask, HEADS: tl.constexpr, MAX_RATE: tl.constexpr):
    """Logarithms of decays, and rates, of tokens whose rows of `ba` begin at `ba_ptr`; zero where masked."""
    b = tl.load(ba_ptr + head, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(ba_ptr + HEADS + head, mask=mask, other=0.0).to(tl.float32)
    log_decay = -tl.exp(a_log) * softplus(a + dt_bias)
    return tl.where(mask, log_decay, 0.0), tl.where(mask, MAX_RATE / (1.0 + tl.exp(-b)), 0.0)


@triton.jit
def _normalised(x_CN, scale):
    return x_CN * (tl.rsqrt(tl.sum(x_CN * x_CN, axis=1) + 1e-6) * scale)[:, None]


@triton.jit
def decays(total_C, STRICT: tl.constexpr, CHUNK: tl.constexpr):
    """exp(c_i - c_j) for j ≤ i, or j < i."""
    row_C, column_C = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    seen_CC = row_C > column_C if STRICT else row_C >= column_C
    return tl.where(seen_CC, tl.exp(tl.where(seen_CC, total_C[:, None] - total_C[None, :], 0.0)), 0.0)


@triton.jit
def _inverse(system_CC, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + A)⁻¹ of a strictly lower triangular A: rows of blocks on the diagonal one by one, in all at once, then the blocks."""
    row_C, column_C = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    in_block_CC = row_C // BLOCK == column_C // BLOCK
    diagonal_CC = tl.where(in_block_CC, system_CC, 0.0)
    inverse_CC = tl.where(row_C == column_C, 1.0, 0.0)
    for place in range(1, BLOCK):
        is_row_CC = (row_C % BLOCK == place) & in_block_CC
        # Of each column's block, the row at this place; and what it makes of the rows that are done.
        factor_C = tl.sum(tl.where(is_row_CC, diagonal_CC, 0.0), axis=0)
        sum_C = tl.sum(factor_C[:, None] * inverse_CC, axis=0)
        inverse_CC = tl.where(is_row_CC, inverse_CC - sum_C[None, :], inverse_CC)
    # 1 + A = D (1 + M) with D the blocks on the diagonal, and M⁴ = 0: (1 + M)⁻¹ = (1 + M²) (1 - M).
    step_CC = tl.dot(inverse_CC, tl.where(in_block_CC, 0.0, system_CC), input_precision=PRECISION)
    inverse_CC = inverse_CC - tl.dot(step_CC, inverse_CC, input_precision=PRECISION)
    step_CC = tl.dot(step_CC, step_CC, input_precision=PRECISION)
    return inverse_CC + tl.dot(step_CC, inverse_CC, input_precision=PRECISION)


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _prepare_kernel(
    qkv_ptr,
    ba_ptr,
    a_log_ptr,
    dt_bias_ptr,
    query_start_ptr,
    num_stored_ptr,
    keys_ptr,  # [U, H, N]: T diag(β exp(c)) K
    values_ptr,  # [U, H, E]: T diag(β) V
    ba_stride,
    num_rows,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,  # at least num_rows
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FEW: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_RATE: tl.constexpr,
):
    """One program per chunk and head of the values."""
    WIDTH: tl.constexpr = 2 * KEY_HEADS * N + HEADS * E
    program, head = tl.program_id(0), tl.program_id(1)
    row_R = tl.arange(0, ROWS)
    real_R = row_R < num_rows
    begin_R = tl.load(query_start_ptr + row_R, mask=real_R, other=0)
    length_R = tl.load(query_start_ptr + row_R + 1, mask=real_R, other=0) - begin_R
    stored_R = tl.load(num_stored_ptr + row_R, mask=real_R, other=0)
    chunks_R = tl.where(length_R > FEW, tl.cdiv(stored_R, CHUNK) + tl.cdiv(length_R - stored_R, CHUNK), 0)
    if program < tl.sum(chunks_R, axis=0):
        behind_R = tl.cumsum(chunks_R, axis=0)
        is_row_R = (behind_R > program) & (behind_R - chunks_R <= program)
        begin = tl.sum(tl.where(is_row_R, begin_R, 0), axis=0)
        length = tl.sum(tl.where(is_row_R, length_R, 0), axis=0)
        stored = tl.sum(tl.where(is_row_R, stored_R, 0), axis=0)
        chunk = program - tl.sum(tl.where(is_row_R, behind_R - chunks_R, 0), axis=0)
        before = tl.cdiv(stored, CHUNK)  # chunks whose tokens go into the state that is stored
        offset = tl.where(chunk < before, chunk * CHUNK, stored + (chunk - before) * CHUNK)
        end = tl.where(chunk < before, stored, length)
        token_C = tl.arange(0, CHUNK)
        real_C = offset + token_C < end
        token_C = (begin + offset + token_C).to(tl.int64)

        a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
        log_decay_C, rate_C = _gates(ba_ptr + token_C * ba_stride, a_log, dt_bias, head, real_C, HEADS, MAX_RATE)
        total_C = tl.cumsum(log_decay_C, axis=0)
        entry_N = tl.arange(0, BLOCK_N)
        mask_CN = real_C[:, None] & (entry_N < N)[None, :]
        k_ptr = qkv_ptr + (KEY_HEADS + head // (HEADS // KEY_HEADS)) * N
        k_CN = tl.load(k_ptr + token_C[:, None] * WIDTH + entry_N[None, :], mask=mask_CN, other=0.0)
        k_CN = _normalised(k_CN.to(tl.float32), 1.0)
        operand_CN = k_CN.to(qkv_ptr.dtype.element_ty)
        product_CC = tl.dot(operand_CN, tl.trans(operand_CN), input_precision=PRECISION)
        system_CC = product_CC * rate_C[:, None] * decays(total_C, True, CHUNK)
        inverse_CC = _inverse(system_CC, CHUNK, BLOCK, PRECISION).to(qkv_ptr.dtype.element_ty)

        scaled_CN = (k_CN * (rate_C * tl.exp(total_C))[:, None]).to(qkv_ptr.dtype.element_ty)
        keys_CN = tl.dot(inverse_CC, scaled_CN, input_precision=PRECISION)
        target_CN = keys_ptr + (token_C[:, None] * HEADS + head) * N + entry_N[None, :]
        tl.store(target_CN, keys_CN.to(keys_ptr.dtype.element_ty), mask=mask_CN)
        for first in tl.static_range(0, E, BLOCK_D):
            entry_D = first + tl.arange(0, BLOCK_D)
            mask_CD = real_C[:, None] & (entry_D < E)[None, :]
            v_ptr = qkv_ptr + 2 * KEY_HEADS * N + head * E
            v_CD = tl.load(v_ptr + token_C[:, None] * WIDTH + entry_D[None, :], mask=mask_CD, other=0.0)
            scaled_CD = (v_CD.to(tl.float32) * rate_C[:, None]).to(qkv_ptr.dtype.element_ty)
            values_CD = tl.dot(inverse_CC, scaled_CD, input_precision=PRECISION)
            target_CD = values_ptr + (token_C[:, None] * HEADS + head) * E + entry_D[None, :]
            tl.store(target_CD, values_CD.to(values_ptr.dtype.element_ty), mask=mask_CD)


@triton.jit
def _run_tokens(
    state_ND,
    first,
    count,
    qkv_ptr,
    ba_ptr,
    out_ptr,
    a_log,
    dt_bias,
    ba_stride,
    head,
    entry_D,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_RATE: tl.constexpr,
):
    """The state after `count` tokens from `first` on, one by one."""
    WIDTH: tl.constexpr = 2 * KEY_HEADS * N + HEADS * E
    entry_N = tl.arange(0, BLOCK_N)
    inside_N, inside_D = entry_N < N, entry_D < E
    key_head = head // (HEADS // KEY_HEADS)
    for index in range(count):
        token = (first + index).to(tl.int64)
        row_ptr = qkv_ptr + token * WIDTH
        q_N = tl.load(row_ptr + key_head * N + entry_N, mask=inside_N, other=0.0).to(tl.float32)
        k_N = tl.load(row_ptr + (KEY_HEADS + key_head) * N + entry_N, mask=inside_N, other=0.0).to(tl.float32)
        v_D = tl.load(row_ptr + 2 * KEY_HEADS * N + head * E + entry_D, mask=inside_D, other=0.0).to(tl.float32)
        log_decay, rate = _gates(ba_ptr + token * ba_stride, a_log, dt_bias, head, index < count, HEADS, MAX_RATE)
        q_N = q_N * (tl.rsqrt(tl.sum(q_N * q_N, axis=0) + 1e-6) * N**-0.5)
        k_N = k_N * tl.rsqrt(tl.sum(k_N * k_N, axis=0) + 1e-6)
        state_ND = state_ND * tl.exp(log_decay)
        known_D = tl.sum(state_ND * k_N[:, None], axis=0)
        state_ND += k_N[:, None] * ((v_D - known_D) * rate)[None, :]
        out_D = tl.sum(state_ND * q_N[:, None], axis=0)
        tl.store(out_ptr + (token * HEADS + head) * E + entry_D, out_D.to(out_ptr.dtype.element_ty), mask=inside_D)
    return state_ND


@triton.jit
def _run_chunks(
    state_ND,
    first,
    count,
    qkv_ptr,
    ba_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    a_log,
    dt_bias,
    ba_stride,
    head,
    entry_D,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_RATE: tl.constexpr,
):
    """The state after `count` tokens from `first` on, a chunk at a time."""
    WIDTH: tl.constexpr = 2 * KEY_HEADS * N + HEADS * E
    entry_N = tl.arange(0, BLOCK_N)
    key_head = head // (HEADS // KEY_HEADS)
    for offset in range(0, count, CHUNK):
        place_C = offset + tl.arange(0, CHUNK)
        real_C = place_C < count
        token_C = (first + place_C).to(tl.int64)
        log_decay_C, _ = _gates(ba_ptr + token_C * ba_stride, a_log, dt_bias, head, real_C, HEADS, MAX_RATE)
        total_C = tl.cumsum(log_decay_C, axis=0)
        total = tl.sum(log_decay_C, axis=0)
        mask_CN = real_C[:, None] & (entry_N < N)[None, :]
        mask_CD = real_C[:, None] & (entry_D < E)[None, :]
        row_CN = qkv_ptr + token_C[:, None] * WIDTH + entry_N[None, :]
        q_CN = tl.load(row_CN + key_head * N, mask=mask_CN, other=0.0).to(tl.float32)
        k_CN = tl.load(row_CN + (KEY_HEADS + key_head) * N, mask=mask_CN, other=0.0).to(tl.float32)
        q_CN = _normalised(q_CN, N**-0.5).to(qkv_ptr.dtype.element_ty)
        k_CN = _normalised(k_CN, 1.0).to(qkv_ptr.dtype.element_ty)
        keys_CN = tl.load(keys_ptr + (token_C[:, None] * HEADS + head) * N + entry_N[None, :], mask=mask_CN, other=0.0)
        values_CD = tl.load(
            values_ptr + (token_C[:, None] * HEADS + head) * E + entry_D[None, :], mask=mask_CD, other=0.0
        )
        operand_ND = state_ND.to(qkv_ptr.dtype.element_ty)
        new_CD = values_CD.to(tl.float32) - tl.dot(keys_CN, operand_ND, input_precision=PRECISION)
        read_CC = tl.dot(q_CN, tl.trans(k_CN), input_precision=PRECISION) * decays(total_C, False, CHUNK)
        out_CD = tl.dot(q_CN, operand_ND, input_precision=PRECISION) * tl.exp(total_C)[:, None]
        element = qkv_ptr.dtype.element_ty
        out_CD = tl.dot(read_CC.to(element), new_CD.to(element), out_CD, input_precision=PRECISION)
        target_CD = out_ptr + (token_C[:, None] * HEADS + head) * E + entry_D[None, :]
        tl.store(target_CD, out_CD.to(out_ptr.dtype.element_ty), mask=mask_CD)
        kept_CD = (new_CD * tl.exp(total - total_C)[:, None]).to(element)
        state_ND = tl.dot(tl.trans(k_CN), kept_CD, state_ND * tl.exp(total), input_precision=PRECISION)
    return state_ND


@triton.jit
def _run(
    state_ND,
    first,
    count,
    qkv_ptr,
    ba_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    a_log,
    dt_bias,
    ba_stride,
    head,
    entry_D,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_RATE: tl.constexpr,
):
    """The state after `count` tokens from `first` on."""
    if CHUNKED:
        state_ND = _run_chunks(
            state_ND, first, count, qkv_ptr, ba_ptr, keys_ptr, values_ptr, out_ptr, a_log, dt_bias, ba_stride, head, entry_D,
            HEADS, KEY_HEADS, N, E, CHUNK, BLOCK_N, PRECISION, MAX_RATE,
        )  # fmt: skip
    else:
        state_ND = _run_tokens(
            state_ND, first, count, qkv_ptr, ba_ptr, out_ptr, a_log, dt_bias, ba_stride, head, entry_D, HEADS, KEY_HEADS, N, E,
            BLOCK_N, MAX_RATE,
        )  # fmt: skip
    return state_ND


@launched
@triton.jit
def _scan_kernel(
    qkv_ptr,
    ba_ptr,
    a_log_ptr,
    dt_bias_ptr,
    keys_ptr,
    values_ptr,
    state_ptr,
    out_ptr,
    read_line_ptr,
    write_line_ptr,
    query_start_ptr,
    start_ptr,
    num_stored_ptr,
    ba_stride,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_RATE: tl.constexpr,
    CHUNKED: tl.constexpr,  # else token by token
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """One program per block of values, head and row of `LEAST` to `MOST` tokens."""
    head, row = tl.program_id(1), tl.program_id(2)
    a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
    # All of a row at once, whether or not it is taken here, so that the state waits for its line alone.
    first = tl.load(query_start_ptr + row)
    length = tl.load(query_start_ptr + row + 1) - first
    stored = tl.load(num_stored_ptr + row)
    has_state = tl.load(start_ptr + row) > 0
    read = tl.load(read_line_ptr + row).to(tl.int64)
    write = tl.load(write_line_ptr + row).to(tl.int64)
    wait_for_previous()  # the plan is older
    if (length >= LEAST) & (length <= MOST):
        entry_N, entry_D = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside_ND = (entry_N < N)[:, None] & (entry_D < E)[None, :]
        place_ND = entry_N[:, None] * E + entry_D[None, :]
        state_ND = tl.load(
            state_ptr + (read * HEADS + head) * (N * E) + place_ND, mask=inside_ND & has_state, other=0.0
        )
        state_ND = _run(
            state_ND, first, stored, qkv_ptr, ba_ptr, keys_ptr, values_ptr, out_ptr, a_log, dt_bias, ba_stride, head,
            entry_D, HEADS, KEY_HEADS, N, E, CHUNK, BLOCK_N, CHUNKED, PRECISION, MAX_RATE,
        )  # fmt: skip
        tl.store(state_ptr + (write * HEADS + head) * (N * E) + place_ND, state_ND, mask=inside_ND)
        if stored < length:
            _run(
                state_ND, first + stored, length - stored, qkv_ptr, ba_ptr, keys_ptr, values_ptr, out_ptr, a_log,
                dt_bias, ba_stride, head, entry_D, HEADS, KEY_HEADS, N, E, CHUNK, BLOCK_N, CHUNKED, PRECISION, MAX_RATE,
            )  # fmt: skip


def most_chunks(num_tokens: int, num_rows: int) -> int:
    """At most so many chunks have the rows of more than FEW tokens of a step: beside whole ones, a row has one that is not before
    the state that it stores, and one behind."""
    return num_tokens // CHUNK + 2 * min(num_rows, num_tokens // (FEW + 1))


def gated_delta(
    qkv: Tensor,
    ba: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    max_rate: float,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.gated_delta.gated_delta`."""
    (num_tokens, width), num_rows, (heads, N, E) = qkv.shape, read_line.shape[0], state.shape[1:]
    assert qkv.is_contiguous()
    assert state.is_contiguous()
    assert read_line.is_contiguous()
    assert write_line.is_contiguous()
    assert ba.stride(1) == 1
    key_heads = (width - heads * E) // (2 * N)
    # Products of float32 keep all bits; what is of 16 bits is no more exact than three products of TF32.
    precision = "ieee" if qkv.dtype == torch.float32 else "tf32x3"
    sizes = {"HEADS": heads, "KEY_HEADS": key_heads, "N": N, "E": E, "CHUNK": CHUNK, "PRECISION": precision}
    sizes |= {"MAX_RATE": max_rate, "BLOCK_N": max(16, triton.next_power_of_2(N))}
    block_d = max(16, min(_VALUES, triton.next_power_of_2(E)))
    out = qkv.new_empty(num_tokens, heads * E)
    inputs = qkv, ba, a_log, dt_bias
    rows = read_line, write_line, query_start, start, num_stored, ba.stride(0)

    def scan(keys: Tensor, values: Tensor, *, chunked: bool, least: int, most: int) -> None:
        _scan_kernel[(triton.cdiv(E, block_d), heads, num_rows)](
            *inputs, keys, values, state, out, *rows, **sizes, BLOCK_D=block_d, CHUNKED=chunked, LEAST=least, MOST=most,
            num_warps=4 if chunked else _FEW_WARPS, **LAUNCH,
        )  # fmt: skip

    if deterministic or num_tokens <= FEW:
        scan(out, out, chunked=False, least=1, most=ANY_LENGTH)
        return out
    keys, values = qkv.new_empty(num_tokens, heads, N), qkv.new_empty(num_tokens, heads, E)
    _prepare_kernel[(most_chunks(num_tokens, num_rows), heads)](
        *inputs, query_start, num_stored, keys, values, ba.stride(0), num_rows, **sizes, ROWS=row_capacity(num_rows),
        BLOCK=_BLOCK, BLOCK_D=block_d, FEW=FEW, num_warps=4,
    )  # fmt: skip
    # Apart, so that rows of few tokens, which wait for their states, share a multiprocessor with many: chunks take its memory.
    for chunked, least, most in ((True, FEW + 1, ANY_LENGTH), (False, 1, FEW)):
        scan(keys, values, chunked=chunked, least=least, most=most)
    return out
