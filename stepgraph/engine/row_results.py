"""Taking in a step's results: rows that gained a token and go on together, others row by row.

Shapes: R rows, all of a step; N of them that gained a token and go on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.engine.logprobs import add_logprobs
from stepgraph.engine.request import FinishReason, Request, RequestUpdate, StepUpdates
from stepgraph.engine.request_table import MANY_ROWS, RequestTable
from stepgraph.errors import Fault
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults
from stepgraph.step.shape import Variant

_FINISH_REASONS = {
    slot_line.RUNNING: None,
    slot_line.FINISHED_STOP: FinishReason.STOP,
    slot_line.FINISHED_LENGTH: FinishReason.LENGTH,
    slot_line.FINISHED_ERROR: FinishReason.ERROR,
}


def read_rows(
    plan: StepPlan, results: StepResults, by_slot: Mapping[int, Request], table: RequestTable
) -> tuple[StepUpdates, list[tuple[int, int, int]]]:
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
    is_plain_R = _are_plain(plan, results, table)
    plain_N = results.table[is_plain_R]
    going_on = [by_slot[slot] for slot in plain_N[:, slot_line.OUT_SLOT].tolist()]
    new_N = plain_N[:, slot_line.OUT_TOKENS].tolist()
    for one, token in zip(going_on, new_N, strict=True):
        one.output_token_ids.append(token)
    updates, outcomes = [], []
    for index, line in zip((~is_plain_R).nonzero()[0].tolist(), results.table[~is_plain_R].tolist(), strict=True):
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
    return StepUpdates(going_on, zip(new_N, strict=True), updates), outcomes


def _are_plain(plan: StepPlan, results: StepResults, table: RequestTable) -> npt.NDArray[np.bool_]:
    """[R]: which rows gained just a token, of requests that go on and want nothing else."""
    if plan.num_drafts or len(plan.rows) < MANY_ROWS:
        return np.zeros(len(plan.rows), dtype=np.bool_)
    lines = results.table
    slots_R = lines[:, slot_line.OUT_SLOT]
    is_plain_R: npt.NDArray[np.bool_] = (
        (lines[:, slot_line.OUT_GENERATION] == table.generation_S[slots_R])
        & (lines[:, slot_line.OUT_FINISH] == slot_line.RUNNING)
        & (lines[:, slot_line.OUT_NUM_TOKENS] == 1)
        & (table.variant_S[slots_R] == Variant.PLAIN)
    )
    return is_plain_R
