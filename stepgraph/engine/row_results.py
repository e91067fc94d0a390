"""Taking in a step's results row by row."""

from __future__ import annotations

from collections.abc import Mapping

from stepgraph.abi import slot_line
from stepgraph.engine.logprobs import add_logprobs
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.engine.request_table import RequestTable
from stepgraph.errors import Fault
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults

_FINISH_REASONS = {
    slot_line.RUNNING: None,
    slot_line.FINISHED_STOP: FinishReason.STOP,
    slot_line.FINISHED_LENGTH: FinishReason.LENGTH,
    slot_line.FINISHED_ERROR: FinishReason.ERROR,
}


def read_rows(
    plan: StepPlan, results: StepResults, by_slot: Mapping[int, Request], table: RequestTable
) -> tuple[list[RequestUpdate], list[tuple[int, int, int]]]:
    """Take in the new tokens of the oldest step under way. Rows of requests that have left their slot since are dropped.

    Args:
        plan: the step's.
        results: what came of it.
        by_slot: the requests that run.
        table: their counts.

    Returns:
        What each request gained, and of each decode that gained anything, if the step made proposals: new tokens, proposals
        verified, proposals that stood.
    """
    updates, outcomes = [], []
    for index, line in enumerate(results.table.tolist()):
        slot, generation, finish, num_tokens, num_verified, num_accepted, first_sample, num_drafts, *new = line
        request = by_slot.get(slot)
        if request is None or request.generation != generation:
            continue
        tokens = tuple(new[:num_tokens])
        if not tokens and finish == slot_line.RUNNING:
            continue
        if request.guide is not None:
            drafts = results.drafts
            request.draft_token_ids = () if drafts is None else drafts[index, :num_drafts].tolist()
        if plan.num_drafts:
            num_verifiable = 0
            if index >= plan.num_prefill_rows:
                num_verifiable = plan.rows[index][1] - 1
                request.num_draft_tokens += num_verified
                request.count_accepted(num_accepted)
                outcomes.append((num_tokens, num_verified, num_accepted))
            is_last = (
                num_drafts != table.drafts[slot] and table.planned[slot] == request.num_known
            )  # matters if they differ
            table.read(slot, num_verifiable, num_tokens - 1, num_drafts, is_last)
        request.output_token_ids += tokens
        add_logprobs(request, tokens, results.logprobs, first_sample)
        reason = _FINISH_REASONS[finish]
        if reason is FinishReason.STOP:
            request.stop_token = tokens[-1]
        elif reason is FinishReason.ERROR:
            request.error = Fault("no token could be sampled: every logit was NaN or ruled out", is_users=False)
        updates.append(RequestUpdate(request, tokens, reason))
    return updates, outcomes
