"""How many tokens each expert gets: counted on the device, read without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence

from stepgraph.models.language_model import LanguageModel
from stepgraph.platforms import Platform
from stepgraph.step.dispatch import mixtures_of


class ExpertCounts:
    """Sums over a model's layers of the tokens that chose each expert. Padding is not counted, nor are draft models.

    Args:
        model: whose routers count.
        platform: of the device.
    """

    def __init__(self, model: LanguageModel, platform: Platform) -> None:
        mixtures = mixtures_of(model)
        self.totals = [mixture.gate.totals for mixture in mixtures]
        """Of each layer: [N] int64, on the device."""
        self.kept = (mixtures[0].experts.first, mixtures[0].experts.count) if mixtures else (0, 0)
        """The first expert that this rank keeps, and how many."""
        num_experts = max((total.shape[0] for total in self.totals), default=0)
        self._copy = platform.host_buffer(2 * num_experts).view(torch.int64)
        self._copied = platform.completion()
        self._copied_at: int | None = None
        """Steps that had been launched before the copy under way; None if there is none."""
        self._known = (0,) * num_experts

    def read(self, num_launched: int, num_done: int) -> tuple[int, ...]:
        """The counts, one for each expert: as they are now if no step is under way, and else as they were when this was last
        called. () of a model without experts.

        Args:
            num_launched: steps so far.
            num_done: those that have been waited for.
        """
        if not self.totals:
            return ()
        if num_launched == num_done:
            self._start()
            self._take()
            return self._known
        if self._copied_at is not None and num_done >= self._copied_at:
            self._take()
        if self._copied_at is None:
            self._start()
            self._copied_at = num_launched
        return self._known

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What runs inside is not counted."""
        before = [total.clone() for total in self.totals]
        try:
            yield
        finally:
            for total, count in zip(self.totals, before, strict=True):
                total.copy_(count)

    def _start(self) -> None:
        self._copy.copy_(pad_sequence(self.totals, batch_first=True).sum(0), non_blocking=True)
        self._copied.record()

    def _take(self) -> None:
        self._copied.wait()
        self._known, self._copied_at = tuple(self._copy.tolist()), None
