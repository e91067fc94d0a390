"""Mailbox: what a rank has of the others, for collectives that need no library.

Shapes: N ranks, P programs of a kernel that has little to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MOST_PROGRAMS_A_MULTIPROCESSOR = 16
"""Of the kernels of a GPU; those with little to do have one on each, at most."""
ABORT, RECORD = 0, 1
"""Words of `Mailbox.host`: not zero if collectives are to be given up; what the first one that was given up waited for."""
LOOP_BACK, FAULT = 0, 1
"""Words of `Mailbox.flags`."""
ALL_REDUCE, ALL_GATHER, GATHER_TOKENS, SCATTER_SUM = 1, 2, 3, 4
"""Collectives, as `Record` has them."""
HEAD_BYTES = 64
"""Of a message of tokens, before its rows."""
MOST_ROWS = (1 << 15) - 1
"""Of a message, so that the head of one of tokens says how many there are in a number of 16 bits."""


class Mailbox(NamedTuple):
    """How a rank reaches the others: memory that they share, and its own account of it."""

    inbox: Tensor
    """Of a GPU: [3, N, slot] int16 or int32, bits of the group's dtype, in which the other ranks write; all -0.0 at first. Of a
    CPU: [N, cpu.HEADER + 2 · slot] uint8, memory of all ranks, of which each writes its own line; zero at first."""
    peers: Sequence[int]
    """Of GPUs: the address of each rank's inbox, as this process sees it."""
    state: Tensor
    """Of a GPU: [MOST_PROGRAMS_A_MULTIPROCESSOR · P, 2] int64, for each program the number of collectives so far and the length
    of the last one's messages; of a CPU [1, 1], their number. Zero at first."""
    flags: Tensor
    """[2] int32, on the device. LOOP_BACK is not zero while the rank is by itself; FAULT after a collective was given up."""
    host: Tensor
    """[2] int64, in host memory that the device reads and writes. See ABORT, and `Record`."""


class Record(NamedTuple):
    """What a collective that was given up leaves in `Mailbox.host`."""

    rank: int
    """Whose part did not come."""
    collective: int
    """ALL_REDUCE, ALL_GATHER, GATHER_TOKENS or SCATTER_SUM."""
    sequence: int
    """Of collectives that ran before it, in this mailbox."""

    @classmethod
    def of(cls, word: int) -> Record | None:
        """What the word says; None if nothing was given up."""
        return cls((word & 255) - 1, word >> 8 & 255, word >> 16) if word else None

    @property
    def word(self) -> int:
        """The word that says it; not zero."""
        return self.sequence << 16 | self.collective << 8 | self.rank + 1
