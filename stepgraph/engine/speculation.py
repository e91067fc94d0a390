"""What came of the proposals of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepgraph.step import slot_line
from stepgraph.step.runner import RowResult


@dataclass
class SpeculationStatistics:
    """Counts over an engine's life. A draft is a row of a step that verified at least one proposal."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    """Proposals that were verified."""
    num_saved_steps: int = 0
    """Steps that requests would have run in beside those they did: each token of a row after its first saved one."""
    num_accepted_per_position: list[int] = field(default_factory=lambda: [0] * slot_line.MAX_DRAFTS)
    """Drafts whose first, second, … proposal stood. One stands only if all before it do."""

    @property
    def num_accepted_tokens(self) -> int:
        """Proposals that stood, and so became part of an answer."""
        return sum(self.num_accepted_per_position)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens of a draft that became part of an answer: those that stood, and the one sampled after them."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    def add(self, row: RowResult) -> None:
        """Count a row that ran."""
        if not row.num_verified:
            return
        self.num_drafts += 1
        self.num_draft_tokens += row.num_verified
        self.num_saved_steps += max(0, row.num_tokens - 1)
        for position in range(row.num_accepted):
            self.num_accepted_per_position[position] += 1
