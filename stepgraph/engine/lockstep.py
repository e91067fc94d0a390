"""Requests that decode in lockstep: step after step has the same rows, and each row goes on as expected.

That is what most steps are. What changes in such a step is kept for all rows at once, so that it costs the host a few operations
on arrays, however many rows there are; only a row that needs a KV block is looked at by itself. Whatever
else happens ends the lockstep: the requests' own counters are brought up to date, and the scheduler goes on row by row.

Shapes: R rows, all of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.engine.blocks import BlockPool
from stepgraph.engine.logprobs import add_logprobs
from stepgraph.engine.request import Request, RequestUpdate, SteadyUpdates
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import StepResults


class Lockstep:
    """Plans the steps of some requests, and takes in their results, for as long as nothing out of the ordinary happens.

    While it lasts, the requests' `planned`, `spread` and `num_unread` are those of its beginning.

    Args:
        requests: all that run, in the order of their rows; see `may_begin`.
        plan: of the step just planned, which is to be repeated.
        blocks: where further blocks come from.
        block_size: tokens per block.
    """

    def __init__(self, requests: Sequence[Request], plan: StepPlan, blocks: BlockPool, block_size: int):
        self.plan = replace(plan, deltas=())
        """Of its steps in which nobody needs a block."""
        self._requests = tuple(requests)
        self._blocks, self._block_size = blocks, block_size
        self._num_unread = requests[0].num_unread

        def each(value: Callable[[Request], int]) -> npt.NDArray[np.int64]:
            return np.fromiter(map(value, requests), dtype=np.int64, count=len(requests))

        self._bound_R = np.array([bound for _, bound in plan.rows])
        self._most = int(self._bound_R.max())  # tokens that a step gives a row
        self._ends = [request.max_length - 1 for request in requests]
        # Positions that have blocks beyond those that steps under way may write, as `Scheduler` counts them.
        num_drafts_R = each(lambda request: min(plan.num_drafts, request.sampling.max_num_drafts))
        written_R = each(lambda request: request.planned + request.spread) + np.maximum(num_drafts_R - 1, 0)
        self._spare_R = each(lambda r: min(len(r.blocks) * block_size, r.max_length - 1)) - written_R
        self._num_behind = 0  # steps planned that `_spare_R` lacks
        self._least_spare = int(self._spare_R.min())  # of any row, or less
        # What the results of each row begin with, and how many proposals they end with.
        expected = [(request.slot, request.generation, slot_line.RUNNING, 1) for request in requests]
        self._num_expected = 3 if plan.num_drafts else 4
        self._expected = np.array(expected, dtype=np.int32)[:, : self._num_expected].tobytes()
        self._drafts = each(lambda request: request.num_drafts).astype(np.int32).tobytes()
        self._appends = [request.output_token_ids.append for request in requests]
        self._reporting = [row for row, request in enumerate(requests) if request.sampling.num_logprobs]

    @staticmethod
    def may_begin(requests: Sequence[Request], plan: StepPlan) -> bool:
        """Whether `plan` gives each of `requests` a decode, as the plans of all steps under way do, and can be repeated."""
        num_unread = requests[0].num_unread
        return len(plan.rows) == len(requests) and all(
            request.guide is None
            and request.num_unread == num_unread
            and request.spread == num_unread * (bound - 1)
            and bound == 1 + request.num_drafts
            for request, (_, bound) in zip(requests, plan.rows, strict=True)
        )

    def next_plan(self) -> StepPlan | None:
        """Plan one more step. None if it would be another: a row ends, or there are not enough blocks."""
        if self._least_spare >= self._most:
            self._least_spare -= self._most
            self._num_behind += 1
            self._num_unread += 1
            return self.plan
        deltas = self._grow()
        if deltas is None:
            return None
        self._num_unread += 1
        return replace(self.plan, deltas=deltas) if deltas else self.plan

    def read(self, results: StepResults) -> Sequence[RequestUpdate] | None:
        """Take in the results of the oldest step under way. None if a row ended or does not go on as it did; nothing has changed
        then."""
        table = results.table
        tokens_R: Iterable[tuple[int, ...]]
        if table[:, : self._num_expected].tobytes() != self._expected:
            return None
        if self.plan.num_drafts:
            if not self._repeats_drafts(table[:, slot_line.OUT_NUM_DRAFTS]):
                return None
            tokens_R = self._take_verified(table)
        else:
            new_R = table[:, slot_line.OUT_TOKENS].tolist()
            for append, token in zip(self._appends, new_R, strict=True):
                append(token)
            tokens_R = zip(new_R, strict=True)
        self._num_unread -= 1
        if results.logprobs is not None:
            tokens_R = list(tokens_R)
            for row in self._reporting:
                first_line = int(table[row, slot_line.OUT_FIRST_SAMPLE])
                add_logprobs(self._requests[row], tokens_R[row], results.logprobs, first_line)
        return SteadyUpdates(self._requests, tokens_R)

    def settle(self) -> None:
        """End it: bring the requests' own counters up to date."""
        for request, (_, bound) in zip(self._requests, self.plan.rows, strict=True):
            request.num_unread = self._num_unread
            request.planned = request.num_known - 1 + self._num_unread
            request.spread = (bound - 1) * self._num_unread

    def _grow(self) -> tuple[tuple[int, int, int], ...] | None:
        """Grant the blocks that the next step needs; None if it cannot be as those before it."""
        self._spare_R -= self._bound_R * (self._num_behind + 1)
        self._num_behind = 0
        short = (self._spare_R < 0).nonzero()[0].tolist()
        lacking = []
        for row, spare in zip(short, self._spare_R[short].tolist(), strict=True):
            room = len(self._requests[row].blocks) * self._block_size
            if min(room, self._ends[row]) - spare > self._ends[row]:
                return None
            lacking.append(-(spare // self._block_size))
        if sum(lacking) > self._blocks.num_free:
            return None
        deltas: list[tuple[int, int, int]] = []
        for row, count in zip(short, lacking, strict=True):
            slot, blocks = self.plan.rows[row][0], self._requests[row].blocks
            room = len(blocks) * self._block_size
            deltas += self._blocks.extend(blocks, count, slot)
            self._spare_R[row] += min(len(blocks) * self._block_size, self._ends[row]) - room
        self._least_spare = int(self._spare_R.min())
        return tuple(deltas)

    def _repeats_drafts(self, drafts_R: npt.NDArray[np.int32]) -> bool:
        """Whether the next rows will verify as many proposals, at most, as these did. With other steps under way, that there are
        any is all that counts."""
        if drafts_R.tobytes() == self._drafts:
            return True
        has_drafts_R = np.frombuffer(self._drafts, dtype=np.int32) > 0
        return self._num_unread > 1 and bool(((drafts_R > 0) == has_drafts_R).all())

    def _take_verified(self, table: npt.NDArray[np.int32]) -> list[tuple[int, ...]]:
        """Take in the rows' new tokens where some are proposals that stood."""
        tokens_R = []
        for request, line in zip(self._requests, table.tolist(), strict=True):
            tokens = line[slot_line.OUT_TOKENS : slot_line.OUT_TOKENS + line[slot_line.OUT_NUM_TOKENS]]
            request.num_draft_tokens += line[slot_line.OUT_NUM_VERIFIED]
            request.count_accepted(line[slot_line.OUT_NUM_ACCEPTED])
            request.output_token_ids += tokens
            tokens_R.append(tuple(tokens))
        self._spare_R += self._bound_R - table[:, slot_line.OUT_NUM_TOKENS]
        return tokens_R
