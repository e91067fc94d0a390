"""Plain torch definition of `commit`; also its CPU kernel.

Rows that must not write are pointed at the null slot, with the zeros it already holds.

Shapes: R rows, J = 1 + K samples a row has at most, L columns of a slot line, N stop tokens.
"""

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line


def commit(
    lines: Tensor,
    tokens: Tensor,
    counter: Tensor,
    ring: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    sample_start: Tensor,
    sampled: Tensor,
    num_drafts: int,
    fault: Tensor | None = None,
) -> None:
    """See `stepgraph.ops.commit.commit`."""
    num_rows = row_slot.shape[0]
    lines_RL = lines.index_select(0, row_slot)
    length_R = lines_RL[:, line.LENGTH]
    ran_R = query_start[1:] > query_start[:-1]
    num_samples_R = sample_start[1:] - sample_start[:-1]
    if fault is not None:
        ran_R, num_samples_R = ran_R & (fault == 0), num_samples_R * (fault == 0)

    offset_J = torch.arange(1 + num_drafts, dtype=torch.int32, device=lines.device)
    real_RJ = offset_J < num_samples_R.unsqueeze(1)
    sample_RJ = (sample_start[:-1].unsqueeze(1) + offset_J).clamp(max=sampled.shape[0] - 1)
    sampled_RJ = torch.where(real_RJ, sampled[sample_RJ], line.NO_TOKEN)
    position_RJ = length_R.unsqueeze(1) + offset_J
    proposed_RJ = offset_J < num_samples_R.unsqueeze(1) - 1
    right_RJ = proposed_RJ & (tokens[row_slot.unsqueeze(1), position_RJ * proposed_RJ] == sampled_RJ)
    stops_R1N = lines_RL[:, None, line.STOP_TOKENS : line.STOP_TOKENS + line.MAX_STOP_TOKENS]
    failed_RJ = sampled_RJ == line.NO_TOKEN
    stopped_RJ = (stops_R1N == sampled_RJ.unsqueeze(2)).any(2) & ~failed_RJ
    full_RJ = position_RJ + 1 >= lines_RL[:, line.MAX_LENGTH].unsqueeze(1)
    goes_on_RJ = right_RJ & ~(failed_RJ | stopped_RJ | full_RJ)
    # A sample counts if the request goes on after every sample before it.
    counts_RJ = real_RJ & torch.cat((real_RJ[:, :1], goes_on_RJ[:, :-1].cumprod(1, dtype=torch.int32).bool()), dim=1)

    num_counting_R = counts_RJ.sum(1, dtype=torch.int32)
    emits_R = num_counting_R > 0
    last_R1 = (num_counting_R - 1).clamp(min=0).unsqueeze(1).long()
    failed_R, stopped_R, full_R = (x_RJ.gather(1, last_R1).squeeze(1) for x_RJ in (failed_RJ, stopped_RJ, full_RJ))
    end_R = torch.where(stopped_R, line.FINISHED_STOP, torch.where(full_R, line.FINISHED_LENGTH, line.RUNNING))
    finish_R = (torch.where(failed_R, line.FINISHED_ERROR, end_R) * emits_R).to(torch.int32)
    still_active_R = lines_RL[:, line.ACTIVE] * (finish_R == line.RUNNING)
    num_tokens_R = num_counting_R - (failed_R & emits_R).to(torch.int32)
    new_computed_R = torch.where(emits_R, length_R + num_counting_R - 1, kv_len)

    # The tokens before the last are the proposals that lie there already.
    appends_R = num_tokens_R > 0
    last_token_R = sampled_RJ.gather(1, (num_tokens_R - 1).clamp(min=0).unsqueeze(1).long()).squeeze(1)
    tokens.index_put_((row_slot * appends_R, (length_R + num_tokens_R - 1) * appends_R), last_token_R * appends_R)
    state_R3 = torch.stack((length_R + num_tokens_R, new_computed_R, still_active_R), dim=1) * ran_R.unsqueeze(1)
    lines[:, line.LENGTH : line.ACTIVE + 1].index_put_(((row_slot * ran_R),), state_R3.to(torch.int32))
    lines[:, line.NUM_DRAFTS].index_put_((row_slot,), torch.zeros_like(row_slot))

    report_R8 = torch.stack(
        (
            row_slot,
            lines_RL[:, line.GENERATION],
            finish_R,
            num_tokens_R,
            (num_samples_R - 1).clamp(min=0),
            (counts_RJ & right_RJ).sum(1, dtype=torch.int32),
            sample_start[:-1],
            torch.zeros_like(row_slot),
        ),
        dim=1,
    )
    report_1RO = torch.cat((report_R8, sampled_RJ), dim=1).unsqueeze(0)
    ring[:, :num_rows, : report_1RO.shape[2]].index_copy_(0, (counter % ring.shape[0]).long(), report_1RO)
    counter.copy_(
        (counter + 1) % ring.shape[0]
    )  # not add_(1): an in-place call on nothing but constants is run, not only traced
