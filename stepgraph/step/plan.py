"""What the scheduler decides for one step. Host objects, complete at birth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.step.shape import StepShape, Variant


@dataclass(frozen=True)
class BlockTables:
    """Where the device keeps which blocks requests have: a table for each block group, one behind the other."""

    block_size: int
    """Tokens of a place; see `stepgraph.abi.block_groups`."""
    splits: tuple[int, ...] = (1,)
    """Of each group, the blocks of a place."""
    num_slots: int = 0
    """Lines of a table; of no interest where there is one."""

    @property
    def per_place(self) -> int:
        """Blocks of a place, of all groups."""
        return sum(self.splits)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per block of each group."""
        return tuple(self.block_size // split for split in self.splits)

    def by_group(self, blocks: Sequence[int]) -> Iterator[npt.NDArray[np.int32]]:
        """The blocks of whole places, as a request's list has them, group by group as their tables do."""
        of_places = np.array(blocks, dtype=np.int32).reshape(-1, self.per_place)
        for split, end in zip(self.splits, accumulate(self.splits), strict=True):
            yield of_places[:, end - split : end].ravel()

    def entries(self, blocks: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Where blocks belong, given by their numbers in a request's list: (group, index in the line of its table)."""
        place, number = np.divmod(blocks, self.per_place)
        group, split, first = self._by_number[:, number]
        return group, place * split + number - first

    @cached_property
    def _by_number(self) -> npt.NDArray[np.int32]:
        """[3, per_place]: of each block of a place its group, the group's blocks of a place, and the first one's number."""
        firsts = np.cumsum(self.splits) - self.splits
        of_groups = np.array((range(len(self.splits)), self.splits, firsts), dtype=np.int32)
        return of_groups.repeat(self.splits, axis=1)


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
        return int(self.row_array[1].sum())

    @cached_property
    def row_array(self) -> npt.NDArray[np.int64]:
        """[2, rows]: the slots of `rows`, and their query length bounds."""
        flat = np.fromiter(chain.from_iterable(self.rows), dtype=np.int64, count=2 * len(self.rows))
        return np.ascontiguousarray(flat.reshape(-1, 2).T)

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
        assert len(self.deltas) <= shape.num_deltas(tables.block_size, tables.per_place), (len(self.deltas), shape)
        out[start:] = 0
        if start == 0:
            assert self.num_tokens <= shape.num_tokens, (self.num_tokens, shape)
            assert len(self.rows) <= shape.num_rows, (len(self.rows), shape)
            rows_2R = out[: slot_line.ROW_WIDTH * len(self.rows)].reshape(-1, slot_line.ROW_WIDTH).T
            rows_2R[:] = self.row_array
            rows_2R[0] -= first_slot
        _put(self.deltas, out[shape.deltas_start :], first_slot)
        if tables.per_place > 1 and self.deltas:
            deltas = out[shape.deltas_start :][: slot_line.DELTA_WIDTH * len(self.deltas)]
            group, index = tables.entries(deltas[1 :: slot_line.DELTA_WIDTH])
            deltas[:: slot_line.DELTA_WIDTH] += group * tables.num_slots
            deltas[1 :: slot_line.DELTA_WIDTH] = index


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
