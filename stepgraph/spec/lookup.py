"""Proposals from what was written before: n-gram and suffix drafting. Both look for the longest text that the history ends with.

Sources: Saxena, "Prompt Lookup Decoding" (2023); Oliaro et al., "SuffixDecoding" (2024), of which this takes the rule that a
proposal is no longer than the match that speaks for it, and the memory of earlier answers.

Shapes: R rows, K proposals of a row, M tokens of memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.spec.drafter import Drafts, DraftStep


class LookupDrafter:
    """See `stepgraph.spec.drafter.Drafter`.

    Answers that end with a stop token or at their length enter the memory when they do; those that the host ends (stop strings,
    aborts) do not. A request finds those of its own memory key alone, see `stepgraph.abi.slot_line`.
    """

    attention_specs = ()
    carried = ()
    lookahead = 0
    costs_when_idle = False

    def __init__(
        self, *, min_match: int, max_match: int, adaptive: bool, memory_tokens: int, device: torch.device
    ) -> None:
        """Args:
        min_match: tokens that must match.
        max_match: longer matches count as this long.
        adaptive: propose no more tokens than match.
        memory_tokens: M, tokens of earlier answers that are searched too.
        device: of the memory.
        """
        self._min_match, self._max_match, self._adaptive = min_match, max_match, adaptive
        self._memory_M = torch.full((memory_tokens,), slot_line.NO_TOKEN, dtype=torch.int32, device=device)
        self._keys_M2 = torch.zeros(memory_tokens, slot_line.MEMORY_KEY_WIDTH, dtype=torch.int32, device=device)
        self._cursor = torch.zeros(1, dtype=torch.int32, device=device)

    def cache_specs(self, dtype: torch.dtype) -> tuple[()]:
        """See `Drafter.cache_specs`."""
        return ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `Drafter.parameters`."""
        return iter(())

    def propose(self, step: DraftStep) -> Drafts:
        """See `Drafter.propose`."""
        drafts, _ = self.look_up(step)
        return drafts

    def look_up(self, step: DraftStep) -> tuple[Drafts, Tensor]:
        """Proposals, and how many tokens match for each row: [R] int32."""
        self.follow(step)
        tokens_RK, match_len_R, count_R = ops.lookup(
            step.inputs.tokens.row_slot,
            step.lines,
            step.tokens,
            self._memory_M,
            self._keys_M2,
            step.num_drafts,
            self._min_match,
            self._max_match,
            self._adaptive,
        )
        return Drafts(tokens_RK, count_R), match_len_R

    def forget(self) -> None:
        """See `Drafter.forget`."""
        self._memory_M.fill_(slot_line.NO_TOKEN)
        self._cursor.zero_()

    def reload(self) -> None:
        """See `Drafter.reload`."""

    def follow(self, step: DraftStep) -> None:
        """See `Drafter.follow`."""
        if not len(self._memory_M):
            return
        tokens = step.inputs.tokens
        ran_R = tokens.query_start[1:] > tokens.query_start[:-1]
        active_R = step.lines.index_select(0, tokens.row_slot)[:, slot_line.ACTIVE]
        finished_R = ran_R & (active_R == 0)
        ops.remember(self._memory_M, self._keys_M2, self._cursor, step.lines, step.tokens, tokens.row_slot, finished_R)
