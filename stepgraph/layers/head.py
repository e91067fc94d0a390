"""An output head that ranks share.

Shapes: R rows, C of which are worked on at a time, E hidden size, V vocabulary, W entries of it that a rank computes, L of which
there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepgraph.layers.matrix import Matrix
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import Shard

MAX_ROWS = 512
"""Rows whose logits are computed at once: of more, the product takes longer than reading the head again."""


class HeadPart(nn.Module):
    """A rank's part of the logits, and all of them from every rank's. May run inside a graph.

    W is the same on all ranks; for the last, fewer entries may be left. The part lies in a buffer of the model's: as graph memory
    it would be taken once per graph.
    """

    _part: Tensor  # [C, W]

    def __init__(self, vocab_size: int, group: Group, *, dtype: torch.dtype, device: torch.device) -> None:
        """Args:
        vocab_size: V.
        group: of the ranks.
        dtype: of the activations.
        device: of the buffer.
        """
        super().__init__()
        self.cut, self._group = group.shard.span(vocab_size), group
        width = Shard(0, group.shard.size).span(vocab_size).length
        self.register_buffer("_part", torch.empty(MAX_ROWS, width, dtype=dtype, device=device), persistent=False)

    def forward(self, head: Matrix, hidden_RE: Tensor, out_RV: Tensor) -> Tensor:
        """Write logits.

        Args:
            head: whose outputs are V, or those of `cut`.
            hidden_RE: [R, E], the same on all ranks.
            out_RV: [R, V], dtype of `hidden_RE`, contiguous.

        Returns:
            `out_RV`.
        """
        weights = head.parameters_by_name
        if head.out_features > self.cut.length:
            weights = {name: rows.narrow(0, self.cut.begin, self.cut.length) for name, rows in weights.items()}
        for hidden_CE, out_CV in zip(hidden_RE.split(MAX_ROWS), out_RV.split(MAX_ROWS), strict=True):
            part_CW = self._part[: hidden_CE.shape[0]]
            if self.cut.length == part_CW.shape[1]:
                head.format.product(weights, hidden_CE, out=part_CW)
            else:  # products are contiguous; where the logits go is room for one
                size = hidden_CE.shape[0], self.cut.length
                product_CL = out_CV.view(-1)[: size[0] * size[1]].view(size)
                part_CW[:, : size[1]].copy_(head.format.product(weights, hidden_CE, out=product_CL))
            self._group.gather(part_CW, out_CV)
        return out_RV
