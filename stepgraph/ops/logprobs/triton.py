"""Triton kernels of `logprobs`: a first pass over all logits in chunks, so that even one row keeps the whole chip busy, then
one program per row.

A chunk leaves its maximum, its sum of exponentials, how many of its entries exceed the target, and its own largest entries
in order, found by repeated arg-max. The second kernel adds up, and merges the chunks' lists by their heads.

Shapes: N rows, V vocabulary entries, C chunks of a row, B entries of a block, K largest entries of a chunk, W columns of a
line.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.launched import launched
from stepgraph.ops.sample.triton import KEY_OUTSIDE, float_key

CHUNK = 2048
"""Entries per program of the first kernel."""

_MAX_LOGPROBS = tl.constexpr(line.MAX_LOGPROBS)
_LOGPROB_WIDTH = tl.constexpr(line.LOGPROB_WIDTH)
_BLOCK_W = tl.constexpr(triton.next_power_of_2(line.LOGPROB_WIDTH))
_UNALIGNED = ("target_ptr", "count_ptr", "mass_ptr", "top_token_ptr")
"""Parts of buffers: aligned for some row counts, and not worth a kernel for each case."""


@triton.jit
def _key_value(key):
    """The float of a key: what `float_key` does to the bits undoes itself."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _shift(x, peak):
    """x - peak: 0 where both are inf, -inf where x is."""
    return tl.where(x == -float("inf"), x, tl.where(x == peak, 0.0, x - peak))


@triton.jit
def _target_key(logits_row_ptr, target, V: tl.constexpr):
    """Key of the target's logit, -inf for NaN; KEY_OUTSIDE for a target outside the vocabulary."""
    known = (target >= 0) & (target < V)
    x = tl.load(logits_row_ptr + target, mask=known, other=0.0).to(tl.float32)
    return tl.where(known, float_key(tl.where(x == x, x, -float("inf"))), KEY_OUTSIDE)


@launched
@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _chunks_kernel(
    logits_ptr,
    target_ptr,
    count_ptr,
    peak_ptr,
    mass_ptr,
    above_ptr,
    top_key_ptr,
    top_token_ptr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    count = tl.load(count_ptr + row)
    if count > 0:
        logits_row_ptr = logits_ptr + row.to(tl.int64) * V
        target_key = _target_key(logits_row_ptr, tl.load(target_ptr + row), V)
        start = chunk * BLOCK
        index_B = tl.arange(0, BLOCK)
        inside_B = start + index_B < V
        x_B = tl.load(logits_row_ptr + start + index_B, mask=inside_B, other=-float("inf")).to(tl.float32)
        x_B = tl.where(x_B == x_B, x_B, -float("inf"))
        key_B = tl.where(inside_B, float_key(x_B), KEY_OUTSIDE)
        peak = tl.max(x_B, 0)
        out = row * C + chunk
        tl.store(peak_ptr + out, peak)
        tl.store(mass_ptr + out, tl.sum(tl.exp(_shift(x_B, peak)), 0))
        tl.store(above_ptr + out, tl.sum((key_B > target_key).to(tl.int32), 0))
        for k in range(count - 1):
            key, index = tl.max(key_B, 0, return_indices=True)
            tl.store(top_key_ptr + out * _MAX_LOGPROBS + k, key)
            tl.store(top_token_ptr + out * _MAX_LOGPROBS + k, start + index)
            key_B = tl.where(index_B == index, KEY_OUTSIDE, key_B)


@launched
@triton.jit(do_not_specialize=["DEPTH", "FIRST_LINE"], do_not_specialize_on_alignment=_UNALIGNED)
def _rows_kernel(
    logits_ptr,
    target_ptr,
    count_ptr,
    counter_ptr,
    ring_ptr,
    peak_ptr,
    mass_ptr,
    above_ptr,
    top_key_ptr,
    top_token_ptr,
    DEPTH,
    RING_STRIDE,
    FIRST_LINE,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    count = tl.load(count_ptr + row)
    if count > 0:
        chunk_C = tl.arange(0, BLOCK_C)
        inside_C = chunk_C < C
        peak_C = tl.load(peak_ptr + row * C + chunk_C, mask=inside_C, other=-float("inf"))
        mass_C = tl.load(mass_ptr + row * C + chunk_C, mask=inside_C, other=0.0)
        above_C = tl.load(above_ptr + row * C + chunk_C, mask=inside_C, other=0)
        peak = tl.max(peak_C, 0)
        mass = tl.sum(mass_C * tl.exp(_shift(peak_C, peak)), 0)
        log_mass = tl.log(tl.maximum(mass, 1.0))  # below 1 only without any probability, where all stay -inf

        column_W = tl.arange(0, _BLOCK_W)
        target_key = _target_key(logits_ptr + row.to(tl.int64) * V, tl.load(target_ptr + row), V)
        known = target_key != KEY_OUTSIDE
        logprob = tl.where(known, _shift(_key_value(target_key), peak) - log_mass, -float("inf"))
        rank = tl.where(known, 1 + tl.sum(above_C, 0), 0)
        line_W = tl.where(column_W == 0, logprob.to(tl.int32, bitcast=True), tl.where(column_W == 1, rank, 0))

        head_C = (row * C + chunk_C) * _MAX_LOGPROBS
        for k in range(count - 1):
            key_C = tl.load(top_key_ptr + head_C, mask=inside_C, other=KEY_OUTSIDE)
            key, chunk = tl.max(key_C, 0, return_indices=True)
            if key != KEY_OUTSIDE:
                token_C = tl.load(top_token_ptr + head_C, mask=chunk_C == chunk, other=0)
                logprob = _shift(_key_value(key), peak) - log_mass
                line_W = tl.where(column_W == 2 + 2 * k, tl.sum(token_C, 0), line_W)
                line_W = tl.where(column_W == 3 + 2 * k, logprob.to(tl.int32, bitcast=True), line_W)
            head_C += (chunk_C == chunk).to(tl.int32)

        page = tl.load(counter_ptr) % DEPTH
        line_ptr = ring_ptr + page * RING_STRIDE + (FIRST_LINE + row) * _LOGPROB_WIDTH
        tl.store(line_ptr + column_W, line_W, mask=column_W < _LOGPROB_WIDTH)


def logprobs(logits: Tensor, target: Tensor, count: Tensor, counter: Tensor, ring: Tensor, first_line: int) -> None:
    """See `stepgraph.ops.logprobs.logprobs`."""
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    peak_NC, mass_NC = logits.new_empty(2, num_rows, num_chunks, dtype=torch.float32)
    above_NC = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    top_key_NCK, top_token_NCK = logits.new_empty(2, num_rows, num_chunks, line.MAX_LOGPROBS, dtype=torch.int32)
    _chunks_kernel[(num_rows, num_chunks)](
        logits,
        target,
        count,
        peak_NC,
        mass_NC,
        above_NC,
        top_key_NCK,
        top_token_NCK,
        V=vocab_size,
        C=num_chunks,
        BLOCK=CHUNK,
    )
    _rows_kernel[(num_rows,)](
        logits,
        target,
        count,
        counter,
        ring,
        peak_NC,
        mass_NC,
        above_NC,
        top_key_NCK,
        top_token_NCK,
        ring.shape[0],
        ring.stride(0),
        first_line,
        V=vocab_size,
        C=num_chunks,
        BLOCK_C=triton.next_power_of_2(num_chunks),
        num_warps=1,
    )
