"""LockstepExecutor: devices of which each has requests of its own, and which share experts only: all launch every step together.

The ranks run the same graph at the same time, for in it they exchange tokens, but each on its own rows, with its own slots and KV
cache. A rank that has nothing to run launches the graph on a plan without rows.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from stepgraph.executor.leading import LeadingExecutor
from stepgraph.executor.local import LocalExecutor
from stepgraph.executor.orders import words_of_admission, words_of_parts
from stepgraph.executor.ring import NOTHING, Kind, Words
from stepgraph.executor.workers import NotAdmitted
from stepgraph.step.admission import Admission
from stepgraph.step.output_rings import OutputReader
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.shape import StepShape

_SPIN_S = 50e-6
"""Ranks end a step within some microseconds of each other: in its last layer, each has waited for all."""
_NAP_S = 20e-6


class LockstepExecutor(LeadingExecutor):
    """See `LeadingExecutor`. Slots of rank r are numbered from r · `max_num_seqs` + 1 on; see `StepPlan.ranks`. What the ranks
    have computed, this process reads where their devices write it."""

    def __init__(self, local: LocalExecutor, *args: Any, **options: Any) -> None:
        super().__init__(local, *args, **options)
        shared = self.runner.shared_rings
        assert shared is not None
        self._readers = [OutputReader(rings) for rings in shared.of_ranks[1:]]
        self._num_slots = self.runner.state.lines.shape[0] - 1  # of a rank, the null slot not counted
        length = self.runner.state.plan.shape[0]
        self._packed = [np.zeros(length, dtype=np.int32) for _ in self._readers]
        """Plans of the other ranks, on their way to them."""

    def admit(self, admission: Admission) -> None:
        """See `Executor.admit`. If it is another rank's, that does it meanwhile; `wait` says if it could not."""
        rank, slot = self._place_of(admission.slot)
        admission = admission._replace(slot=slot)
        if rank == 0:
            self._local.admit(admission)
            return
        self._admitted_at = self.runner.num_launched
        self._order(Kind.ONLY, rank)
        self._order(Kind.ADMIT, words=words_of_admission(admission))

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """See `Executor.set_masks`."""
        rank, slot = self._place_of(slot)
        if rank == 0:
            self._local.set_masks(slot, masks)
            return
        self._order(Kind.ONLY, rank)
        self._order(Kind.MASKS, slot, words=masks.ravel())

    def collect(self, ticket: Ticket) -> StepResults:
        """See `Executor.collect`."""
        own, *others = ticket.plan.ranks
        parts = [self._local.collect(ticket._replace(plan=own))]
        for rank, (reader, plan) in enumerate(zip(self._readers, others, strict=True), start=1):
            parts.append(reader.read(ticket.step, plan))
            parts[rank].table[:, 0] += rank * self._num_slots
        return StepResults.joined(parts, ticket.plan)

    def check_alike(self) -> None:
        """EngineDeadError if a rank has not run all steps, with none under way."""
        first, *others = self._on_all_soon(_num_launched)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise self._fail(
                    f"rank {rank} has run {other} steps and rank 0 {first}, so that no answer can be trusted; this is a fault of "
                    "stepgraph"
                )
        self._alike_at = self.runner.num_launched

    def _pack(self, plan: StepPlan, shape: StepShape) -> tuple[slice, Words]:
        own, *others = plan.ranks
        part = self.runner.pack(own, shape)
        words = [NOTHING]
        for loaded, other, packed in zip(self.runner.loaded[1:], others, self._packed, strict=True):
            words.append(packed[loaded.pack(other, shape, packed)])
        return part, words_of_parts(words) if any(map(len, words)) else NOTHING

    def _await(self, ticket: Ticket) -> None:
        super()._await(ticket)
        for rank, reader in enumerate(self._readers, start=1):
            since = time.perf_counter()
            while not reader.is_done(ticket.step, self.runner.num_launched):
                if time.perf_counter() - since < _SPIN_S:
                    continue
                if self._watch.is_late:
                    raise self._fail(
                        f"rank {rank} has not ended step {ticket.step} within {self._watch.limit_s:.0f} s, and rank 0 has"
                    )
                self._check()
                time.sleep(_NAP_S)

    def _slot_of(self, failure: NotAdmitted) -> int:
        return failure.rank * self._num_slots + failure.slot

    def _place_of(self, slot: int) -> tuple[int, int]:
        """The rank of a slot, and its number there."""
        rank, index = divmod(slot - 1, self._num_slots)
        return rank, index + 1


def _num_launched(executor: LocalExecutor) -> int:
    return executor.runner.num_launched
