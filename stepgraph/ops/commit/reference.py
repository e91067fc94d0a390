"""Plain torch definition of `commit`; also its CPU kernel. Shapes: R rows, L columns of a slot line.

Rows that must not write are pointed at the null slot, with the zeros it already holds.
"""

import torch
from torch import Tensor

from stepgraph.ops import slot_line as line


def commit(
    lines: Tensor,
    tokens: Tensor,
    counter: Tensor,
    ring: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    sampled: Tensor,
) -> None:
    """See `stepgraph.ops.commit.commit`."""
    num_rows = row_slot.shape[0]
    lines_RL = lines.index_select(0, row_slot)
    length_R = lines_RL[:, line.LENGTH]
    ran_R = query_start[1:] > query_start[:-1]
    emits_R = ran_R & (kv_len == length_R)
    appends_R = emits_R & (sampled != line.NO_TOKEN)
    new_length_R = length_R + appends_R
    stops_RS = lines_RL[:, line.STOP_TOKENS : line.STOP_TOKENS + line.MAX_STOP_TOKENS]
    stopped_R = (stops_RS == sampled.unsqueeze(1)).any(1)
    full_R = new_length_R >= lines_RL[:, line.MAX_LENGTH]
    end_R = torch.where(stopped_R, line.FINISHED_STOP, torch.where(full_R, line.FINISHED_LENGTH, line.RUNNING))
    finish_R = (torch.where(appends_R, end_R, line.FINISHED_ERROR) * emits_R).to(torch.int32)
    still_active_R = lines_RL[:, line.ACTIVE] * (finish_R == line.RUNNING)

    tokens.index_put_((row_slot * appends_R, length_R * appends_R), sampled * appends_R)
    state_R3 = torch.stack((new_length_R, kv_len, still_active_R), dim=1) * ran_R.unsqueeze(1)
    lines[:, line.LENGTH : line.ACTIVE + 1].index_put_(((row_slot * ran_R),), state_R3.to(torch.int32))

    token_R = torch.where(emits_R, sampled, line.NO_TOKEN)
    report_1RO = torch.stack((row_slot, lines_RL[:, line.GENERATION], token_R, finish_R), dim=1).unsqueeze(0)
    ring[:, :num_rows].index_copy_(0, (counter % ring.shape[0]).long(), report_1RO)
    counter.copy_(
        (counter + 1) % ring.shape[0]
    )  # not add_(1): an in-place call on nothing but constants is run, not only traced
