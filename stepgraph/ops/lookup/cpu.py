"""`lookup` on the CPU: positions after the newest token are collected once, then thinned out a token of the suffix at a time.

Shapes: R rows, K drafts, S slots, L columns of a slot line, H tokens of history, M tokens of memory, P positions.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stepgraph.abi import slot_line as line

Ints = npt.NDArray[np.integer]


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
    """See `stepgraph.ops.lookup.lookup`. Reads tensor values: opaque to a recording."""
    drafts_RK = row_slot.new_zeros(len(row_slot), num_drafts)
    match_len_R, count_R = row_slot.new_zeros(len(row_slot)), row_slot.new_zeros(len(row_slot))
    lines_SL, tokens_SH, memory_M = lines.numpy(), tokens.numpy(), memory.numpy()
    keys_M = keys.numpy().view(np.int64).ravel()
    line_keys_S = lines_SL[:, line.MEMORY_KEY : line.MEMORY_KEY + line.MEMORY_KEY_WIDTH].copy().view(np.int64).ravel()
    for row, slot in enumerate(row_slot.tolist()):
        if not lines_SL[slot, line.ACTIVE]:
            continue
        length = int(lines_SL[slot, line.LENGTH])
        history_H = tokens_SH[slot, :length]
        own_len, own_position = _longest(history_H, _following(history_H, history_H[-1]), history_H, max_match)
        remembered_len, position = 0, 0
        if own_len < max_match:
            position_P = _following(memory_M, history_H[-1])
            remembered_len, position = _longest(memory_M, position_P, history_H, max_match)
            # The longest of all, if it is its own, is the longest of its own: then the thousands of places of a common token
            # need no look.
            if remembered_len and keys_M[position] != line_keys_S[slot]:
                position_P = position_P[keys_M[position_P] == line_keys_S[slot]]
                remembered_len, position = _longest(memory_M, position_P, history_H, max_match)
        match_len = max(own_len, remembered_len)
        room = int(lines_SL[slot, line.MAX_LENGTH]) - length - 1
        wanted = max(0, min(num_drafts, room, match_len if adaptive else num_drafts)) if match_len >= min_match else 0
        if own_len == match_len:
            draft_K = np.resize(history_H[own_position:], wanted)  # repeats it
        else:
            draft_K = memory_M[position : position + wanted]
            draft_K = draft_K[np.logical_and.accumulate(draft_K != -1)]
        drafts_RK.numpy()[row, : len(draft_K)] = draft_K
        match_len_R[row], count_R[row] = match_len, len(draft_K)
    return drafts_RK, match_len_R, count_R


def _following(text_M: Ints, newest: np.integer) -> Ints:
    """The positions in a text after `newest`, ascending."""
    position_P = np.flatnonzero(text_M[:-1] == newest) + 1
    return position_P[text_M[position_P] != -1]


def _longest(text_M: Ints, position_P: Ints, history_H: Ints, max_match: int) -> tuple[int, int]:
    """Length of the longest match at one of some positions in a text, and the highest that has it; (0, 0) without any."""
    if not len(position_P):
        return 0, 0
    longest = min(max_match, len(history_H))
    newest = int(position_P[-1])
    if newest >= longest and np.array_equal(text_M[newest - longest : newest], history_H[-longest:]):
        return longest, newest  # a history that repeats itself would make every position below last to the end
    match_len = 1
    while match_len < longest:
        longer_P = position_P[np.searchsorted(position_P, match_len, side="right") :]
        longer_P = longer_P[text_M[longer_P - 1 - match_len] == history_H[-1 - match_len]]
        if not len(longer_P):
            break
        position_P = longer_P
        match_len += 1
    return match_len, int(position_P[-1])
