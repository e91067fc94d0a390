"""Kernels that push tokens and sums, one rank at a time: what is sent, read and left alone; see test_collectives.py.

Shapes: N ranks, T tokens of each, E hidden size.
"""

import pytest
import torch
from test_collectives import Rank, is_empty, parts_of_all_sizes, random
from torch import Tensor

from stepgraph.ops.collectives import reference
from stepgraph.ops.collectives import triton_tokens as kernels
from stepgraph.ops.collectives.mailbox import (
    ABORT,
    FAULT,
    GATHER_TOKENS,
    HEAD_BYTES,
    LOOP_BACK,
    RECORD,
    SCATTER_SUM,
    Record,
)

E = 40
HEAD = HEAD_BYTES // 2
"""Of float16."""


class TokenRank(Rank):
    """Rank 1 of three, on float16."""

    def __init__(self, device: str) -> None:
        super().__init__(1, 3, torch.float16, device)
        self.device = device

    def arrive_tokens(self, turn: int, sender: int, count: int, rows: Tensor) -> None:
        """Have a message of [T, E] be there, of which so many rows are sent."""
        message = torch.full((HEAD,), self.empty, dtype=torch.int16)
        message[:2] = torch.tensor([count, rows.shape[0]])
        self.mailbox.inbox[turn, sender, :HEAD] = message.to(self.device)
        bits = rows[:count].to(self.dtype).contiguous().view(torch.int16).flatten()
        bits = torch.where(bits == self.empty, 0, bits)
        self.mailbox.inbox[turn, sender, HEAD : HEAD + bits.numel()] = bits.to(self.device)

    def message(self, turn: int, receiver: int) -> Tensor:
        return self.inboxes[receiver, turn, self.rank].cpu()

    def gather_tokens(
        self, x: Tensor, count: int, start: int = 0, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        out = torch.full((3, *x.shape), torch.nan, dtype=self.dtype, device=self.device)
        count_1 = torch.tensor([count], dtype=torch.int32, device=self.device)
        counts = torch.full((3,), 99, dtype=torch.int32, device=self.device) if counts is None else counts
        kernels.gather_tokens(
            x.to(self.device), count_1, None, 0.0, out, counts, start, *self.mailbox, self.rank, 1 << 60
        )
        return out.cpu(), counts

    def scatter_sum(self, parts: Tensor, counts: list[int], residual: Tensor, start: int = 0) -> Tensor:
        residual = residual.to(self.device, copy=True)
        counts_N = torch.tensor(counts, dtype=torch.int32, device=self.device)
        kernels.scatter_sum(
            parts.to(self.device), counts_N, residual, None, start, *self.mailbox, self.rank, 1 << 60, 0.5, None, 0.0, None, 0.0
        )  # fmt: skip
        return residual.cpu()


def some_x(rows: int) -> Tensor:
    x = random(5, rows, E).half()
    x[:, 0], x[:, 1] = -0.0, 0.0
    return x


@pytest.mark.parametrize(("rows", "counts"), [(7, (2, 5, 0)), (1, (1, 0, 1)), (40, (40, 39, 1)), (3, (0, 0, 0))])
def test_tokens_are_sent_and_padding_is_not(rows: int, counts: tuple[int, ...], device: str) -> None:
    me, x = TokenRank(device), some_x(rows)
    x[counts[1] :, 2] = torch.nan
    sent = {other: random(other, rows, E).half() for other in me.others()}
    for other in me.others():
        me.arrive_tokens(0, other, counts[other], sent[other])
    out, found_N = me.gather_tokens(x, counts[1])
    assert found_N.tolist() == list(counts)
    assert torch.equal(out[1].nan_to_num(9), x.nan_to_num(9))  # the rank's own are there, padding too
    assert not torch.signbit(out[1][:, :2]).any()
    for other in me.others():
        assert torch.equal(out[other, : counts[other]], sent[other][: counts[other]])
        assert out[other, counts[other] :].isnan().all(), "left as it was"
        message = me.message(0, other)
        assert message[:2].tolist() == [counts[1], rows]
        assert torch.equal(message[HEAD:].view(torch.float16)[: counts[1] * E].view(-1, E), x[: counts[1]])
        assert is_empty(message[HEAD + counts[1] * E :])
        assert is_empty(message[2:HEAD])
    assert not me.mailbox.host.any()
    assert me.mailbox.state.tolist() == [[1, HEAD + rows * E]] * len(me.mailbox.state)


def test_counts_of_several_messages_add_up(device: str) -> None:
    me, counts = TokenRank(device), None
    of_all = 5, 3, 7
    for turn, (start, rows) in enumerate(((0, 4), (4, 3))):
        for other in me.others():
            me.arrive_tokens(turn, other, min(max(of_all[other] - start, 0), rows), random(other, rows, E))
        _, counts = me.gather_tokens(some_x(rows), of_all[1], start, counts)
        assert me.message(turn, 0)[:2].tolist() == [min(max(3 - start, 0), rows), rows]
    assert counts.tolist() == list(of_all)


@pytest.mark.parametrize(("rows", "counts"), [(7, (2, 5, 0)), (1, (1, 0, 1)), (40, (3, 38, 40)), (3, (0, 0, 0))])
def test_each_rank_is_sent_the_parts_of_its_own_tokens(rows: int, counts: tuple[int, ...], device: str) -> None:
    me, residual = TokenRank(device), random(80, rows, E).half()
    own, arrived = parts_of_all_sizes(3, rows, E).half(), parts_of_all_sizes(3, rows, E).half().flip(0)
    for rank, count in enumerate(counts):
        own[rank, count:] = torch.nan
    for other in me.others():
        me.arrive_tokens(0, other, counts[1], arrived[other])
    found = me.scatter_sum(own, list(counts), residual)
    expected = residual.clone()
    parts = torch.stack([arrived[0], own[1], arrived[2]])
    count = torch.tensor(counts[1])
    reference.reduce_gathered(parts, expected, None, 0.5, None, 0.0, None, 0.0, count)
    assert torch.equal(found, expected)
    assert torch.equal(found[counts[1] :], residual[counts[1] :]), "of padding, nothing changes"
    for other in me.others():
        message = me.message(0, other)
        assert message[1] == rows
        assert torch.equal(
            message[HEAD:].view(torch.float16)[: counts[other] * E].view(-1, E), own[other, : counts[other]]
        )
        assert is_empty(message[HEAD + counts[other] * E :])
    assert not me.mailbox.host.any()


@pytest.mark.parametrize("collective", [GATHER_TOKENS, SCATTER_SUM])
def test_a_rank_without_tokens_waits_for_every_other_one(collective: int, device: str) -> None:
    """Else it would be launches ahead of them, and write where they still read."""
    me = TokenRank(device)
    me.arrive_tokens(0, 0, 0, random(0, 2, E))
    me.mailbox.host[ABORT] = 1  # which what has arrived does not mind
    if collective == GATHER_TOKENS:
        _, counts_N = me.gather_tokens(some_x(2), 0)
        assert counts_N.tolist() == [0, 0, 0]
    else:
        residual = random(80, 2, E).half()
        assert torch.equal(me.scatter_sum(random(1, 3, 2, E).half(), [0, 0, 0], residual), residual)
    assert Record.of(int(me.mailbox.host[RECORD])) == Record(2, collective, 0)
    assert me.mailbox.flags[FAULT] == 1


@pytest.mark.parametrize("collective", [GATHER_TOKENS, SCATTER_SUM])
def test_alone_a_rank_is_all_ranks(collective: int, device: str) -> None:
    me = TokenRank(device)
    me.mailbox.flags[LOOP_BACK] = 1
    if collective == GATHER_TOKENS:
        x = random(5, 4, E).half()
        out, counts_N = me.gather_tokens(x, 3)
        assert counts_N.tolist() == [3, 3, 3]
        assert all(torch.equal(rows[:3], x[:3]) for rows in out)
    else:
        own, residual = random(5, 3, 4, E).half(), random(80, 4, E).half()
        expected = residual.clone()
        reference.reduce_gathered(own[1].expand(3, 4, E), expected, None, 0.5, None, 0.0, None, 0.0, torch.tensor(3))
        assert torch.equal(me.scatter_sum(own, [0, 3, 1], residual), expected)
    assert is_empty(me.inboxes)
    assert not me.mailbox.state.any()


def test_what_a_failed_wait_leaves_is_no_number_of_rows(device: str) -> None:
    me = TokenRank(device)
    me.mailbox.flags[FAULT] = 1
    for count in (-5, 3, 99):
        _, counts_N = me.gather_tokens(some_x(7), count)
        assert counts_N.tolist() == [min(max(count, 0), 7)] * 3
