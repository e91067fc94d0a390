"""Plain torch definitions of the drafting operators; also their CPU kernels. Shapes: T tokens, R rows, K proposals of a row."""

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.rows import row_of


def _room(lines_RL: Tensor) -> Tensor:
    """[R] int32: proposals the rows' requests take now."""
    length_R = lines_RL[:, line.LENGTH]
    drafts_R = lines_RL[:, line.ACTIVE] * (lines_RL[:, line.COMPUTED] == length_R - 1)
    room_R = torch.minimum(lines_RL[:, line.MAX_NUM_DRAFTS], lines_RL[:, line.MAX_LENGTH] - length_R - 1)
    return (room_R.clamp(min=0) * drafts_R).to(torch.int32)


def draft_inputs(
    lines: Tensor, tokens: Tensor, row_slot: Tensor, query_start: Tensor, kv_len: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `stepgraph.ops.draft.draft_inputs`."""
    lines_RL = lines.index_select(0, row_slot)
    start_R, end_R = query_start[:-1], query_start[1:]
    drafts_R = (_room(lines_RL) > 0) & (end_R > start_R)
    index_R = (end_R - 1 - (kv_len - lines_RL[:, line.COMPUTED])) * drafts_R

    token_T = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    row_T = row_of(token_T, end_R)
    real_T = token_T < end_R[-1]
    slot_T = row_slot.index_select(0, row_T) * real_T
    return tokens[slot_T, (positions + 1) * real_T], row_slot * drafts_R, index_R


def draft_row_tokens(
    lines: Tensor, block_table: Tensor, slot: Tensor, place: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `stepgraph.ops.draft.draft_row_tokens`."""
    lines_RL = lines.index_select(0, slot)
    runs_R = _room(lines_RL) > place
    slot_R = slot * runs_R
    position_R = (lines_RL[:, line.COMPUTED] - 1 + place) * runs_R
    kv_slot_R = block_table[slot_R, position_R // block_size] * block_size + position_R % block_size
    query_start = torch.arange(slot.shape[0] + 1, dtype=torch.int32, device=slot.device)
    return position_R, kv_slot_R, slot_R, query_start, position_R + 1


def propose(
    lines: Tensor, tokens: Tensor, counter: Tensor, ring: Tensor, row_slot: Tensor, drafts: Tensor, count: Tensor
) -> None:
    """See `stepgraph.ops.draft.propose`."""
    num_rows, num_drafts = drafts.shape
    lines_RL = lines.index_select(0, row_slot)
    count_R = torch.minimum(count.clamp(0, num_drafts), _room(lines_RL))
    place_K = torch.arange(num_drafts, dtype=torch.int32, device=drafts.device)
    written_RK = place_K < count_R.unsqueeze(1)
    position_RK = (lines_RL[:, line.LENGTH].unsqueeze(1) + place_K) * written_RK
    slot_RK = row_slot.unsqueeze(1) * written_RK
    tokens.index_put_((slot_RK, position_RK), drafts * written_RK)
    lines[:, line.NUM_DRAFTS].index_put_((row_slot,), count_R)
    entry = ((counter + ring.shape[0] - 1) % ring.shape[0]).long()
    rows = ring[:, :num_rows]
    rows[:, :, line.OUT_NUM_DRAFTS].index_copy_(0, entry, count_R.unsqueeze(0))
    rows[:, :, line.OUT_DRAFTS : line.OUT_DRAFTS + num_drafts].index_copy_(0, entry, drafts.unsqueeze(0))
