"""Collectives: reference against float64, Triton against the reference; the kernels that push, one rank at a time.

The other rank's inbox is memory of this process, and what it sends lies in this rank's inbox before a launch. Shapes: N ranks,
T tokens, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stepgraph.ops.collectives import Mailbox, mailbox, reference
from stepgraph.ops.collectives import triton as kernels
from stepgraph.ops.collectives.mailbox import ABORT, ALL_GATHER, ALL_REDUCE, FAULT, LOOP_BACK, RECORD, Record
from stepgraph.ops.collectives.triton_push import CLEARED_AT_ONCE

EPS = 1e-5
SLOT = CLEARED_AT_ONCE
EMPTY = {2: -(1 << 15), 4: -(1 << 31)}
MOST_PROGRAMS = 2 * mailbox.MOST_PROGRAMS_A_MULTIPROCESSOR
DTYPES = [torch.float16, torch.float32]  # Triton's interpreter truncates to bfloat16 instead of rounding


def random(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def parts_of_all_sizes(num_ranks: int, *size: int) -> Tensor:
    """[N, *size], of sizes so different that the order of a sum shows."""
    return torch.stack([random(rank, *size) * 10.0 ** (2 - 2 * rank) for rank in range(num_ranks)])


def both_norms(width: int, dtype: torch.dtype) -> tuple[Tensor, float, Tensor, float]:
    return random(90, width), EPS, random(91, width).to(dtype), 1e-6


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_the_reference_is_the_formula(num_ranks: int, post: bool) -> None:
    parts, residual = parts_of_all_sizes(num_ranks, 4, 96), random(80, 4, 96)
    post_weight, post_eps, weight, eps = both_norms(96, torch.float32)
    total = parts.double().sum(0)
    if post:
        total = total / (total.square().mean(-1, keepdim=True) + post_eps).sqrt() * post_weight.double()
    updated = residual.double() + 0.22 * total
    normed = updated / (updated.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    out = torch.full_like(residual, torch.nan)
    reference.reduce_gathered(parts, residual, out, 0.22, post_weight if post else None, post_eps, weight, eps)
    torch.testing.assert_close(residual.double(), updated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), normed, rtol=1e-5, atol=1e-5)


def test_the_sum_is_in_the_order_of_the_ranks_and_rounded_once() -> None:
    """Big, minus big, small: only in this order is the small one left; and of 16 bits, only if nothing between is rounded."""
    residual = torch.ones(1, 3, dtype=torch.bfloat16)
    parts = torch.tensor([[1e8, 1.0, 2.0**-9], [-1e8, 1e8, 2.0**-9], [1.0, -1e8, 2.0**-9]]).bfloat16().view(3, 1, 3)
    reference.reduce_gathered(parts, residual, None, 1.0, None, 0.0, None, 0.0)
    assert residual[0, 0] == 2
    assert residual[0, 1] == 1  # the first is lost
    assert residual[0, 2] == 1 + 2.0**-7  # each alone would be rounded away


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("post", "norm"), [(False, False), (False, True), (True, True)])
def test_triton_adds_up_what_is_there_as_the_reference_does(
    dtype: torch.dtype, post: bool, norm: bool, device: str
) -> None:
    parts, residual = parts_of_all_sizes(3, 4, 200).to(dtype), random(80, 4, 200).to(dtype)
    post_weight, post_eps, weight, eps = both_norms(200, dtype)
    rest = 0.22, post_weight if post else None, post_eps, weight if norm else None, eps
    out = torch.full_like(residual, torch.nan) if norm else None
    there = [x.to(device) if isinstance(x, Tensor) else x for x in (parts, residual, out, *rest)]
    there[1] = there[1].clone()
    if norm:
        there[2] = there[2].clone()
    kernels.reduce_gathered(*there)
    reference.reduce_gathered(parts, residual, out, *rest)
    if post:  # the sum of squares has an order of its own
        torch.testing.assert_close(there[1].cpu(), residual, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    else:
        assert torch.equal(there[1].cpu(), residual)
    if norm:
        torch.testing.assert_close(there[2].cpu(), out, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


class Rank:
    """This rank among N, whose sends are what the test puts into its inbox."""

    def __init__(self, rank: int, num_ranks: int, dtype: torch.dtype, device: str) -> None:
        self.rank, self.size, self.dtype = rank, num_ranks, dtype
        self.empty = EMPTY[dtype.itemsize]
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        self.inboxes = torch.full((num_ranks, 3, num_ranks, SLOT), self.empty, dtype=bits, device=device)
        """Of all ranks."""
        self.mailbox = Mailbox(
            self.inboxes[rank],
            [inbox.data_ptr() for inbox in self.inboxes],
            torch.zeros(MOST_PROGRAMS, 2, dtype=torch.int64, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int64, pin_memory=device == "cuda"),
        )

    def arrive(self, turn: int, sender: int, numbers: Tensor) -> None:
        """Have another rank's message be there."""
        bits = numbers.to(self.dtype).contiguous().view(self.inboxes.dtype).flatten()
        self.mailbox.inbox[turn, sender, : bits.numel()] = torch.where(bits == self.empty, 0, bits)

    def sent(self, turn: int, receiver: int) -> Tensor:
        """What this rank has put into another one's inbox, [slot]."""
        return self.inboxes[receiver, turn, self.rank].cpu().view(self.dtype)

    def others(self) -> Iterator[int]:
        return (rank for rank in range(self.size) if rank != self.rank)

    def add(self, part: Tensor, residual: Tensor, out: Tensor | None, *rest: Tensor | float | None) -> None:
        kernels.all_reduce_add(part, residual, out, *self.mailbox, self.rank, 1 << 60, *rest)

    def gather(self, part: Tensor, out: Tensor) -> None:
        kernels.all_gather_columns(part, out, *self.mailbox, self.rank, 1 << 60)


