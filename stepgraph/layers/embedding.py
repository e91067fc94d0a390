"""Token embedding. Shapes: T tokens, V vocabulary, E hidden size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepgraph import ops
from stepgraph.layers.packing import Packing


class Embedding(nn.Module):
    """Rows of a [V, E] table, multiplied by a constant in some models. May run inside a graph."""

    packing: Packing | None = None
    """How `weight` is packed, if it is; set at load."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        multiplier: float = 1.0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        vocab_size: V.
        hidden_size: E.
        multiplier: of the rows that `forward` returns, first rounded to `dtype`, as Gemma was trained with.
        dtype: of the table.
        device: of the table.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype, device=device), False)
        self.multiplier = float(torch.tensor(multiplier, dtype=dtype))

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Return a fresh [T, E] tensor, which the caller may update in place."""
        if self.packing is None:
            x_TE = F.embedding(token_ids_T, self.weight)
        else:
            x_TE = ops.packed_rows(self.weight, token_ids_T, self.packing.width)
        return x_TE if self.multiplier == 1.0 else x_TE * self.multiplier
