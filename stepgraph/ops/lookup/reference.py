"""Plain torch definition of `lookup`: every position is compared with all of the suffix.

Shapes: R rows, K drafts, H tokens of history, M tokens of memory, P positions, N tokens of the suffix, newest first.
"""

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line


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
    drafts_RK = row_slot.new_zeros(len(row_slot), num_drafts)
    match_len_R, count_R = row_slot.new_zeros(len(row_slot)), row_slot.new_zeros(len(row_slot))
    for row, slot in enumerate(row_slot.tolist()):
        if not lines[slot, line.ACTIVE]:
            continue
        history_H = tokens[slot, : lines[slot, line.LENGTH]]
        suffix_N = history_H.flip(0)[:max_match]
        match_len, position = _longest(history_H, suffix_N)
        continuation_K = history_H[position:].repeat(num_drafts)[:num_drafts]
        key = lines[slot, line.MEMORY_KEY : line.MEMORY_KEY + line.MEMORY_KEY_WIDTH]
        readable = torch.where((keys == key).all(1), memory, -1)
        memory_len, position = _longest(readable, suffix_N)
        if memory_len > match_len:
            match_len = memory_len
            continuation_K = memory[position : position + num_drafts]
            continuation_K = continuation_K[(continuation_K != -1).cumprod(0).bool()]
        room = int(lines[slot, line.MAX_LENGTH]) - len(history_H) - 1
        bound = min(room, match_len) if adaptive else room
        count = max(0, min(len(continuation_K), bound)) if match_len >= min_match else 0
        drafts_RK[row, :count] = continuation_K[:count]
        match_len_R[row], count_R[row] = match_len, count
    return drafts_RK, match_len_R, count_R


def _longest(text_M: Tensor, suffix_N: Tensor) -> tuple[int, int]:
    """Length of the longest match in a text, and the highest position that has it; (0, 0) without any."""
    position_P = torch.arange(1, max(1, len(text_M)), device=text_M.device)
    position_P = position_P[text_M[position_P] != -1]
    if not len(position_P):
        return 0, 0
    before_PN = position_P.unsqueeze(1) - 1 - torch.arange(len(suffix_N), device=text_M.device)
    equal_PN = (text_M[before_PN.clamp(min=0)] == suffix_N) & (before_PN >= 0)
    match_len_P = equal_PN.cumprod(1).sum(1)
    longest = int(match_len_P.max())
    return (longest, int(position_P[match_len_P == longest][-1])) if longest else (0, 0)
