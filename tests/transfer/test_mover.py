"""A mover copies what has been written, where it belongs, and stops when told."""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain

import pytest
import torch
from torch import Tensor

from stepgraph.layers.cache import LatentSpec, PagedSpec
from stepgraph.parallel.shard import Shard
from stepgraph.step.memory import CacheLayout
from stepgraph.transfer.base import Move
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.mover import Mover, Moving, copy_blocks

HEADS, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 6


def specs(shard: Shard) -> CacheLayout:
    cut = shard.heads(HEADS)
    paged = PagedSpec(cut.length, 3, torch.float8_e4m3fn, heads=cut)
    return CacheLayout((paged, LatentSpec(5, torch.bfloat16)), (paged,), BLOCK_SIZE, 2, 0, lookahead=1)


LAYOUT = BlockLayout.of(specs(Shard()))
flat = chain.from_iterable


def whole(seed: int) -> list[list[Tensor]]:
    """Random bytes of all heads of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randint(256, (NUM_BLOCKS, item.num_bytes), dtype=torch.uint8, generator=generator)
            .view(item.dtype)
            .view(NUM_BLOCKS, *item.shape)
            for item in spec.per_block(BLOCK_SIZE)
        ]
        for spec in specs(Shard()).specs
    ]


def part(content: list[list[Tensor]], shard: Shard) -> list[list[Tensor]]:
    """What a rank has of it."""
    cut = shard.heads(HEADS)
    return [
        [
            (tensor[:, :, cut.begin : cut.begin + cut.length] if tensor.dim() == 4 else tensor).clone()
            for tensor in tensors
        ]
        for tensors in content
    ]


class Memory:
    """Of an engine of several ranks, whose layers write when a test says so."""

    def __init__(self, content: list[list[Tensor]], num_ranks: int = 1) -> None:
        self.shards = [Shard(rank, num_ranks) for rank in range(num_ranks)]
        self._ranks = [part(content, shard) for shard in self.shards]
        self.seen = [[0] * 3 for _ in self.shards]

    def tensors(self, rank: int) -> list[list[Tensor]]:
        return self._ranks[rank]

    def has_written(self, rank: int, signal: int, step: int) -> bool:
        return self.seen[rank][signal] > step or self.seen[rank][-1] > step

    def write(self, content: list[list[Tensor]], layer: int, step: int) -> None:
        for rank, shard in enumerate(self.shards):
            for mine, new in zip(self._ranks[rank][layer], part(content, shard)[layer], strict=True):
                mine.view(torch.uint8).copy_(new.view(torch.uint8))
            self.seen[rank][layer] = step + 1


@pytest.fixture
def create() -> Iterator[Callable[..., tuple[Mover, list[list[Tensor]]]]]:
    made = []

    def create(shard: Shard = Shard(), kind: type[Mover] = Mover, **settings):  # noqa: B008  # frozen
        own = part(whole(99), shard)
        made.append(kind(LAYOUT, own, shard.heads, shard.rank, **settings))
        return made[-1], own

    yield create
    for mover in made:
        mover.close()


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-4)


def begin(mover: Mover, memory: Memory) -> Moving:
    return mover.begin(memory, [shard.heads for shard in memory.shards])


def same(found: list[list[Tensor]], expected: list[list[Tensor]], pairs: dict[int, int]) -> bool:
    """Whether blocks hold what others do: target → source; all others are as they were at first."""
    before = whole(99)
    return all(
        torch.equal(
            mine[block].view(torch.uint8), (theirs[pairs[block]] if block in pairs else old[block]).view(torch.uint8)
        )
        for block in range(NUM_BLOCKS)
        for mine, theirs, old in zip(flat(found), flat(expected), flat(before), strict=True)
    )


@pytest.mark.parametrize("num_sources", [1, 2, 4, 8])
@pytest.mark.parametrize("num_sinks", [1, 2, 8])
def test_every_rank_gets_its_heads_of_the_blocks(create, num_sources, num_sinks) -> None:
    content = whole(1)
    memory = Memory(content, num_sources)
    for rank in range(num_sinks):
        shard = Shard(rank, num_sinks)
        mover, own = create(shard)
        moving = begin(mover, memory)
        moving.submit(Move((1, 5), (4, 2), -1))
        moving.submit(Move((0,), (3,), -1))
        wait(lambda moving=moving: moving.num_moved == 3)
        expected, before = part(content, shard), part(whole(99), shard)
        pairs = {4: 1, 2: 5, 3: 0}
        for mine, theirs, old in zip(flat(own), flat(expected), flat(before), strict=True):
            for block in range(NUM_BLOCKS):
                one = theirs[pairs[block]] if block in pairs else old[block]
                assert torch.equal(mine[block].view(torch.uint8), one.view(torch.uint8))


def written_late(mover: Mover, own: list[list[Tensor]]) -> bool:
    """Whether what is copied is what a step writes while the mover waits for it, layer by layer."""
    memory, content = Memory(whole(1)), whole(2)
    moving = begin(mover, memory)
    moving.submit(Move((1,), (4,), 7))
    for layer in range(3):
        time.sleep(0.01)  # enough for one that does not wait
        assert moving.num_moved == 0 or type(mover) is not Mover
        memory.write(content, layer, 7)
    wait(lambda: moving.num_moved == 1)
    return same(own, content, {4: 1})


def test_a_layer_is_copied_once_it_is_written(create) -> None:
    assert written_late(*create())


class Hasty(Mover):
    """Copies what is not written yet."""

    def begin(self, memory, sources) -> Moving:
        memory.has_written = lambda rank, signal, step: True
        return super().begin(memory, sources)


def test_mutant_a_mover_that_does_not_wait_is_caught(create) -> None:
    assert not written_late(*create(kind=Hasty))


def test_one_that_waits_does_not_hold_up_others(create) -> None:
    mover, own = create()
    waiting, ready = begin(mover, Memory(whole(1))), begin(mover, Memory(whole(2)))
    waiting.submit(Move((1,), (4,), 0))
    ready.submit(Move((2,), (3,), -1))
    wait(lambda: ready.num_moved == 1)
    assert waiting.num_moved == 0
    assert same(own, whole(2), {3: 2})
    assert not waiting.done()
    waiting.cancel()
    assert waiting.done()
    waiting.submit(Move((1,), (4,), -1))
    ready.submit(Move((1,), (5,), -1))
    wait(lambda: ready.num_moved == 2)
    assert same(own, whole(2), {3: 2, 5: 1})


def test_what_was_cancelled_is_not_done_before_its_copy_has_ended(create) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(*args) -> None:
        entered.set()
        assert leave.wait(30)
        copy_blocks(*args)

    mover, _ = create(copy=slow)
    moving = begin(mover, Memory(whole(1)))
    moving.submit(Move((1,), (4,), -1))
    assert entered.wait(30)
    moving.cancel()
    assert not moving.done()
    leave.set()
    wait(moving.done)
    assert moving.num_moved == 0


def test_a_copy_that_fails_ends_its_fetch_alone(create) -> None:
    mover, own = create()
    wrong, right = begin(mover, Memory(whole(1))), begin(mover, Memory(whole(2)))
    wrong.submit(Move((NUM_BLOCKS,), (4,), -1))
    right.submit(Move((1,), (3,), -1))
    wait(lambda: right.num_moved == 1 and wrong.done())
    assert isinstance(wrong.error, (IndexError, RuntimeError))
    assert same(own, whole(2), {3: 1})


def test_nothing_is_copied_after_the_end(create) -> None:
    mover, own = create()
    waiting, later = begin(mover, Memory(whole(1))), begin(mover, Memory(whole(1)))
    waiting.submit(Move((1,), (4,), 0))
    mover.close()
    later.submit(Move((1,), (4,), -1))
    assert waiting.done()
    assert later.done()
    assert same(own, whole(1), {})