PLAIN = (1.0, None, 0.0, None, 0.0)


def is_empty(inbox: Tensor) -> bool:
    return bool((inbox == EMPTY[inbox.element_size()]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_push_adds_what_has_arrived_in_the_order_of_the_ranks(rank: int, dtype: torch.dtype, device: str) -> None:
    """More rows than programs, and fewer; a width that is no power of two; zeros of either sign."""
    me = Rank(rank, 3, dtype, device)
    rest = 0.22, None, 0.0, *both_norms(40, dtype)[2:]
    for epoch, rows in enumerate((43, 1, 2, 5)):
        parts = parts_of_all_sizes(3, rows, 40).to(dtype)
        parts[:, 0, :4] = -0.0
        parts[1, 0, 1] = 0.0
        residual = random(80 + epoch, rows, 40).to(dtype)
        residual[0, :3] = -0.0
        for other in me.others():
            me.arrive(epoch % 3, other, parts[other])
        there, out = residual.to(device).clone(), torch.full_like(residual, torch.nan, device=device)
        me.add(parts[rank].to(device), there, out, *[x.to(device) if isinstance(x, Tensor) else x for x in rest])
        expected = residual.clone(), torch.empty_like(residual)
        reference.reduce_gathered(parts, *expected, *rest)
        assert torch.equal(there.cpu().view(me.inboxes.dtype), expected[0].view(me.inboxes.dtype))  # signs of zeros too
        torch.testing.assert_close(out.cpu(), expected[1], rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
        for other in me.others():
            sent = me.sent(epoch % 3, other)
            assert torch.equal(sent[: rows * 40].view(rows, 40), parts[rank])
            assert not torch.signbit(sent[: rows * 40].view(rows, 40)[parts[rank] == 0]).any()
            assert is_empty(sent[rows * 40 :].view(me.inboxes.dtype))
            me.inboxes[other].fill_(me.empty)
    assert me.mailbox.state.tolist() == [[4, 5 * 40]] * MOST_PROGRAMS
    assert not me.mailbox.host.any()


def test_what_was_read_is_cleared_by_the_next_launch_whatever_its_shape(device: str) -> None:
    me = Rank(0, 2, torch.float16, device)
    sizes = [(3, 40), (1, 8), (12, 100), (2, 16)]
    for epoch, (rows, width) in enumerate(sizes):
        me.arrive(epoch % 3, 1, torch.ones(rows, width))
        x = torch.zeros(rows, width, dtype=torch.float16, device=device)
        if epoch % 2:
            me.gather(x, torch.zeros(rows, 2 * width, dtype=torch.float16, device=device))
        else:
            me.add(x, x.clone(), None, *PLAIN)
        now, last, next_ = (me.mailbox.inbox[(epoch + shift) % 3, 1].cpu() for shift in (0, 2, 1))
        assert not (now[: rows * width] == me.empty).any()
        assert is_empty(now[rows * width :])
        assert is_empty(last)
        assert is_empty(next_)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [0, 3])
def test_a_push_gathers_columns_beside_each_other(dtype: torch.dtype, last: int, device: str) -> None:
    """The last rank may have columns that are not wanted."""
    rows, width, rank = 5, 130, 1
    me = Rank(rank, 3, dtype, device)
    parts = random(7, 3, rows, width).to(dtype)
    parts[:, 1] = -0.0
    for other in me.others():
        me.arrive(0, other, parts[other])
    out = torch.full((rows, 3 * width - last), torch.nan, dtype=dtype, device=device)
    me.gather(parts[rank].to(device), out)
    expected = torch.empty(out.shape, dtype=dtype)
    reference.gather_columns(parts, expected)
    assert torch.equal(out.cpu(), expected)
    assert not torch.signbit(out[1]).any()  # the same zeros on all ranks
    for other in me.others():
        assert torch.equal(me.sent(0, other)[: rows * width].view(rows, width), parts[rank])
    assert me.mailbox.state.tolist() == [[1, rows * width]] * MOST_PROGRAMS


@pytest.mark.parametrize("flag", [LOOP_BACK, FAULT])
def test_alone_a_rank_is_all_ranks_and_leaves_no_trace(flag: int, device: str) -> None:
    me = Rank(1, 3, torch.float32, device)
    me.mailbox.flags[flag] = 1
    part, residual = random(1, 4, 40).to(device), random(2, 4, 40).to(device)
    expected = residual.cpu().clone()
    reference.reduce_gathered(part.cpu().expand(3, 4, 40), expected, None, *PLAIN)
    me.add(part, residual, None, *PLAIN)
    assert torch.equal(residual.cpu(), expected)
    out = torch.zeros(4, 120, device=device)
    me.gather(part, out)
    assert torch.equal(out.cpu(), torch.cat([part.cpu()] * 3, dim=1))
    assert is_empty(me.inboxes)
    assert not me.mailbox.state.any()
    assert not me.mailbox.host.any()


@pytest.mark.parametrize("collective", [ALL_REDUCE, ALL_GATHER])
def test_a_rank_that_gives_up_names_whom_it_waited_for_and_waits_no_more(collective: int, device: str) -> None:
    me = Rank(0, 3, torch.float16, device)
    part, residual = (
        torch.ones(4, 40, dtype=torch.float16, device=device),
        torch.zeros(4, 40, dtype=torch.float16, device=device),
    )
    for epoch in range(2):
        for other in me.others():
            me.arrive(epoch, other, torch.ones(4, 40))
        me.add(part, residual, None, *PLAIN)
    assert (residual == 6).all()
    me.mailbox.host[ABORT] = 1  # which what has arrived does not mind
    me.arrive(2, 1, torch.ones(4, 40))
    for _ in range(3):
        if collective == ALL_REDUCE:
            me.add(part, residual, None, *PLAIN)
        else:
            me.gather(part, torch.zeros(4, 120, dtype=torch.float16, device=device))
    assert me.mailbox.flags.tolist() == [0, 1]  # which waits for the device
    assert Record.of(int(me.mailbox.host[RECORD])) == Record(2, collective, 2)
    assert {epoch for epoch, _ in me.mailbox.state.tolist()} <= {2, 3}  # 2: a program that began later


def test_records_hold_any_rank_and_any_number() -> None:
    for record in (Record(0, ALL_REDUCE, 0), Record(254, ALL_GATHER, 1 << 46)):
        assert record.word > 0
        assert Record.of(record.word) == record
    assert Record.of(0) is None
