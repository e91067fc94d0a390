"""Group: the ranks that share a model, as the layers of one of them see the others.

Shapes: N ranks, T tokens of each, A = N·T tokens, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from stepgraph.parallel.shard import Shard


class Norm(NamedTuple):
    """An RMS norm that a reduction applies."""

    weight: Tensor  # [E]
    eps: float


class GatheredTokens(NamedTuple):
    """What ranks with tokens of their own have together."""

    x: Tensor
    """[A, E]: T rows of rank 0, T of rank 1, and so on; of each, the first are tokens. What other ranks' padding holds is left
    open."""
    counts: Tensor
    """[N] int32: how many tokens each rank has."""


class Fault(NamedTuple):
    """A collective that was given up."""

    rank: int
    """Whose part did not come."""
    collective: str
    """Its name."""
    sequence: int
    """Its number since the group was made."""


class Group(Protocol):
    """Ranks 0 … N-1 of one model, all of which call the same collectives in the same order. What a collective yields is one
    value, the same bits on all ranks, whatever carries it and however many tokens there are beside: sums are of float32, in the
    order of the ranks. Collectives may run inside a graph."""

    name: str
    """What carries its collectives, for logs and reports."""
    shard: Shard
    """This rank's part of the model: its rank, and how many there are."""
    fault_flag: Tensor | None
    """[1] int32 on the device, not zero once a collective was given up: for `ops.commit`, so that no token leaves that came of
    it. None where nothing on the device tells."""

    def add_sum(
        self,
        part_TE: Tensor,
        residual_TE: Tensor,
        *,
        multiplier: float = 1.0,
        post_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Add the sum of all ranks' parts to the residual stream, and normalise the stream.

        Args:
            part_TE: [T, E], this rank's part, contiguous.
            residual_TE: [T, E], dtype of `part_TE`, contiguous, the same on all ranks; updated: rounded once, after the addition.
            multiplier: of the sum.
            post_norm: of the sum, before it is multiplied.
            norm: of the updated stream.

        Returns:
            [T, E], dtype of `part_TE`: the updated stream after `norm`, or itself without one.
        """

    def gather(self, part_RW: Tensor, out_RV: Tensor) -> Tensor:
        """Put the columns that the ranks have beside each other.

        Args:
            part_RW: [R, W], contiguous, of the same W on all ranks.
            out_RV: [R, V], W·(N-1) < V ≤ W·N, contiguous, overwritten with the first V columns of all; -0.0 may become 0.0.

        Returns:
            `out_RV`.
        """

    def gather_tokens(self, x_TE: Tensor, count_1: Tensor, *, norm: Norm | None = None) -> GatheredTokens:
        """Put the tokens of all ranks one after another, where each has its own.

        Args:
            x_TE: [T, E], T ≥ 1 and the same on all ranks, contiguous.
            count_1: [1] int32 on the device: so many of the rows, the first ones, are tokens, and the others padding, which is
                not sent; 0 on a rank that has nothing to do.
            norm: of the tokens.

        Returns:
            All ranks', after the norm, with 0.0 in place of -0.0.
        """

    def scatter_sum(
        self,
        part_AE: Tensor,
        counts_N: Tensor,
        residual_TE: Tensor,
        *,
        multiplier: float = 1.0,
        post_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Add the sum of what all ranks made of this rank's tokens to its residual stream, and normalise the stream.

        Args:
            part_AE: [A, E], what this rank made of all ranks' tokens, contiguous. Padding is not read.
            counts_N: [N] int32, as `gather_tokens` returned it; the sums of padding are 0.
            residual_TE: [T, E], this rank's own; otherwise this and the others as of `add_sum`.

        Returns:
            As `add_sum`.
        """

    def loop_back(self) -> AbstractContextManager[None]:
        """Inside, collectives touch nothing of other ranks, as if each of these had sent what this one has. So a rank can compile
        kernels, warm up and capture by itself. It is not part of what a graph captures: graphs replayed outside do communicate.
        Entered and left by the host with no collective under way. May be nested."""

    def fault(self) -> Fault | None:
        """The first collective that was given up, if any was. Read from host memory, by any thread."""

    def abort(self) -> None:
        """Have collectives under way, and all to come, given up at once: another rank is gone. By any thread."""

    def close(self) -> None:
        """Give up what is shared with other ranks; no collective, and no graph that has one, may run after it."""
