"""What comes back of a step, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.step.log import StepRecord
from stepgraph.step.plan import StepPlan


class RowResult(NamedTuple):
    """What one row of a step produced. The first fields are the output ring's columns, see `stepgraph.abi.slot_line`."""

    slot: int
    generation: int
    finish: int  # RUNNING or one of the FINISHED codes
    num_tokens: int
    num_verified: int = 0  # proposals it ran
    num_accepted: int = 0  # of these, the first so many are among `tokens`
    first_sample: int = 0  # line of the first token in `StepResults.logprobs`
    num_drafts: int = 0  # proposals for the next step
    tokens: Sequence[int] = ()  # none if the row was a chunk of a prompt, or did not run


class StepResults(NamedTuple):
    """What one step produced, in the plan's order of rows and tokens."""

    table: npt.NDArray[np.int32]
    """[rows, OUT_TOKENS + 1 + K], contiguous; columns as in `stepgraph.abi.slot_line`."""
    logprobs: npt.NDArray[np.int32] | None = None
    """[samples, LOGPROB_WIDTH], see `stepgraph.abi.slot_line`; lines of samples that did not ask are old. None if plain."""
    prompt_logprobs: npt.NDArray[np.int32] | None = None
    """[tokens, LOGPROB_WIDTH], likewise; tokens lie where the plan puts them if every row before runs in full."""
    drafts: npt.NDArray[np.int32] | None = None
    """[rows, K] proposals for the next step, of which `RowResult.num_drafts` count. None if the step made none."""
    ranks: tuple[StepResults, ...] = ()
    """Where ranks have requests of their own: what each of them produced. `table` is then of all, as the joined plan has the
    rows; what else there is, is only here."""

    @property
    def rows(self) -> list[RowResult]:
        """The table, row by row; made anew by each call."""
        first = slot_line.OUT_TOKENS
        return [
            RowResult._make((*line[:first], line[first : first + line[slot_line.OUT_NUM_TOKENS]]))
            for line in self.table.tolist()
        ]

    def outcomes(self, start: int = 0) -> list[tuple[int, int, int]]:
        """Of each row from `start` on: new tokens, proposals verified, proposals that stood."""
        columns = self.table[start:, slot_line.OUT_NUM_TOKENS : slot_line.OUT_NUM_ACCEPTED + 1]
        return list(map(tuple, columns.tolist()))

    @classmethod
    def joined(cls, ranks: Sequence[StepResults], plan: StepPlan) -> StepResults:
        """Results of a plan that ranks with requests of their own have run."""
        pairs = list(zip(ranks, plan.ranks, strict=True))
        prompts = [results.table[: own.num_prefill_rows] for results, own in pairs]
        decodes = [results.table[own.num_prefill_rows :] for results, own in pairs]
        return cls(np.concatenate((*prompts, *decodes)), ranks=tuple(ranks))

    @classmethod
    def of(cls, rows: Sequence[RowResult], logprobs: npt.NDArray[np.int32] | None = None) -> StepResults:
        """Results of a step that ran somewhere else than on a device."""
        width = slot_line.OUT_TOKENS + max((1, *(len(row.tokens) for row in rows)))
        table = np.zeros((len(rows), width), dtype=np.int32)
        for line, row in zip(table, rows, strict=True):
            line[: slot_line.OUT_TOKENS + len(row.tokens)] = (*row[: slot_line.OUT_TOKENS], *row.tokens)
        return cls(table, logprobs)


class Ticket(NamedTuple):
    """A launched step whose results have not been read."""

    step: int
    plan: StepPlan
    record: StepRecord
