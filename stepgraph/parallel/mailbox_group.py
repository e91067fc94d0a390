"""A group whose collectives are stepgraph's own operators, over memory that the ranks share.

Shapes: N ranks, T tokens of each, A = N·T tokens, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stepgraph.ops.collectives import Mailbox, all_gather_columns, all_reduce_add, gather_tokens, scatter_sum
from stepgraph.ops.collectives.mailbox import (
    ABORT,
    ALL_GATHER,
    ALL_REDUCE,
    FAULT,
    GATHER_TOKENS,
    HEAD_BYTES,
    LOOP_BACK,
    MOST_ROWS,
    RECORD,
    SCATTER_SUM,
    Record,
)
from stepgraph.parallel.group import Fault, GatheredTokens, Norm
from stepgraph.parallel.shard import Shard

_COLLECTIVES = {
    ALL_REDUCE: "all_reduce",
    ALL_GATHER: "all_gather",
    GATHER_TOKENS: "gather_tokens",
    SCATTER_SUM: "scatter_sum",
}


class MailboxGroup:
    """See `stepgraph.parallel.group.Group`. What does not fit into a slot of the mailbox goes in several messages."""

    def __init__(
        self,
        name: str,
        shard: Shard,
        mailbox: Mailbox,
        *,
        slot_elements: int,
        time_limit_s: float,
        synchronize: Callable[[], None],
        close: Callable[[], None],
    ) -> None:
        """Args:
        name: of the group, see `Group.name`.
        shard: this rank's.
        mailbox: of this rank, which has the group from now on.
        slot_elements: numbers that a message may have.
        time_limit_s: of a wait for another rank.
        synchronize: waits for all that the device was given.
        close: gives up the mailbox's memory, once the device is done with it.
        """
        self.name, self.shard = name, shard
        self.fault_flag: Tensor | None = mailbox.flags[FAULT : FAULT + 1]
        self._mailbox, self._slot_elements = mailbox, slot_elements
        self._time_limit_ns = round(1e9 * time_limit_s)
        self._host = mailbox.host.numpy()
        self._depth = 0  # of loop_back
        self._synchronize, self._close = synchronize, close

    def add_sum(
        self,
        part_TE: Tensor,
        residual_TE: Tensor,
        *,
        multiplier: float = 1.0,
        post_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """See `Group.add_sum`."""
        out_TE = None if norm is None else torch.empty_like(residual_TE)
        for rows in self._messages(*part_TE.shape):
            all_reduce_add(
                part_TE[rows],
                residual_TE[rows],
                None if out_TE is None else out_TE[rows],
                self._mailbox,
                self.shard.rank,
                self._time_limit_ns,
                multiplier,
                *(post_norm or (None, 0.0)),
                *(norm or (None, 0.0)),
            )
        return residual_TE if out_TE is None else out_TE

    def gather(self, part_RW: Tensor, out_RV: Tensor) -> Tensor:
        """See `Group.gather`."""
        for rows in self._messages(*part_RW.shape):
            all_gather_columns(part_RW[rows], out_RV[rows], self._mailbox, self.shard.rank, self._time_limit_ns)
        return out_RV

    def gather_tokens(self, x_TE: Tensor, count_1: Tensor, *, norm: Norm | None = None) -> GatheredTokens:
        """See `Group.gather_tokens`."""
        x_NTE, counts_N = x_TE.new_empty(self.shard.size, *x_TE.shape), count_1.new_empty(self.shard.size)
        weight, eps = norm or (None, 0.0)
        for rows in self._messages(*x_TE.shape, head=HEAD_BYTES // x_TE.element_size()):
            gather_tokens(
                x_TE[rows],
                count_1,
                weight,
                eps,
                x_NTE[:, rows],
                counts_N,
                rows.start,
                self._mailbox,
                self.shard.rank,
                self._time_limit_ns,
            )
        return GatheredTokens(x_NTE.flatten(0, 1), counts_N)

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
        """See `Group.scatter_sum`."""
        out_TE = None if norm is None else torch.empty_like(residual_TE)
        part_NTE, head = part_AE.view(self.shard.size, *residual_TE.shape), HEAD_BYTES // part_AE.element_size()
        for rows in self._messages(*residual_TE.shape, ranks=self.shard.size, head=head):
            scatter_sum(
                part_NTE[:, rows],
                counts_N,
                residual_TE[rows],
                None if out_TE is None else out_TE[rows],
                rows.start,
                self._mailbox,
                self.shard.rank,
                self._time_limit_ns,
                multiplier,
                *(post_norm or (None, 0.0)),
                *(norm or (None, 0.0)),
            )
        return residual_TE if out_TE is None else out_TE

    @contextmanager
    def loop_back(self) -> Iterator[None]:
        """See `Group.loop_back`."""
        self._set_depth(self._depth + 1)
        try:
            yield
        finally:
            self._set_depth(self._depth - 1)

    def fault(self) -> Fault | None:
        """See `Group.fault`."""
        record = Record.of(int(self._host[RECORD]))
        return record and Fault(record.rank, _COLLECTIVES[record.collective], record.sequence)

    def abort(self) -> None:
        """See `Group.abort`."""
        self._host[ABORT] = 1

    def close(self) -> None:
        """See `Group.close`."""
        self._close()

    def _set_depth(self, depth: int) -> None:
        """Nothing is under way before or after, on any stream: what a failed capture left behind is not to reach other ranks."""
        self._synchronize()
        self._depth = depth
        self._mailbox.flags[LOOP_BACK].fill_(depth)
        self._synchronize()

    def _messages(self, num_rows: int, width: int, *, ranks: int = 1, head: int = 0) -> Iterator[slice]:
        """Which rows go in each message.

        Args:
            num_rows, width: of all.
            ranks: for which a message has so many rows each.
            head: numbers of a message before its rows.
        """
        fit = (self._slot_elements - head) // (ranks * width)
        assert fit > 0, (width, self._slot_elements)
        step = min(fit, MOST_ROWS)
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))
