"""Triton kernels of `process_logits`: count the history of rows with penalties, then one pass over all logits.

The pass cuts every row into chunks, so that even one row keeps the whole chip busy. Lists of tokens (biases, bans) are
scattered into the chunk's part of `out` by its own program, so that an entry is never compared with a list. Bans are set
last: -inf stays -inf whatever is added to or multiplied with it, so their place in the order makes no difference.

`counts` holds, for each token, twice the times it occurs in the output, plus one if it occurs in the prompt. The pass puts it
back to zero.

Shapes: R rows, V vocabulary entries, B entries of a block, N entries of a list, W tokens of a bad word.
"""

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.launched import launched

CHUNK = 1024
"""Entries per program of the pass."""
COUNTERS = 16
"""Programs that count one row's history, in turns of COUNT_BLOCK tokens."""
COUNT_BLOCK = 1024

_NULL_SLOT = tl.constexpr(line.NULL_SLOT)
_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_PROMPT_LENGTH = tl.constexpr(line.PROMPT_LENGTH)
_MIN_LENGTH = tl.constexpr(line.MIN_LENGTH)
_REPETITION_PENALTY = tl.constexpr(line.REPETITION_PENALTY)
_PRESENCE_PENALTY = tl.constexpr(line.PRESENCE_PENALTY)
_FREQUENCY_PENALTY = tl.constexpr(line.FREQUENCY_PENALTY)
_MASKED = tl.constexpr(line.MASKED)
_NUM_BIASES = tl.constexpr(line.NUM_BIASES)
_NUM_BAD_WORDS = tl.constexpr(line.NUM_BAD_WORDS)
_STOP_TOKENS = tl.constexpr(line.STOP_TOKENS)
_MAX_STOP_TOKENS = tl.constexpr(line.MAX_STOP_TOKENS)
_MAX_BIASES = tl.constexpr(line.MAX_BIASES)
_MAX_BAD_WORDS = tl.constexpr(line.MAX_BAD_WORDS)
_BAD_WORD_WIDTH = tl.constexpr(line.BAD_WORD_WIDTH)
_MASK_BITS = tl.constexpr(line.MASK_BITS)


@triton.jit
def _penalties(line_ptr):
    """Repetition penalty with 1 for none, presence and frequency penalty, and whether there is any."""
    repetition = tl.load(line_ptr + _REPETITION_PENALTY).to(tl.float32, bitcast=True)
    presence = tl.load(line_ptr + _PRESENCE_PENALTY).to(tl.float32, bitcast=True)
    frequency = tl.load(line_ptr + _FREQUENCY_PENALTY).to(tl.float32, bitcast=True)
    repetition = tl.where(repetition == 0, 1.0, repetition)
    return repetition, presence, frequency, (repetition != 1) | (presence != 0) | (frequency != 0)


