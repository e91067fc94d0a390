"""Triton kernels of `lookup`: several programs scan each row's texts for the longest match, then one a row writes its drafts.

How many programs share a row depends on sizes known at capture; each takes every n-th block of the text, up to its
real end. Of a block only the token before each position is read for all of them. The rest of the suffix, and in the memory the
key, is compared where that one equals the newest token, until no position of the block is left. Matches are compared by one
int64: length, whether it is the row's own history, position.

Shapes: R rows, K drafts, P positions of a block, S shares of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.launched import launched

BLOCK = 1024
"""Positions that a program scans at once."""
PROGRAMS = 2048
"""Programs that scan histories, of all rows together, and as many for the memory: some 16 on each multiprocessor of a large
GPU."""
MAX_SHARES = 256
"""Programs that scan one row's history, or its memory, at most."""

_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_ACTIVE = tl.constexpr(line.ACTIVE)
_MEMORY_KEY = tl.constexpr(line.MEMORY_KEY)
_MAX_LENGTH = tl.constexpr(line.MAX_LENGTH)
_BLOCK_S = tl.constexpr(2 * MAX_SHARES)
_OWN_BIT = tl.constexpr(31)
_LENGTH_BIT = tl.constexpr(32)


@launched
@triton.jit(do_not_specialize=["M", "MAX_LEN", "HISTORY_SHARES", "SHARES"])
def _scan_kernel(
    row_slot_ptr,
    lines_ptr,
    tokens_ptr,
    memory_ptr,
    keys_ptr,
    best_ptr,
    M,
    MAX_LEN,
    HISTORY_SHARES,
    SHARES,
    MAX_MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best match in one share of a row's history or of the memory, 0 for none."""
    row = tl.program_id(0)
    share = tl.program_id(1)
    slot = tl.load(row_slot_ptr + row)
    line_ptr = lines_ptr + slot * _LINE_WIDTH
    best_P = tl.zeros([BLOCK], tl.int64)
    if tl.load(line_ptr + _ACTIVE) != 0:
        length = tl.load(line_ptr + _LENGTH)
        newest_ptr = tokens_ptr + slot.to(tl.int64) * MAX_LEN + length - 1
        newest = tl.load(newest_ptr)
        suffix_len = tl.minimum(length, MAX_MATCH)
        text_ptr = newest_ptr - (length - 1)
        text_len = length
        first = share
        stride = HISTORY_SHARES
        own = share < HISTORY_SHARES
        key_low = tl.load(line_ptr + _MEMORY_KEY)
        key_high = tl.load(line_ptr + _MEMORY_KEY + 1)
        if share >= HISTORY_SHARES:
            text_ptr = memory_ptr
            text_len = M
            first = share - HISTORY_SHARES
            stride = SHARES - HISTORY_SHARES
        for start in range(first * BLOCK + 1, text_len, stride * BLOCK):
            position_P = start + tl.arange(0, BLOCK)
            before_P = tl.load(text_ptr + position_P - 1, mask=position_P < text_len, other=-1)
            matches_P = before_P == newest
            # A position at which a text ends has nothing to propose.
            matches_P &= tl.load(text_ptr + position_P, mask=matches_P & (position_P < text_len), other=-1) != -1
            foreign_P = matches_P & (own == 0)
            matches_P &= tl.load(keys_ptr + 2 * position_P, mask=foreign_P, other=key_low) == key_low
            matches_P &= tl.load(keys_ptr + 2 * position_P + 1, mask=foreign_P, other=key_high) == key_high
            match_len_P = matches_P.to(tl.int32)
            compared = 1
            while (compared < suffix_len) & (tl.max(matches_P.to(tl.int32), 0) > 0):
                index_P = position_P - 1 - compared
                token_P = tl.load(text_ptr + index_P, mask=matches_P & (index_P >= 0), other=-1)
                matches_P &= token_P == tl.load(newest_ptr - compared)
                match_len_P += matches_P.to(tl.int32)
                compared += 1
            rank_P = (own.to(tl.int64) << _OWN_BIT) + position_P
            best_P = tl.maximum(
                best_P, tl.where(match_len_P > 0, (match_len_P.to(tl.int64) << _LENGTH_BIT) + rank_P, 0)
            )
    tl.store(best_ptr + row * SHARES + share, tl.max(best_P, 0))


@launched
@triton.jit(do_not_specialize=["M", "MAX_LEN", "SHARES"])
def _draft_kernel(
    row_slot_ptr,
    lines_ptr,
    tokens_ptr,
    memory_ptr,
    best_ptr,
    drafts_ptr,
    match_len_ptr,
    count_ptr,
    M,
    MAX_LEN,
    SHARES,
    K: tl.constexpr,
    MIN_MATCH: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row's best match of all shares, and the tokens that follow it."""
    row = tl.program_id(0)
    share_S = tl.arange(0, _BLOCK_S)
    best = tl.max(tl.load(best_ptr + row * SHARES + share_S, mask=share_S < SHARES, other=0), 0)
    match_len = (best >> _LENGTH_BIT).to(tl.int32)
    own = ((best >> _OWN_BIT) & 1) != 0
    position = (best & 0x7FFFFFFF).to(tl.int32)

    slot = tl.load(row_slot_ptr + row)
    line_ptr = lines_ptr + slot * _LINE_WIDTH
    length = tl.load(line_ptr + _LENGTH)
    limit = tl.minimum(tl.load(line_ptr + _MAX_LENGTH) - length - 1, K)
    if ADAPTIVE:
        limit = tl.minimum(limit, match_len)
    limit = tl.where(match_len >= MIN_MATCH, tl.maximum(limit, 0), 0)

    draft_K = tl.arange(0, BLOCK_K)
    wanted_K = draft_K < limit
    history_ptr = tokens_ptr + slot.to(tl.int64) * MAX_LEN
    # A draft that reaches the end of the history repeats what it began with.
    index_K = position + draft_K % tl.maximum(length - position, 1)
    own_K = tl.load(history_ptr + index_K, mask=wanted_K & own, other=-1)
    index_K = position + draft_K
    remembered_K = tl.load(memory_ptr + index_K, mask=wanted_K & (own == 0) & (index_K < M), other=-1)
    token_K = tl.where(own, own_K, remembered_K)
    count = tl.min(tl.where(token_K == -1, draft_K, BLOCK_K), 0)
    count = tl.minimum(count, limit)

    tl.store(drafts_ptr + row * K + draft_K, tl.where(draft_K < count, token_K, 0), mask=draft_K < K)
    tl.store(match_len_ptr + row, match_len)
    tl.store(count_ptr + row, count)


def lookup(
    row_slot: Tensor,
    lines: Tensor,
    tokens: Tensor,
    memory: Tensor,
    keys: Tensor,
    num_drafts: int,
    min_match: int,
    max_match: int,
    adaptive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `stepgraph.ops.lookup.lookup`."""
    num_rows, max_len = row_slot.shape[0], tokens.stride(0)
    most = max(1, min(MAX_SHARES, PROGRAMS // num_rows))
    history_shares = min(most, triton.cdiv(max_len, BLOCK))
    shares = history_shares + min(most, triton.cdiv(memory.shape[0], BLOCK))
    best_RS = row_slot.new_empty(num_rows, shares, dtype=torch.int64)
    drafts_RK = row_slot.new_empty(num_rows, num_drafts)
    match_len_R, count_R = row_slot.new_empty(num_rows), row_slot.new_empty(num_rows)
    _scan_kernel[(num_rows, shares)](
        row_slot,
        lines,
        tokens,
        memory,
        keys,
        best_RS,
        memory.shape[0],
        max_len,
        history_shares,
        shares,
        MAX_MATCH=max_match,
        BLOCK=BLOCK,
    )
    _draft_kernel[(num_rows,)](
        row_slot,
        lines,
        tokens,
        memory,
        best_RS,
        drafts_RK,
        match_len_R,
        count_R,
        memory.shape[0],
        max_len,
        shares,
        K=num_drafts,
        MIN_MATCH=min_match,
        ADAPTIVE=adaptive,
        BLOCK_K=triton.next_power_of_2(num_drafts),
    )
    return drafts_RK, match_len_R, count_R
