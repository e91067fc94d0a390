"""Token embedding. Shapes: T tokens, V vocabulary, E hidden size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """Rows of a [V, E] table. May run inside a graph."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype, device=device), False)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Return a fresh [T, E] tensor, which the caller may update in place."""
        return F.embedding(token_ids_T, self.weight)