@launched
@triton.jit(do_not_specialize=["MAX_LEN"])
def _count_kernel(
    row_slot_ptr,
    offset_ptr,
    lines_ptr,
    tokens_ptr,
    counts_ptr,
    MAX_LEN,
    V: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count a share of the history of one row, if that has penalties."""
    row = tl.program_id(0)
    slot = tl.load(row_slot_ptr + row)
    line_ptr = lines_ptr + slot * _LINE_WIDTH
    _, _, _, penalized = _penalties(line_ptr)
    if penalized:
        length = tl.load(line_ptr + _LENGTH) + tl.load(offset_ptr + row)
        prompt_length = tl.load(line_ptr + _PROMPT_LENGTH)
        history_ptr = tokens_ptr + slot.to(tl.int64) * MAX_LEN
        counts_row_ptr = counts_ptr + row.to(tl.int64) * V
        for start in range(tl.program_id(1) * BLOCK, length, PROGRAMS * BLOCK):
            position_B = start + tl.arange(0, BLOCK)
            token_B = tl.load(history_ptr + position_B, mask=position_B < length, other=-1)
            known_B = (token_B >= 0) & (token_B < V)
            sampled_B = position_B >= prompt_length
            one_B = tl.full([BLOCK], 1, tl.int32)
            tl.atomic_or(counts_row_ptr + token_B, one_B, mask=known_B & ~sampled_B, sem="relaxed")
            tl.atomic_add(counts_row_ptr + token_B, 2 * one_B, mask=known_B & sampled_B, sem="relaxed")


@triton.jit
def _scatter_biases(bias_ptr, num_biases, out_ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """The biases of one chunk, [BLOCK] float32, added up in its part of `out`."""
    entry_B = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + entry_B, tl.zeros([BLOCK], tl.float32), mask=entry_B < V)
    tl.debug_barrier()
    index_N = tl.arange(0, _MAX_BIASES)
    token_N = tl.load(bias_ptr + 2 * index_N, mask=index_N < num_biases, other=-1)
    value_N = tl.load(bias_ptr + 2 * index_N + 1, mask=index_N < num_biases, other=0).to(tl.float32, bitcast=True)
    mine_N = (token_N >= start) & (token_N < start + BLOCK) & (token_N < V)
    tl.atomic_add(out_ptr + token_N, value_N, mask=mine_N)
    tl.debug_barrier()
    bias_B = tl.load(out_ptr + entry_B, mask=entry_B < V, other=0.0)
    tl.debug_barrier()  # all have read before any writes there again
    return bias_B


@triton.jit
def _ban(token_N, banned_N, out_ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    mine_N = banned_N & (token_N >= start) & (token_N < start + BLOCK) & (token_N < V)
    tl.store(out_ptr + token_N, tl.full(token_N.shape, -float("inf"), tl.float32), mask=mine_N)


@triton.jit
def _ban_bad_words(words_ptr, num_words, history_ptr, length, out_ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    word_N = tl.arange(0, _MAX_BAD_WORDS)
    column_W = tl.arange(0, _BAD_WORD_WIDTH)
    inside_N = word_N < num_words
    token_NW = tl.load(
        words_ptr + word_N[:, None] * _BAD_WORD_WIDTH + column_W[None, :], mask=inside_N[:, None], other=-1
    )
    position_W = length - (_BAD_WORD_WIDTH - 1) + column_W
    history_W = tl.load(history_ptr + position_W, mask=(position_W >= 0) & (position_W < length), other=-2)
    matches_NW = (token_NW == -1) | (token_NW == history_W[None, :]) | (column_W == _BAD_WORD_WIDTH - 1)[None, :]
    matches_N = tl.min(matches_NW.to(tl.int32), 1) > 0
    last_N = tl.load(words_ptr + word_N * _BAD_WORD_WIDTH + _BAD_WORD_WIDTH - 1, mask=inside_N, other=-1)
    _ban(last_N, matches_N, out_ptr, start, V, BLOCK)


@launched
@triton.jit(do_not_specialize=["MAX_LEN"])
def _process_kernel(
    logits_ptr,
    row_slot_ptr,
    offset_ptr,
    lines_ptr,
    tokens_ptr,
    biases_ptr,
    bad_words_ptr,
    masks_ptr,
    counts_ptr,
    out_ptr,
    MAX_LEN,
    MASK_LINES: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one row."""
    row = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    slot = tl.load(row_slot_ptr + row)
    if slot != _NULL_SLOT:
        line_ptr = lines_ptr + slot * _LINE_WIDTH
        slot64 = slot.to(tl.int64)
        row_offset = row.to(tl.int64) * V
        out_row_ptr = out_ptr + row_offset
        entry_B = start + tl.arange(0, BLOCK)
        inside_B = entry_B < V
        x_B = tl.load(logits_ptr + row_offset + entry_B, mask=inside_B, other=0.0).to(tl.float32)

        num_biases = tl.load(line_ptr + _NUM_BIASES)
        if num_biases > 0:
            x_B += _scatter_biases(biases_ptr + slot64 * 2 * _MAX_BIASES, num_biases, out_row_ptr, start, V, BLOCK)

        repetition, presence, frequency, penalized = _penalties(line_ptr)
        if penalized:
            counts_B = counts_ptr + row_offset + entry_B
            count_B = tl.load(counts_B, mask=inside_B, other=0)
            tl.store(counts_B, tl.zeros_like(count_B), mask=inside_B & (count_B > 0))
            repeated_B = tl.where(x_B > 0, tl.div_rn(x_B, repetition), x_B * repetition)
            x_B = tl.where(count_B > 0, repeated_B, x_B)
            num_sampled_B = count_B >> 1
            x_B = tl.where(num_sampled_B > 0, x_B - frequency * num_sampled_B.to(tl.float32) - presence, x_B)

        if tl.load(line_ptr + _MASKED) != 0:
            mask_line = slot64 * MASK_LINES + tl.load(offset_ptr + row)
            mask_ptr = masks_ptr + mask_line * ((V + _MASK_BITS - 1) // _MASK_BITS)
            word_B = tl.load(mask_ptr + entry_B // _MASK_BITS, mask=inside_B, other=0)
            x_B = tl.where(((word_B >> (entry_B % _MASK_BITS)) & 1) != 0, x_B, -float("inf"))
        tl.store(out_row_ptr + entry_B, x_B, mask=inside_B)

        length = tl.load(line_ptr + _LENGTH) + tl.load(offset_ptr + row)
        num_bad_words = tl.load(line_ptr + _NUM_BAD_WORDS)
        too_short = length < tl.load(line_ptr + _MIN_LENGTH)
        if (num_bad_words > 0) | too_short:
            tl.debug_barrier()
            if num_bad_words > 0:
                words_ptr = bad_words_ptr + slot64 * _MAX_BAD_WORDS * _BAD_WORD_WIDTH
                history_ptr = tokens_ptr + slot64 * MAX_LEN
                _ban_bad_words(words_ptr, num_bad_words, history_ptr, length, out_row_ptr, start, V, BLOCK)
            if too_short:
                stop_N = tl.load(line_ptr + _STOP_TOKENS + tl.arange(0, _MAX_STOP_TOKENS))
                _ban(stop_N, stop_N >= 0, out_row_ptr, start, V, BLOCK)


def process_logits(
    logits: Tensor,
    row_slot: Tensor,
    offset: Tensor,
    lines: Tensor,
    tokens: Tensor,
    biases: Tensor,
    bad_words: Tensor,
    masks: Tensor,
    counts: Tensor,
    out: Tensor,
) -> None:
    """See `stepgraph.ops.process_logits.process_logits`."""
    num_rows, vocab_size = logits.shape
    max_len = tokens.stride(0)
    programs = min(COUNTERS, triton.cdiv(max_len, COUNT_BLOCK))
    _count_kernel[(num_rows, programs)](
        row_slot, offset, lines, tokens, counts, max_len, V=vocab_size, PROGRAMS=programs, BLOCK=COUNT_BLOCK
    )
    _process_kernel[(num_rows, triton.cdiv(vocab_size, CHUNK))](
        logits,
        row_slot,
        offset,
        lines,
        tokens,
        biases,
        bad_words,
        masks,
        counts,
        out,
        max_len,
        MASK_LINES=masks.shape[1],
        V=vocab_size,
        BLOCK=CHUNK,
    )
