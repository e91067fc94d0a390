"""What the scheduler counts of the requests that run: one column per count, one line per slot.

Columns that are read or changed for many requests together are arrays, so that a step costs the host about the same at any number
of requests. One entry at a time is read through a memoryview of the same memory, which takes a quarter of the time that an array
takes for it. The other columns are lists, which are faster still at that.

Shapes: S slots, the null slot included; R rows, all of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepgraph.engine.request import Request

MANY_ROWS = 16
"""From so many on, operations on arrays cost the host less than going through rows one by one."""

_ONE = np.array(1)  # as an array of no dimension it spares each operation a conversion


class RequestTable:
    """The counts of all slots. The methods below are all that changes them; those of a free slot mean nothing.

    Steps under way are no count: once its prompt is planned, a request has `planned` + 1 less the tokens known of it.

    Args:
        num_slots: the null slot not included.
    """

    def __init__(self, num_slots: int):
        columns: npt.NDArray[np.int64] = np.zeros((8, num_slots + 1), dtype=np.int64)
        self._counts_2S = columns[:2]
        self.planned_S, self.unread_drafts_S, self.room_S, self.end_S, self.drafts_S, self.prefill_len_S = columns[:6]
        self.generation_S, self.variant_S = columns[6:]
        """Of the request that has the slot, 0 if none has; and what it needs of its steps, a `Variant`."""
        views: list[memoryview[int]] = [memoryview(column) for column in columns]
        self.planned = views[0]
        """Tokens whose computation is planned: the device has computed these, or will before anything planned later. Of the
        proposals under way as if none stood."""
        self.unread_drafts = views[1]
        """Proposals in steps under way: if all stand, so many tokens more are computed than `planned`."""
        self.room = views[2]
        """Tokens that its KV blocks hold."""
        self.end = views[3]
        """Tokens that it computes at most: the last one that it may sample never is."""
        self.drafts = views[4]
        """Proposals that wait for its next step; with steps under way, the most that may."""
        self.prefill_len = views[5]
        """Tokens known when it got its slot: the prompt, and after a preemption the answer so far."""
        self.max_drafts = [0] * (num_slots + 1)
        """Proposals that it takes at once, at most."""
        self._was_drafted = [True] * (num_slots + 1)
        """Whether its last known step made proposals. Those of the step under way are expected to be like that."""

    def enter(self, request: Request, *, planned: int) -> None:
        """A request got its slot, without any room yet."""
        slot = request.slot
        assert slot is not None
        self.generation_S[slot], self.variant_S[slot] = request.generation, request.variant
        self.planned[slot], self.prefill_len[slot], self.end[slot] = planned, request.num_known, request.max_length - 1
        self.unread_drafts[slot] = self.drafts[slot] = self.room[slot] = 0
        self.max_drafts[slot], self._was_drafted[slot] = request.sampling.max_num_drafts, True

    def leave(self, slot: int) -> None:
        """The request of a slot gives it up."""
        self.generation_S[slot] = 0

    def slots(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """Of requests that run."""
        return np.array([request.slot for request in requests], dtype=np.int64)

    def is_prefilling(self, slot: int) -> bool:
        """Whether a part of its prompt is not planned."""
        return self.planned[slot] < self.prefill_len[slot]

    def prefilling_slots(self) -> list[int]:
        """Those of requests of whose prompts a part is not planned."""
        slots: list[int] = ((self.generation_S > 0) & (self.planned_S < self.prefill_len_S)).nonzero()[0].tolist()
        return slots

    def set_room(self, slot: int, num_tokens: int) -> None:
        self.room[slot] = num_tokens

    def plan_prompt(self, slot: int, num_tokens: int) -> None:
        """So many more tokens of its prompt are planned; negative: so many fewer."""
        self.planned[slot] += num_tokens

    def plan_decode(self, slot: int, num_verified: int, num_drafts: int) -> None:
        """A step runs its next token, verifies proposals, and makes up to `num_drafts` new ones."""
        self.planned[slot] += 1
        if num_verified:
            self.unread_drafts[slot] += num_verified
        if num_drafts:
            self.expect(slot, num_drafts)
        else:
            self.drafts[slot] = 0

    def expect(self, slot: int, num_drafts: int) -> None:
        """The last step planned samples for it, and makes up to `num_drafts` proposals."""
        # What the step will propose is not known before its results; if it is more, the rest of it is not verified.
        self.drafts[slot] = min(num_drafts, self.max_drafts[slot]) if num_drafts and self._was_drafted[slot] else 0

    def read(self, slot: int, num_verified: int, num_stood: int, num_drafts: int, is_last: bool) -> None:
        """A step's results are known, which was to verify so many proposals: so many stood, and it made `num_drafts` new ones.
        `is_last`: no other step that samples for it is under way, so that the next one verifies these."""
        if num_verified:
            if num_stood:
                self.planned[slot] += num_stood
            self.unread_drafts[slot] -= num_verified
        self._was_drafted[slot] = num_drafts > 0
        if is_last:
            self.drafts[slot] = num_drafts

    def plan_decodes(self, slots_R: npt.NDArray[np.int64]) -> None:
        """`plan_decode` for some requests, in a step that makes no proposals and verifies none."""
        self.planned_S[slots_R] += 1
        self.drafts_S[slots_R] = 0

    def plan_all(self, advance_2S: npt.NDArray[np.int64] | None) -> None:
        """`plan_decode` for every request that runs, each expecting as many proposals as before. `advance_2S`: 1, and the
        proposals that the step verifies; None if it verifies none."""
        if advance_2S is None:
            np.add(self.planned_S, _ONE, self.planned_S)
        else:
            np.add(self._counts_2S, advance_2S, self._counts_2S)

    def read_all(self, outcome_2S: npt.NDArray[np.int64]) -> None:
        """`read` for every request that runs, each having as many proposals as before. `outcome_2S`: the proposals that stood,
        and less those that the step was to verify."""
        np.add(self._counts_2S, outcome_2S, self._counts_2S)
