"""Which part of a model's matrices a rank keeps. Values only: nothing here holds tensors or communicates.

Source: Shoeybi et al., "Megatron-LM" (2019): of two products after each other, the first is cut along its outputs and the second
along its inputs, so that only the sum after the second concerns other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

_ALIGNMENT = 16
"""Entries that kernels read at once, at aligned addresses."""


class Axis(Enum):
    """Along which dimension of its weight [outputs, inputs] a product is cut."""

    OUT = "outputs"
    """Each rank computes some of the outputs, of all inputs."""
    IN = "inputs"
    """Each rank has some of the inputs; the product is the sum of what the ranks compute. Rank 0 adds the bias."""


@dataclass(frozen=True)
class Cut:
    """One dimension of a tensor, and which of it a rank keeps: `length` from `begin` on."""

    size: int  # of the whole
    begin: int
    length: int

    @classmethod
    def whole(cls, size: int) -> Cut:
        """Everything."""
        return cls(size, 0, size)

    @property
    def is_whole(self) -> bool:
        """Whether everything is kept."""
        return self.length == self.size

    def times(self, unit: int) -> Cut:
        """The same part of a dimension that has `unit` entries for each of this one's."""
        return Cut(self.size * unit, self.begin * unit, self.length * unit)

    @classmethod
    def of_heads(cls, cuts: Sequence[Cut]) -> Cut:
        """Of several dimensions that are stacked head by head, what a rank keeps which keeps these, the same heads, of each."""
        return cls(sum(cut.size for cut in cuts), sum(cut.begin for cut in cuts), sum(cut.length for cut in cuts))

    def widened(self, unit: int) -> Cut:
        """The least part around this one that begins and ends at multiples of `unit`, or at the end of the dimension."""
        begin = self.begin // unit * unit
        end = min(-(-(self.begin + self.length) // unit) * unit, self.size)
        return Cut(self.size, begin, end - begin)


@dataclass(frozen=True)
class Shard:
    """One of the equal parts in which `size` ranks keep a model: that of rank `rank`."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, self

    def cut(self, size: int) -> Cut:
        """This rank's part of a dimension that the number of ranks divides."""
        assert size % self.size == 0, (self, size)
        return Cut(size, size // self.size * self.rank, size // self.size)

    def span(self, size: int) -> Cut:
        """This rank's part of a dimension, which need not divide: all ranks but the last keep as much as the first, and the last
        what is left. That is something wherever `size` is at least the square of the number of ranks."""
        width = -(-size // self.size)
        aligned = -(-width // _ALIGNMENT) * _ALIGNMENT
        if aligned * (self.size - 1) < size:
            width = aligned
        begin = width * self.rank
        return Cut(size, begin, min(width, size - begin))

    def heads(self, num_heads: int) -> Cut:
        """This rank's key/value heads. If there are fewer than ranks, neighbouring ranks keep the same one."""
        if num_heads >= self.size:
            return self.cut(num_heads)
        assert self.size % num_heads == 0, (self, num_heads)
        return Cut(num_heads, self.rank * num_heads // self.size, 1)


WHOLE = Shard()
"""All of a model."""


@dataclass(frozen=True)
class Part:
    """Which part of a checkpoint's tensor a rank keeps: rows of each of the matrices stacked in it, and columns."""

    rows: tuple[Cut, ...]
    columns: Cut | None  # None: the tensor has one dimension

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Part:
        """All of a tensor of one or two dimensions."""
        return cls((Cut.whole(shape[0]),), None if len(shape) == 1 else Cut.whole(shape[1]))

    @property
    def is_whole(self) -> bool:
        """Whether everything is kept."""
        return all(cut.is_whole for cut in (*self.rows, *([] if self.columns is None else [self.columns])))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        rows = sum(cut.size for cut in self.rows)
        return (rows,) if self.columns is None else (rows, self.columns.size)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Of what the rank keeps."""
        rows = sum(cut.length for cut in self.rows)
        return (rows,) if self.columns is None else (rows, self.columns.length)

    @property
    def row_cuts(self) -> Sequence[Cut]:
        """The rows as parts of the stacked tensor's, in the order in which they are kept."""
        size, begin, cuts = self.shape[0], 0, []
        for cut in self.rows:
            cuts.append(Cut(size, begin + cut.begin, cut.length))
            begin += cut.size
        return cuts

    @property
    def slices(self) -> list[tuple[slice, ...]]:
        """Indices of the tensor that give the part, piece by piece along the first dimension."""
        columns = () if self.columns is None else (_slice(self.columns),)
        return [(_slice(cut), *columns) for cut in self.row_cuts]

    def along_rows(self) -> Part:
        """The part of a tensor that has one number for each row: a bias."""
        return Part(self.rows, None)

    def with_all_columns(self) -> Part:
        """The same rows, whole."""
        assert self.columns is not None
        return replace(self, columns=Cut.whole(self.columns.size))

    def widened(self, unit: int) -> Part:
        """With columns around these that begin and end at multiples of `unit`."""
        assert self.columns is not None
        return replace(self, columns=self.columns.widened(unit))

    def within(self, widened: Part) -> Part:
        """This part of a tensor of which only `widened` has been read."""
        assert self.columns is not None
        assert widened.columns is not None
        columns = Cut(widened.columns.length, self.columns.begin - widened.columns.begin, self.columns.length)
        return Part((Cut.whole(self.kept_shape[0]),), columns)


def _slice(cut: Cut) -> slice:
    return slice(cut.begin, cut.begin + cut.length)


def sizes_that_divide(num_heads: int, num_kv_heads: int, *others: int) -> list[int]:
    """Numbers of ranks that can share a model.

    Args:
        num_heads, num_kv_heads: of queries, and of keys and values, which may be repeated.
        others: dimensions that are cut.

    >>> sizes_that_divide(24, 8, 96)
    [1, 2, 4, 8, 24]
    """
    return [
        size
        for size in range(1, num_heads + 1)
        if all(total % size == 0 for total in (num_heads, *others))
        and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]
