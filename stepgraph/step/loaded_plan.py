"""LoadedPlan: what of the plans of a rank lies where its graphs read them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stepgraph.step.plan import BlockTables, StepPlan
from stepgraph.step.shape import StepShape

NOTHING = slice(0, 0)


class LoadedPlan:
    """Knows which plan was packed last, so that what repeats is not sent again.

    Args:
        tables: what the deltas of plans are for.
        first_slot: what the device calls slot n is `first_slot` + n in plans.
    """

    def __init__(self, tables: BlockTables, first_slot: int = 0) -> None:
        self._tables, self._first_slot = tables, first_slot
        self._last: tuple[int | None, StepShape] | None = None

    def pack(self, plan: StepPlan, shape: StepShape, out: npt.NDArray[np.int32]) -> slice:
        """Pack what graphs of `shape` are to read of `plan` and does not lie there already.

        Args:
            plan: of the next step.
            shape: of its graph.
            out: [at least the plan's length] int32, overwritten where the returned slice says.

        Returns:
            Where it belongs in the packed plan, at whose end it ends; an empty slice if all lies there.
        """
        # Deltas are idempotent, so rows that repeat without new ones can run on the plan as it lies on the device. A slot's new
        # user needs a block for its first row, so its plan has deltas.
        has_rows = plan.epoch is not None and self._last == (plan.epoch, shape)
        if has_rows and not plan.deltas:
            return NOTHING
        tables = self._tables
        start, end = shape.deltas_start if has_rows else 0, shape.plan_length(tables.block_size, tables.per_place)
        plan.pack(shape, tables, out[:end], start, self._first_slot)
        self._last = (plan.epoch, shape)
        return slice(start, end)

    def forget(self) -> None:
        """Something else lies there."""
        self._last = None
