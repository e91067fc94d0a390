"""Whether a checkpoint's output head is its embedding table. Its config says so, and its tensors may say otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.parallel.shard import Part

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class _Renamed(CheckpointTensor):
    """A tensor once more, under another name."""

    def __init__(self, tensor: CheckpointTensor, name: str) -> None:
        self.name, self.shape = name, tensor.shape
        self.quantization, self.is_e4m3 = tensor.quantization, tensor.is_e4m3
        self._tensor = tensor

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        return self._tensor.load(dtype, device, part)

    def stored(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.stored`."""
        return self._tensor.stored(part)

    def packed(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.packed`."""
        return self._tensor.packed(part)


def has_own_head(tensors: Sequence[CheckpointTensor], *, tied: bool) -> bool:
    """Whether logits need another matrix than the embedding table.

    Args:
        tensors: of a checkpoint. If they hold both matrices, both are read, up to the first difference.
        tied: what the config says, which holds where the tensors do not tell.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    if HEAD in by_name and EMBEDDING in by_name:
        return not _equal(by_name[HEAD], by_name[EMBEDDING])
    return not tied


def fit_head(
    tensors: Sequence[CheckpointTensor], *, tied: bool, in_model: bool, description: str
) -> list[CheckpointTensor]:
    """A checkpoint's tensors for a model that has an output head of its own or none.

    Args:
        tensors: of a checkpoint.
        tied: whether the embedding table and the head are one, so that either stands for both where the other is not stored.
        in_model: whether the model has a head of its own.
        description: of the checkpoint, for errors.

    Raises:
        ModelError: the checkpoint has no head where one is needed.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding, head = by_name.get(EMBEDDING), by_name.get(HEAD)
    fitting = [tensor for tensor in tensors if in_model or tensor.name != HEAD]
    if tied and embedding is None and head is not None:
        fitting.append(_Renamed(head, EMBEDDING))
    elif in_model and head is None and embedding is not None:
        if not tied:
            raise ModelError(
                f"The checkpoint ({description}) has no {HEAD}, and no tie_word_embeddings in its config that would make the "
                "embedding table the output head. If the model was trained with both in one, set it to true in config.json; "
                "else a part of the weights is missing."
            )
        fitting.append(_Renamed(embedding, HEAD))
    return fitting


def _equal(a: CheckpointTensor, b: CheckpointTensor) -> bool:
    if a.shape != b.shape:
        return False
    x, y = a.stored(), b.stored()
    if x.dtype != y.dtype:
        return torch.equal(x.float(), y.float().to(x.device))
    return torch.equal(_words(x), _words(y).to(x.device))


def _words(values: Tensor) -> Tensor:
    """The bits of some values, in as few numbers as they fill: compared several times as fast as numbers of 16 bits are."""
    flat = values.detach().contiguous().view(-1)
    return flat.view(torch.int64 if flat.nbytes % 8 == 0 else torch.uint8)
