"""New weights that one process has as tensors, sent to ranks of the model in other processes: names and shapes first, so that all
ranks can check them before any writes, then the values, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.layers.formats.target import Skipped, values_part_of
from stepgraph.models.checkpoint import CheckpointTensor, keep_rows
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.update import Update, match_tensors, targets_of
from stepgraph.parallel.shard import Cut, Part


class Announced(NamedTuple):
    """A tensor to come. Pickles to some hundred bytes."""

    name: str
    """In the model, see `Decoder.checkpoint_tensors`."""
    shape: tuple[int, ...]


class Piece(NamedTuple):
    """Some rows of an announced tensor. Pickles to its values and little more."""

    number: int  # of the tensor among those announced
    begin: int  # first row
    rows: Tensor  # whole, on the CPU, in the dtype in which they were given


def announce(update: Update) -> list[Announced]:
    """What `buckets` will send of checked weights."""
    return [Announced(tensor.name, tensor.shape) for _, tensor in update]


def buckets(update: Update, limit: int) -> Iterator[list[Piece]]:
    """The values of checked weights, read as they are asked for.

    Args:
        update: from `plan_update`.
        limit: bytes of values in a bucket, but for a row that is larger.
    """
    bucket: list[Piece] = []
    room = limit
    for index, (_, tensor) in enumerate(update):
        whole = Part.whole(tensor.shape)
        begin, num_rows = 0, tensor.shape[0]
        row_bytes = tensor.stored(_rows(whole, 0, 1)).nbytes
        while begin < num_rows:
            if room < row_bytes and bucket:
                yield bucket
                bucket, room = [], limit
            count = min(max(1, room // row_bytes), num_rows - begin)
            rows = tensor.stored(_rows(whole, begin, count)).detach().cpu()
            # A view would be pickled with all that it is a view of.
            bucket.append(Piece(index, begin, rows.clone() if rows.untyped_storage().nbytes() > rows.nbytes else rows))
            begin, room = begin + count, room - count * row_bytes
    if bucket:
        yield bucket


def _rows(whole: Part, begin: int, count: int) -> Part:
    return Part((Cut(whole.shape[0], begin, count),), whole.columns)


class _ToCome(CheckpointTensor):
    def __init__(self, announced: Announced) -> None:
        self.name, self.shape = announced

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        raise AssertionError(f"{self.name} comes in pieces")


class Arriving:
    """Weights on their way into a rank's model. Keeps, beside the model, its part of one tensor at a time."""

    def __init__(self, model: LanguageModel, announced: Sequence[Announced]) -> None:
        """Args:
        model: in use; nothing is written yet.
        announced: all tensors to come.

        Raises:
            ModelError: they do not fit the model.
        """
        tensors = [_ToCome(tensor) for tensor in announced]
        self._update = match_tensors(targets_of(model), tensors, "given as tensors")
        self._next = 0  # tensor, of which the first `_arrived` rows are there
        self._arrived = 0
        self._kept: Tensor | None = None

    def take(self, bucket: Sequence[Piece]) -> None:
        """Write what a bucket completes; buckets come in order.

        Args:
            bucket: from `buckets`.

        Raises:
            ModelError: it is not the next one.
        """
        for piece in bucket:
            if (piece.number, piece.begin) != (self._next, self._arrived):
                raise ModelError("New weights came in another order than they were announced in; give them again.")
            target, tensor = self._update[piece.number]
            is_kept = not isinstance(target, Skipped)
            part = values_part_of(target) or Part.whole(tensor.shape)
            if is_kept and self._kept is None:
                # A convolution has a dimension more than parts tell of.
                shape = *part.kept_shape, *tensor.shape[len(part.shape) :]
                self._kept = torch.empty(shape, dtype=piece.rows.dtype)
            if self._kept is not None:
                keep_rows(piece.rows, piece.begin, part, self._kept)
            self._arrived += len(piece.rows)
            if self._arrived == tensor.shape[0]:
                if self._kept is not None:
                    with torch.no_grad():
                        target.copy_(self._kept.to(target.device).to(target.dtype))
                self._next, self._arrived, self._kept = self._next + 1, 0, None

    def finish(self) -> None:
        """Raises:
        ModelError: a part of what was announced did not come; the model holds some old weights and some new ones.
        """
        if self._next < len(self._update):
            missing = len(self._update) - self._next
            raise ModelError(
                f"{missing} of {len(self._update)} announced tensors did not arrive; give the weights again."
            )
