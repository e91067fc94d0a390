"""Steady decoding: step after step has the same rows, and each row goes on as expected.

That is what most steps are. Such a step is planned and read for all rows at once, over the columns of the `RequestTable`, so that
it costs the host a few operations on arrays, however many rows there are; only a row that needs a KV block is looked at by
itself. Whatever else happens is planned or read row by row.

Shapes: R rows, all of the step; N of them that need blocks; S slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.engine.logprobs import add_logprobs
from stepgraph.engine.request import Request, StepUpdates
from stepgraph.engine.request_blocks import RequestBlocks
from stepgraph.engine.request_table import RequestTable
from stepgraph.engine.step_draft import ScheduledStep
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults


class SteadyDecode:
    """Plans the steps of some requests, and takes in their results, for as long as nothing out of the ordinary happens.

    Args:
        requests: all that run, in the order of their rows; see `may_begin`.
        plan: of the step just planned, which is to be repeated.
        table, blocks: the scheduler's.
    """

    def __init__(self, requests: Sequence[Request], plan: StepPlan, table: RequestTable, blocks: RequestBlocks):
        self.plan = replace(plan, deltas=())  # of the steps in which nobody needs a block
        self._step = ScheduledStep(self.plan)
        self._requests = tuple(requests)
        self._table, self._blocks = table, blocks
        self._slots_R, bound_R = plan.row_array
        self._most = int(bound_R.max())  # tokens that a step gives a row
        # Beyond the tokens planned: those of a step, and what a draft model computes of the proposals after it.
        num_drafts_R = np.minimum(plan.num_drafts, [table.max_drafts[slot] for slot, _ in plan.rows])
        written_R = bound_R + np.maximum(num_drafts_R - 1, 0)
        self._advance_2S: npt.NDArray[np.int64] | None = None  # see `RequestTable.plan_all`
        if plan.num_drafts:
            self._advance_2S = np.ones((2, len(table.planned_S)), dtype=np.int64)
            self._advance_2S[1, self._slots_R] = bound_R - 1
            self._outcome_2S = -self._advance_2S  # see `RequestTable.read_all`; what stood is written for each step
        self._written_R = written_R
        # How many tokens may be planned, proposals under way counted, while the next step is within a row's answer; and while it
        # needs no block.
        self._last_R = table.end_S[self._slots_R] - written_R
        self._limit_R = self._limits()
        self._num_sure = 0  # steps to come in which nobody needs a block
        # What the results of each row begin with, and how many proposals they end with.
        self._num_expected = 3 if plan.num_drafts else 4
        expected_R4 = np.full((len(requests), 4), (0, 0, slot_line.RUNNING, 1), dtype=np.int32)
        expected_R4[:, 0], expected_R4[:, 1] = self._slots_R, table.generation_S[self._slots_R]
        self._expected = expected_R4[:, : self._num_expected].tobytes()
        self._drafts = (bound_R - 1).astype(np.int32).tobytes()
        self._appends = [request.output_token_ids.append for request in requests]
        self._reporting = [row for row, request in enumerate(requests) if request.sampling.num_logprobs]

    @staticmethod
    def may_begin(requests: Sequence[Request], plan: StepPlan, table: RequestTable) -> bool:
        """Whether `plan` gives each of `requests` a decode, as the plans of all steps under way do, and can be repeated."""
        if len(plan.rows) != len(requests) or any(request.guide is not None for request in requests):
            return False
        slots_R, bound_R = plan.row_array
        unread_R = table.planned_S[slots_R] + 1 - np.array([request.num_known for request in requests])
        return bool(
            (unread_R == unread_R[0]).all()
            and (table.unread_drafts_S[slots_R] == unread_R * (bound_R - 1)).all()
            and (table.drafts_S[slots_R] == bound_R - 1).all()
        )

    def next_step(self) -> ScheduledStep | None:
        """Plan one more step. None if it would be another: a row ends, or there are not enough blocks."""
        step = self._step
        if self._num_sure:
            self._num_sure -= 1
        else:
            deltas = self._grow()
            if deltas is None:
                return None
            if deltas:
                step = ScheduledStep(replace(self.plan, deltas=deltas))
        self._table.plan_all(self._advance_2S)
        return step

    def read(self, results: StepResults) -> StepUpdates | None:
        """Take in the results of the oldest step under way. None if a row ended or does not go on as it did; nothing has changed
        then."""
        table = results.table
        tokens_R: Iterable[tuple[int, ...]]
        if table[:, : self._num_expected].tobytes() != self._expected:
            return None
        if self._advance_2S is not None:
            if not self._repeats_drafts(table[:, slot_line.OUT_NUM_DRAFTS]):
                return None
            tokens_R = self._take_verified(table)
        else:
            new_R = table[:, slot_line.OUT_TOKENS].tolist()
            for append, token in zip(self._appends, new_R, strict=True):
                append(token)
            tokens_R = zip(new_R, strict=True)
        if results.logprobs is not None:
            tokens_R = list(tokens_R)
            for row in self._reporting:
                first_line = int(table[row, slot_line.OUT_FIRST_SAMPLE])
                add_logprobs(self._requests[row], tokens_R[row], results.logprobs, first_line)
        return StepUpdates(self._requests, tokens_R)

    def _grow(self) -> tuple[tuple[int, int, int], ...] | None:
        """Grant the blocks that the next step needs; None if it cannot be as those before it."""
        table = self._table
        planned_R = table.planned_S.take(self._slots_R)
        if self._advance_2S is not None:
            planned_R += table.unread_drafts_S.take(self._slots_R)
        spare_R = self._limit_R - planned_R
        least = int(spare_R.min())
        deltas: list[tuple[int, int, int]] = []
        if least < 0:
            if (planned_R > self._last_R).any():
                return None
            granted = self._blocks.grant_lacking(self._requests, -spare_R)
            if granted is None:
                return None
            deltas = granted
            self._limit_R = self._limits()
            least = int((self._limit_R - planned_R).min())
        self._num_sure = least // self._most  # more, once the results tell of proposals that fell
        return tuple(deltas)

    def _limits(self) -> npt.NDArray[np.int64]:
        """See `_limit_R`."""
        return np.minimum(self._table.room_S.take(self._slots_R) - self._written_R, self._last_R)

    def _repeats_drafts(self, drafts_R: npt.NDArray[np.int32]) -> bool:
        """Whether the next rows will verify as many proposals, at most, as these did. With other steps under way, that there are
        any is all that counts."""
        if drafts_R.tobytes() == self._drafts:
            return True
        has_drafts_R = np.frombuffer(self._drafts, dtype=np.int32) > 0
        num_unread = self._table.planned[self.plan.rows[0][0]] + 1 - self._requests[0].num_known
        return num_unread > 1 and bool(((drafts_R > 0) == has_drafts_R).all())

    def _take_verified(self, table: npt.NDArray[np.int32]) -> list[tuple[int, ...]]:
        """Take in the rows' new tokens where some are proposals that stood."""
        tokens_R = []
        for request, line in zip(self._requests, table.tolist(), strict=True):
            tokens = line[slot_line.OUT_TOKENS : slot_line.OUT_TOKENS + line[slot_line.OUT_NUM_TOKENS]]
            request.num_draft_tokens += line[slot_line.OUT_NUM_VERIFIED]
            request.count_accepted(line[slot_line.OUT_NUM_ACCEPTED])
            request.output_token_ids += tokens
            tokens_R.append(tuple(tokens))
        self._outcome_2S[0, self._slots_R] = table[:, slot_line.OUT_NUM_TOKENS] - 1
        self._table.read_all(self._outcome_2S)
        return tokens_R
