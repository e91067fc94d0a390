"""What an engine tells of its steps, beside their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stepgraph.engine.step_draft import ScheduledStep
from stepgraph.step.log import StepRecord
from stepgraph.step.results import RowResult, StepResults, Ticket


@dataclass
class HostTime:
    """What steps cost the host, waiting for the device excluded."""

    steps: int = 0
    seconds: float = 0.0


class LaunchedStep(NamedTuple):
    """A step that was launched and whose results have not been read. Times are seconds of the engine's clock."""

    scheduled: ScheduledStep
    ticket: Ticket
    started_at: float
    """When its planning began."""
    launched_at: float
    host_seconds: float
    """Of planning it, and of launching it where that is not computing it."""


class StepReport(NamedTuple):
    """A step whose results have been read."""

    record: StepRecord
    seconds: float
    """From its launch, or from the end of the step before it if that was later."""
    host_seconds: float
    """Of planning one step and taking in the results of one, as they went on side by side."""
    results: StepResults
    num_prefill_rows: int
    launched: LaunchedStep
    collected_at: float
    """When its results were there."""

    @property
    def decodes(self) -> list[RowResult]:
        """Its rows that were not of prompts, those that ran nothing left out."""
        return [row for row in self.results.rows[self.num_prefill_rows :] if row.num_tokens]
