"""Suffix drafting where the match is long, a draft model elsewhere; decided on the device, row by row.

Shapes: R rows, K proposals of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from stepgraph.layers.cache import CacheSpec
from stepgraph.spec.drafter import Drafter, Drafts, DraftStep
from stepgraph.spec.lookup import LookupDrafter


class HybridDrafter:
    """See `stepgraph.spec.drafter.Drafter`."""

    costs_when_idle = True

    def __init__(self, lookup: LookupDrafter, model: Drafter, min_match: int) -> None:
        """Args:
        lookup: proposes where at least `min_match` tokens match.
        model: proposes elsewhere.
        min_match: in tokens.
        """
        self.attention_specs, self.lookahead = model.attention_specs, model.lookahead
        self.carried = model.carried
        self._lookup, self._model, self._min_match = lookup, model, min_match

    def cache_specs(self, dtype: torch.dtype) -> tuple[CacheSpec, ...]:
        """See `Drafter.cache_specs`."""
        return self._model.cache_specs(dtype)

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `Drafter.parameters`."""
        return self._model.parameters()

    def propose(self, step: DraftStep) -> Drafts:
        """See `Drafter.propose`."""
        found, match_len_R = self._lookup.look_up(step)
        guessed = self._model.propose(step)
        long_R = match_len_R >= self._min_match
        return Drafts(
            torch.where(long_R.unsqueeze(1), found.tokens, guessed.tokens),
            torch.where(long_R, found.num_tokens, guessed.num_tokens),
        )

    def forget(self) -> None:
        """See `Drafter.forget`."""
        self._lookup.forget()

    def reload(self) -> None:
        """See `Drafter.reload`."""
        self._model.reload()

    def follow(self, step: DraftStep) -> None:
        """See `Drafter.follow`."""
        self._lookup.follow(step)
        self._model.follow(step)
