"""The kernels that push between GPUs, under Triton's interpreter: ranks are processes, and inboxes memory that they map."""

import random

import pytest
import torch
import triton_interpreter  # noqa: F401  # mends it
from torch import Tensor
from triton_operators import triton_operators

from stepgraph.bench.ranks import run_ranks
from stepgraph.ops.collectives import Mailbox, reference
from stepgraph.ops.collectives.mailbox import MOST_PROGRAMS_A_MULTIPROCESSOR
from stepgraph.ops.collectives.triton_push import CLEARED_AT_ONCE
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.group import Fault, Norm
from stepgraph.parallel.mailbox_group import MailboxGroup
from stepgraph.parallel.shard import Shard
from stepgraph.parallel.shared_memory import map_shared

SLOT = CLEARED_AT_ONCE
PROGRAMS = 3

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton does not interpret")


def push_group(shard: Shard, exchange: Exchange, *, time_limit_s: float = 60.0) -> MailboxGroup:
    torch.set_num_threads(1)
    shape = (shard.size, 3, shard.size, SLOT)
    inboxes = torch.frombuffer(map_shared(shard, exchange, 2 * torch.Size(shape).numel()), dtype=torch.int16).view(
        shape
    )
    inboxes[shard.rank].fill_(-(1 << 15))
    exchange(b"")
    mailbox = Mailbox(
        inboxes[shard.rank],
        [inbox.data_ptr() for inbox in inboxes],
        torch.zeros(PROGRAMS * MOST_PROGRAMS_A_MULTIPROCESSOR, 2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
    )
    return MailboxGroup(
        "push",
        shard,
        mailbox,
        slot_elements=SLOT,
        time_limit_s=time_limit_s,
        synchronize=lambda: None,
        close=lambda: None,
    )


def generator(step: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * step + rank)


def shapes(num_steps: int) -> list[tuple[str, int, int]]:
    """What steps do: the collective, rows and columns; more rows than programs, more blocks than one, several messages."""
    draw = random.Random(0)
    return [
        ("add", draw.choice((1, 2, 5, 20)), draw.choice((8, 40, 128)))
        if draw.random() < 0.6
        else ("gather", draw.choice((1, 2, 7)), draw.choice((1, 333)))
        for _ in range(num_steps)
    ]


def part_of(step: int, rank: int, rows: int, columns: int) -> Tensor:
    part = torch.randn(rows, columns, generator=generator(step, rank)) * 10.0 ** (1 - rank)
    part[torch.rand(rows, columns, generator=generator(step, rank)) < 0.1] = -0.0
    return part.half()


def alternating(shard: Shard, exchange: Exchange, num_steps: int) -> int:
    """Returns the number of steps whose result is not the reference's."""
    group = push_group(shard, exchange)
    wrong = 0
    with triton_operators("all_reduce_add", "all_gather_columns"):
        for step, (kind, rows, columns) in enumerate(shapes(num_steps)):
            if step % 5 == shard.rank:  # by itself, between the others' collectives
                with group.loop_back():
                    group.add_sum(torch.ones(2, 8).half(), torch.ones(2, 8).half())
            parts = torch.stack([part_of(step, rank, rows, columns) for rank in range(shard.size)])
            if kind == "add":
                residual = torch.ones(rows, columns).half()
                expected = residual.clone()
                normed = group.add_sum(parts[shard.rank], residual, norm=Norm(torch.ones(columns).half(), 1e-5))
                reference.reduce_gathered(parts, expected, None, 1.0, None, 0.0, None, 0.0)
                wrong += not torch.equal(residual, expected) or not normed.isfinite().all()
            else:
                expected = torch.zeros(rows, columns * shard.size).half()
                reference.gather_columns(parts, expected)
                wrong += not torch.equal(group.gather(parts[shard.rank], torch.empty_like(expected)), expected)
    assert group.fault() is None
    return wrong


@pytest.mark.parametrize(("num_ranks", "num_steps"), [(2, 14), (3, 7)])
def test_collectives_of_alternating_shapes_give_what_the_reference_gives(num_ranks: int, num_steps: int) -> None:
    assert run_ranks(alternating, num_ranks, num_steps) == [0] * num_ranks


def left(shard: Shard, exchange: Exchange) -> Fault | None:
    """The last rank does not come to the second collective."""
    group = push_group(shard, exchange)
    with triton_operators("all_reduce_add", "all_gather_columns"):
        group.add_sum(torch.ones(2, 8).half(), torch.ones(2, 8).half())
        exchange(b"")
        if shard.rank < shard.size - 1:
            group.abort()
            for _ in range(3):
                group.gather(torch.ones(2, 8).half(), torch.ones(2, 8 * shard.size).half())
    exchange(b"")
    return group.fault()


def test_a_rank_that_left_is_named() -> None:
    assert run_ranks(left, 2) == [Fault(1, "all_gather", 1), None]
