"""Token embedding. Shapes: T tokens, V vocabulary, E hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph.layers.formats import Plain, WeightFormat
from stepgraph.layers.matrix import Matrix
from stepgraph.parallel.shard import Cut

_PLAIN = Plain()


class Embedding(Matrix):
    """Rows of a [V, E] table, multiplied by a constant in some models. Every rank has all of it. May run inside a graph."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        multiplier: float = 1.0,
        format: WeightFormat = _PLAIN,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        vocab_size: V.
        hidden_size: E.
        multiplier: of the rows that `forward` returns, first rounded to `dtype`, as Gemma was trained with.
        format: of the table.
        dtype: of the activations.
        device: of the table.
        """
        inputs, outputs = Cut.whole(hidden_size), [Cut.whole(vocab_size)]
        super().__init__(inputs, outputs, axis=None, bias=False, format=format, dtype=dtype, device=device)
        self.multiplier = float(torch.tensor(multiplier, dtype=dtype))

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Return a fresh [T, E] tensor, which the caller may update in place."""
        x_TE = self.format.rows(self.parameters_by_name, token_ids_T)
        return x_TE if self.multiplier == 1.0 else x_TE * self.multiplier
