"""What the scheduler decides for one step. Host objects, complete at birth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.step.shape import StepShape, Variant


class BlockTables(NamedTuple):
    """Where the device keeps which blocks requests have: a table for each block group, one behind the other."""

    block_size: int
    """Tokens per block."""
    num_groups: int = 1
    num_slots: int = 0
    """Lines of a table; of no interest where there is one."""


class StepKind(StrEnum):
    """What a step's rows do; for people and metrics, never for the program."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True)
class StepPlan:
    """One step: which slots run, and at most how many tokens each."""

    rows: tuple[tuple[int, int], ...]
    """(slot, query length bound); a slot appears once."""
    deltas: tuple[tuple[int, int, int], ...]
    """Blocks granted before the step: (slot, index in the request's list, block); see `stepgraph.abi.block_groups`."""
    num_prefill_rows: int
    """Rows that compute prompt tokens."""
    variant: Variant = Variant.PLAIN
    """The least that its rows need."""
    num_drafts: int = 0
    """Proposals to make for each row, at most; no row verifies more."""
    epoch: int | None = None
    """Plans of one epoch decode the same rows and differ in their deltas only, so what is known of one holds for all. Whoever
    makes the plans of a runner numbers them, ascending; None is like no other plan."""
    ranks: tuple[StepPlan, ...] = ()
    """Where ranks have requests of their own: what each of them runs, in their order, a step of one shape and variant. The fields
    above are then of all, rows of prompts first, but for the deltas, which are only here."""

    @classmethod
    def joined(cls, ranks: Sequence[StepPlan], epoch: int) -> StepPlan:
        """What ranks with requests of their own run in one step, each its plan of as many proposals as the others."""
        prompts: list[tuple[int, int]] = []
        decodes: list[tuple[int, int]] = []
        for plan in ranks:
            prompts += plan.rows[: plan.num_prefill_rows]
            decodes += plan.rows[plan.num_prefill_rows :]
        return cls(
            rows=(*prompts, *decodes),
            deltas=(),
            num_prefill_rows=len(prompts),
            variant=max(plan.variant for plan in ranks),
            num_drafts=ranks[0].num_drafts,
            epoch=epoch,
            ranks=tuple(ranks),
        )

    @cached_property
    def num_tokens(self) -> int:
        """Upper bound of the tokens the step runs."""
        return sum(query_len for _, query_len in self.rows)

    @property
    def num_ranks(self) -> int:
        """Ranks that have rows of their own; 1 where all run the same."""
        return max(1, len(self.ranks))

    @property
    def most_tokens(self) -> int:
        """Upper bound of the tokens that a rank runs."""
        return max(plan.num_tokens for plan in self.ranks) if self.ranks else self.num_tokens

    @property
    def most_rows(self) -> int:
        """Most rows that a rank runs."""
        return max(len(plan.rows) for plan in self.ranks) if self.ranks else len(self.rows)

    @property
    def kind(self) -> StepKind:
        if self.num_prefill_rows == 0:
            return StepKind.DECODE
        return StepKind.PREFILL if self.num_prefill_rows == len(self.rows) else StepKind.MIXED

    def pack(
        self, shape: StepShape, tables: BlockTables, out: npt.NDArray[np.int32], start: int = 0, first_slot: int = 0
    ) -> None:
        """Write the plan for the device: rows, then deltas, each padded with zeros (null slot, null block).

        Args:
            shape: captured sizes the plan fits into.
            tables: that the deltas are for.
            out: [plan_length] int32, overwritten from `start` on.
            start: `shape.deltas_start` where the rows lie on the device already, else 0.
            first_slot: what the device calls slot n is `first_slot` + n here.
        """
        num_groups = tables.num_groups
        assert len(self.deltas) <= shape.num_deltas(tables.block_size, num_groups), (len(self.deltas), shape)
        out[start:] = 0
        if start == 0:
            assert self.num_tokens <= shape.num_tokens, (self.num_tokens, shape)
            assert len(self.rows) <= shape.num_rows, (len(self.rows), shape)
            _put(self.rows, out, first_slot)
        _put(self.deltas, out[shape.deltas_start :], first_slot)
        if num_groups > 1 and self.deltas:
            deltas = out[shape.deltas_start :][: slot_line.DELTA_WIDTH * len(self.deltas)]
            place, group = np.divmod(deltas[1 :: slot_line.DELTA_WIDTH], num_groups)
            deltas[:: slot_line.DELTA_WIDTH] += group * tables.num_slots
            deltas[1 :: slot_line.DELTA_WIDTH] = place


IDLE_EPOCH = -1
"""Of plans without rows."""


def idle_plan(num_drafts: int) -> StepPlan:
    """What a rank runs that has nothing to do, where others have."""
    return StepPlan((), (), 0, num_drafts=num_drafts, epoch=IDLE_EPOCH)


def _put(entries: tuple[tuple[int, ...], ...], out: npt.NDArray[np.int32], first_slot: int) -> None:
    """Write entries of equal length, which begin with slots, to where `out` begins."""
    if entries:
        width = len(entries[0])
        flat = np.fromiter(chain.from_iterable(entries), dtype=np.int32, count=len(entries) * width)
        if first_slot:
            flat[::width] -= first_slot
        out[: flat.size] = flat
