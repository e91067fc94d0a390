"""What came of the proposals of speculative decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from stepgraph.abi import slot_line


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

    def add(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Count rows that ran: (new tokens, proposals verified, proposals that stood) of each."""
        for (num_tokens, num_verified, num_accepted), count in Counter(rows).items():
            if num_verified:
                self.num_drafts += count
                self.num_draft_tokens += count * num_verified
                self.num_saved_steps += count * max(0, num_tokens - 1)
                for position in range(num_accepted):
                    self.num_accepted_per_position[position] += count
