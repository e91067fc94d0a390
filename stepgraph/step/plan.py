"""What the scheduler decides for one step. Host objects, complete at birth."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

from stepgraph.step.shape import StepShape, Variant


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
    """Block-table entries to set before the step: (slot, index, block)."""
    num_prefill_rows: int
    """Rows that compute prompt tokens."""
    variant: Variant = Variant.PLAIN
    """The least that its rows need."""
    num_drafts: int = 0
    """Proposals to make for each row, at most; no row verifies more."""
    epoch: int | None = None
    """Plans of one epoch decode the same rows and differ in their deltas only, so what is known of one holds for all. Whoever
    makes the plans of a runner numbers them, ascending; None is like no other plan."""

    @cached_property
    def num_tokens(self) -> int:
        """Upper bound of the tokens the step runs."""
        return sum(query_len for _, query_len in self.rows)

    @property
    def kind(self) -> StepKind:
        if self.num_prefill_rows == 0:
            return StepKind.DECODE
        return StepKind.PREFILL if self.num_prefill_rows == len(self.rows) else StepKind.MIXED

    def pack(self, shape: StepShape, block_size: int, out: npt.NDArray[np.int32], start: int = 0) -> None:
        """Write the plan for the device: rows, then deltas, each padded with zeros (null slot, null block).

        Args:
            shape: captured sizes the plan fits into.
            block_size: tokens per KV block.
            out: [plan_length] int32, overwritten from `start` on.
            start: `shape.deltas_start` where the rows lie on the device already, else 0.
        """
        assert len(self.deltas) <= shape.num_deltas(block_size), (len(self.deltas), shape)
        out[start:] = 0
        if start == 0:
            assert self.num_tokens <= shape.num_tokens, (self.num_tokens, shape)
            assert len(self.rows) <= shape.num_rows, (len(self.rows), shape)
            _put(self.rows, out)
        _put(self.deltas, out[shape.deltas_start :])


def _put(entries: tuple[tuple[int, ...], ...], out: npt.NDArray[np.int32]) -> None:
    """Write entries of equal length to where `out` begins."""
    if entries:
        flat = np.fromiter(chain.from_iterable(entries), dtype=np.int32, count=len(entries) * len(entries[0]))
        out[: flat.size] = flat
