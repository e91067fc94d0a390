"""OutputRings: where steps leave what the host reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from stepgraph.abi import slot_line
from stepgraph.ops.collectives.cpu import order_memory
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults
from stepgraph.step.shape import StepShape, Variant

RING_DEPTH = 4
"""Steps whose output is kept; more than any platform runs ahead."""


def ring_sizes(max_shape: StepShape) -> list[tuple[int, ...]]:
    """Sizes of the tensors of `OutputRings`, in their order, for steps of up to a shape."""
    return [
        (RING_DEPTH, max_shape.num_rows, slot_line.OUTPUT_WIDTH),
        (RING_DEPTH, max_shape.num_samples, slot_line.LOGPROB_WIDTH),
        (RING_DEPTH, max_shape.num_tokens, slot_line.LOGPROB_WIDTH),
        (1,),
    ]


class OutputRings(NamedTuple):
    """Host memory that the device writes, int32. Line n of a ring is of the steps whose number is n modulo `RING_DEPTH`."""

    rows: Tensor
    """See `stepgraph.abi.slot_line`."""
    logprobs: Tensor
    prompt_logprobs: Tensor
    counter: Tensor
    """[1]: steps that are done, modulo `RING_DEPTH`, where other processes look for it."""

    @classmethod
    def create(cls, max_shape: StepShape, host_buffer: Callable[..., Tensor]) -> OutputRings:
        """For steps of up to `max_shape`, in memory that `host_buffer` makes of sizes."""
        return cls(*(host_buffer(*size) for size in ring_sizes(max_shape)))


class OutputReader:
    """Reads the results of steps.

    Args:
        rings: of the rank that runs them.
    """

    def __init__(self, rings: OutputRings) -> None:
        self._rows, self._logprobs, self._prompt_logprobs, counter = (ring.numpy() for ring in rings)
        self._counter: memoryview[int] = counter.data

    def is_done(self, step: int, num_launched: int) -> bool:
        """Whether a step has left all its results, of a rank in another process.

        Args:
            step: of which all before are known to be done.
            num_launched: steps in all; at most `RING_DEPTH` - 1 from `step` on.
        """
        is_done = (self._counter[0] - step - 1) % RING_DEPTH < num_launched - step
        if is_done:
            order_memory()  # what is read then was not read before
        return is_done

    def read(self, step: int, plan: StepPlan) -> StepResults:
        """Results of a step that is done. Log-probabilities and proposals are valid for `RING_DEPTH` launches from its own."""
        entry, num_rows, num_drafts = step % RING_DEPTH, len(plan.rows), plan.num_drafts
        rows_RW = self._rows[entry]
        return StepResults(
            rows_RW[:num_rows, : slot_line.OUT_TOKENS + 1 + num_drafts].copy(),
            self._logprobs[entry] if plan.variant >= Variant.EXTENDED else None,
            self._prompt_logprobs[entry] if plan.variant >= Variant.PROMPT_LOGPROBS else None,
            rows_RW[:num_rows, slot_line.OUT_DRAFTS :][:, :num_drafts] if num_drafts else None,
        )
