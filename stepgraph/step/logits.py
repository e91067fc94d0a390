"""Memory that the logits of all steps share: as graph memory it would be taken once per graph.

Shapes: C samples whose logits are computed at once, D of which are processed at once, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.step.shape import Variant

_ROWS = 512
"""Samples whose logits are computed at once. A step of more samples than it has requests may read the output head more often."""
_EXTENDED_ROWS = 128
"""Samples whose logits are processed at once in steps of extended variants."""


class LogitBuffers(NamedTuple):
    """What the steps of one variant use. More samples than they hold are worked through in chunks."""

    logits: Tensor  # [C, V] in the model's dtype
    processed: Tensor | None = None  # [D, V] float32: after penalties, biases, bans and masks; None in plain steps
    counts: Tensor | None = None  # [D, V] int32 scratch, zero between steps; likewise


class LogitMemory:
    """Makes the buffers: of plain steps at once, the rest for the first step that is not plain."""

    def __init__(
        self, *, max_samples: int, max_num_seqs: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Args:
        max_samples: of a step.
        max_num_seqs: requests that run at once; if each has one sample, the output head is read once.
        vocab_size: V.
        dtype: of the model's activations.
        device: of the buffers.
        """
        rows = min(max_samples, max(max_num_seqs, _ROWS))
        self.extended_rows = min(rows, _EXTENDED_ROWS)
        self._logits_CV = torch.empty(rows, vocab_size, dtype=dtype, device=device)

    @property
    def later_bytes(self) -> int:
        """What steps of extended variants take beside the logits."""
        return self.extended_rows * self._logits_CV.shape[1] * (torch.float32.itemsize + torch.int32.itemsize)

    def buffers(self, variant: Variant) -> LogitBuffers:
        """Those of a variant's steps. torch.OutOfMemoryError if there is no memory for them."""
        return LogitBuffers(self._logits_CV) if variant < Variant.EXTENDED else self.extended

    @cached_property
    def extended(self) -> LogitBuffers:
        """Those of extended variants."""
        size, device = (self.extended_rows, self._logits_CV.shape[1]), self._logits_CV.device
        return LogitBuffers(
            self._logits_CV,
            processed=torch.empty(size, dtype=torch.float32, device=device),
            counts=torch.zeros(size, dtype=torch.int32, device=device),
        )
