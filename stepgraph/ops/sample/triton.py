"""Triton kernels of `sample`: a first pass over all of the logits at once, then one program per row.

The first kernel cuts every row into chunks, so that even one row keeps the whole chip busy, and leaves each chunk's
best entry. The second takes the best of those. Only for rows with `min_p`, `top_k` or `top_p` does it return to the
logits: for the last two it searches the value of the last entry to keep by counting and weighing the entries above several
candidates per pass, which needs no sort and no memory, then draws from those kept.

Shapes: R rows, V vocabulary entries, N chunks of a row, B entries of a block, W candidates per pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops import slot_line as line

CHUNK = 4096
"""Entries per program of the first kernel."""

_NULL_SLOT = tl.constexpr(line.NULL_SLOT)
_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_TOP_K = tl.constexpr(line.TOP_K)
_TEMPERATURE = tl.constexpr(line.TEMPERATURE)
_TOP_P = tl.constexpr(line.TOP_P)
_MIN_P = tl.constexpr(line.MIN_P)
_SEED_LOW = tl.constexpr(line.SEED_LOW)
_SEED_HIGH = tl.constexpr(line.SEED_HIGH)
_NO_TOKEN = tl.constexpr(line.NO_TOKEN)

_BLOCK = tl.constexpr(2048)  # entries per iteration of the second kernel
_WAYS = tl.constexpr(8)  # candidates per pass: 3 bits of the threshold
KEY_OUTSIDE = tl.constexpr(-(2**31))  # below the key of any float
_KEY_LOWEST = tl.constexpr(-0x7F800001)  # `float_key(-inf)`


@triton.jit
def _settings(line_ptr, V: tl.constexpr):
    """Temperature, min_p, top_k with 0 for all, top_p, and whether any of the last three may keep less than all."""
    temperature = tl.load(line_ptr + _TEMPERATURE).to(tl.float32, bitcast=True)
    top_k = tl.load(line_ptr + _TOP_K)
    top_p = tl.load(line_ptr + _TOP_P).to(tl.float32, bitcast=True)
    min_p = tl.load(line_ptr + _MIN_P).to(tl.float32, bitcast=True)
    top_k = tl.where(top_k < V, top_k, 0)
    return temperature, min_p, top_k, top_p, (temperature > 0) & ((min_p > 0) | (top_k > 0) | (top_p < 1))


@triton.jit
def _scaled(logits_ptr, start, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Block of logits / temperature (raw if 0) as float32, -inf for NaN and beyond V."""
    entry_B = start + tl.arange(0, BLOCK)
    x_B = tl.load(logits_ptr + entry_B, mask=entry_B < V, other=-float("inf")).to(tl.float32)
    x_B = tl.where(x_B == x_B, x_B, -float("inf"))
    return tl.div_rn(x_B, tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _gumbel(line_ptr, start, BLOCK: tl.constexpr):
    """Noise of the entries from `start`, a multiple of 4, on. One Philox counter serves four neighbours."""
    low = tl.load(line_ptr + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(line_ptr + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    group = start // 4 + tl.arange(0, BLOCK // 4)
    position = tl.zeros_like(group) + tl.load(line_ptr + _LENGTH)
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(low | (high << 32), group, position, zero, zero)
    bits_B = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform_B = ((bits_B >> 9).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform_B))


@triton.jit
def _chunks_kernel(
    logits_ptr, row_slot_ptr, lines_ptr, value_ptr, token_ptr, V: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """Best entry of one chunk: of the noisy logits, or of the plain ones where the row is greedy or still to filter."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    slot = tl.load(row_slot_ptr + row)
    if slot != _NULL_SLOT:
        line_ptr = lines_ptr + slot * _LINE_WIDTH
        temperature, _, _, _, filtered = _settings(line_ptr, V)
        start = chunk * BLOCK
        score_B = _scaled(logits_ptr + row.to(tl.int64) * V, start, temperature, V, BLOCK)
        if (temperature > 0) & (filtered == 0):
            score_B += _gumbel(line_ptr, start, BLOCK)
        value, index = tl.max(score_B, 0, return_indices=True)
        tl.store(value_ptr + row * N + chunk, value)
        tl.store(token_ptr + row * N + chunk, start + index)


@triton.jit
def float_key(x_B):
    """int32 in the order of the floats; both zeros alike. The lowest, of -inf, is above KEY_OUTSIDE."""
    bits_B = tl.where(x_B == 0, 0.0, x_B).to(tl.int32, bitcast=True)
    return bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)


@triton.jit
def _block_keys(logits_ptr, start, temperature, V: tl.constexpr):
    x_B = _scaled(logits_ptr, start, temperature, V, _BLOCK)
    return x_B, tl.where(start + tl.arange(0, _BLOCK) < V, float_key(x_B), KEY_OUTSIDE)


@triton.jit
def _search(logits_ptr, temperature, peak, low, need_count, need_mass, V: tl.constexpr):
    """Highest key with at least `need_count` entries, and a share `need_mass` of the mass above `low`, at or above it.

    Stops early at a lower key that keeps the same entries.
    """
    low = low.to(tl.int64)
    high = float_key(peak).to(tl.int64) + 1
    count_low = V
    count_high = 0
    total = 0.0
    while (high - low > 1) & (count_low > need_count) & (count_low - count_high > 1):
        step = (high - low + _WAYS - 1) // _WAYS
        candidate_W = tl.minimum(low + step * tl.arange(0, _WAYS), high)
        count_WB = tl.zeros([_WAYS, _BLOCK], tl.int32)
        mass_WB = tl.zeros([_WAYS, _BLOCK], tl.float32)
        for start in range(0, V, _BLOCK):
            x_B, key_B = _block_keys(logits_ptr, start, temperature, V)
            mass_B = tl.where(x_B == peak, 1.0, tl.exp(x_B - peak))
            above_WB = key_B[None, :] >= candidate_W.to(tl.int32)[:, None]
            count_WB += above_WB.to(tl.int32)
            mass_WB += tl.where(above_WB, mass_B[None, :], 0.0)
        count_W = tl.sum(count_WB, 1)
        mass_W = tl.sum(mass_WB, 1)
        total = tl.maximum(total, tl.max(mass_W, 0))
        enough_W = (count_W >= need_count) & (mass_W >= need_mass * total) & (candidate_W < high)
        enough_W |= candidate_W == low  # known from the passes before, however the sums are rounded
        count_low = tl.min(tl.where(enough_W, count_W, count_low), 0)
        count_high = tl.max(tl.where(enough_W, count_high, count_W), 0)
        num_enough = tl.sum(enough_W.to(tl.int32), 0)
        high = tl.minimum(low + step * num_enough, high)
        low += step * (num_enough - 1)
    return low.to(tl.int32)


@triton.jit
def _draw_filtered(logits_ptr, line_ptr, peak, V: tl.constexpr):
    """Token of a row with `min_p`, `top_k` or `top_p`; `peak` is its largest logit / temperature, above -inf."""
    temperature, min_p, top_k, top_p, _ = _settings(line_ptr, V)
    threshold = tl.full((), _KEY_LOWEST, tl.int32)
    if min_p > 0:
        threshold = float_key(peak + tl.log(min_p))
    if top_k > 0:
        threshold = _search(logits_ptr, temperature, peak, threshold, top_k, 0.0, V)
    if top_p < 1:
        threshold = _search(logits_ptr, temperature, peak, threshold, 1, top_p, V)
    best = -float("inf")
    token = 0
    for start in range(0, V, _BLOCK):
        x_B, key_B = _block_keys(logits_ptr, start, temperature, V)
        keep_B = key_B >= threshold
        if tl.max(keep_B.to(tl.int32), 0) > 0:  # noise costs more than this check, and most blocks keep nothing
            score_B = tl.where(keep_B, x_B + _gumbel(line_ptr, start, _BLOCK), -float("inf"))
            value, index = tl.max(score_B, 0, return_indices=True)
            token = tl.where(value > best, start + index, token)
            best = tl.maximum(value, best)
    return token


@triton.jit
def _rows_kernel(
    logits_ptr,
    row_slot_ptr,
    lines_ptr,
    value_ptr,
    token_ptr,
    out_ptr,
    V: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Best of the chunks' entries, or a draw from those kept."""
    row = tl.program_id(0)
    slot = tl.load(row_slot_ptr + row)
    token = tl.full((), _NO_TOKEN, tl.int32)
    if slot != _NULL_SLOT:
        line_ptr = lines_ptr + slot * _LINE_WIDTH
        _, _, _, _, filtered = _settings(line_ptr, V)
        chunk_N = tl.arange(0, BLOCK_N)
        value_N = tl.load(value_ptr + row * N + chunk_N, mask=chunk_N < N, other=-float("inf"))
        value, chunk = tl.max(value_N, 0, return_indices=True)
        if value > -float("inf"):
            if filtered:
                token = _draw_filtered(logits_ptr + row.to(tl.int64) * V, line_ptr, value, V)
            else:
                token = tl.load(token_ptr + row * N + chunk)
    tl.store(out_ptr + row, token)


def sample(logits: Tensor, row_slot: Tensor, lines: Tensor) -> Tensor:
    """See `stepgraph.ops.sample.sample`."""
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    value_RN = logits.new_empty(num_rows, num_chunks, dtype=torch.float32)
    token_RN = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    out_R = logits.new_empty(num_rows, dtype=torch.int32)
    _chunks_kernel[(num_rows, num_chunks)](
        logits, row_slot, lines, value_RN, token_RN, V=vocab_size, N=num_chunks, BLOCK=CHUNK, num_warps=8
    )
    _rows_kernel[(num_rows,)](
        logits,
        row_slot,
        lines,
        value_RN,
        token_RN,
        out_R,
        V=vocab_size,
        N=num_chunks,
        BLOCK_N=max(16, triton.next_power_of_2(num_chunks)),
        num_warps=16,
    )
    return out_R
