"""The movers of several ranks are as one: the slowest says how far they are, and none begins before its rank's steps are done."""

import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe

import pytest
import torch
from test_mover import LAYOUT, Memory, flat, part, whole
from torch import Tensor

from stepgraph.executor.rank_movers import MoverService, RankedMovers
from stepgraph.parallel.shard import Shard
from stepgraph.platforms.torch_memory import TorchMemory
from stepgraph.transfer.base import Move, Moves, TransferError
from stepgraph.transfer.local_movers import LocalMovers
from stepgraph.transfer.messages import PROTOCOL, Hello
from stepgraph.transfer.mover import copy_blocks
from stepgraph.transfer.rank_cache import RankCache

SIZE = 3
PEER = Hello(PROTOCOL, "source", "model", LAYOUT.digest, ("in tests",), True, ("", ""))


class Source(Memory):
    """An engine of two ranks."""

    def __init__(self) -> None:
        super().__init__(whole(1), num_ranks=2)
        self.times_closed = 0

    def close(self) -> None:
        self.times_closed += 1


class Backend:
    """Reaches a source of this process."""

    name, moves = "in tests", "sink"

    def __init__(self, source: Source) -> None:
        self.source, self.failure, self.is_closed = source, "", False
        self.copies = self.copy_at_once

    def copy_at_once(self, *args) -> None:
        copy_blocks(*args)

    def copy(self, *args) -> None:
        self.copies(*args)

    def describe(self) -> str:
        return ""

    def attach(self, peer: Hello) -> Source:
        assert peer == PEER
        if self.failure:
            raise TransferError(self.failure)
        return self.source

    def close(self) -> None:
        self.is_closed = True


class Engine:
    """Three ranks of a sink, of which two have their mover at the other end of a pipe."""

    def __init__(self, service: type[MoverService] = MoverService) -> None:
        self.source = Source()
        self.backends = [Backend(self.source) for _ in range(SIZE)]
        self.num_done, self.done_by_workers = 0, threading.Semaphore(0)
        self.pipes = [Pipe() for _ in range(SIZE - 1)]
        self._service = service
        self.build()

    def build(self) -> None:
        self.caches: list[list[list[Tensor]]] = []
        movers = []
        for rank, backend in enumerate(self.backends):
            shard = Shard(rank, 4)  # of heads, which three ranks could not share
            self.caches.append(part(whole(99), shard))
            tensors = tuple(map(tuple, self.caches[-1]))
            memory = TorchMemory(torch.device("cpu"), releasable=True)
            movers.append(LocalMovers(RankCache(LAYOUT, shard, tensors, memory, None), backend))
        self.services = [
            self._service(theirs, mover, self.wait_done)
            for (_, theirs), mover in zip(self.pipes, movers[1:], strict=True)
        ]
        self.movers = RankedMovers(movers[0], [ours for ours, _ in self.pipes], lambda: self.num_done)

    def wait_done(self, num_steps: int) -> None:
        if num_steps:
            assert num_steps == self.num_done
            assert self.done_by_workers.acquire(timeout=30)

    def holds(self, rank: int, pairs: dict[int, int]) -> bool:
        """Whether blocks of a rank are those of the source; target → source."""
        expected = part(whole(1), Shard(rank, 4))
        return all(
            torch.equal(mine[block].view(torch.uint8), theirs[pairs[block]].view(torch.uint8))
            for mine, theirs in zip(flat(self.caches[rank]), flat(expected), strict=True)
            for block in pairs
        )

    def close(self) -> None:
        self.movers.close()
        for ours, theirs in self.pipes:
            ours.close()
            theirs.close()


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-4)


def test_all_ranks_copy_what_one_is_told(engine) -> None:
    caches = engine.movers.attach(PEER)
    assert caches.num_blocks == 6
    moves, others = caches.begin(), caches.begin()
    moves.submit(Move((1, 5), (4, 2), -1))
    others.submit(Move((3,), (1,), -1))
    moves.submit(Move((0,), (3,), -1))
    wait(lambda: moves.num_moved == 3 and others.num_moved == 1)
    assert all(engine.holds(rank, {4: 1, 2: 5, 3: 0, 1: 3}) for rank in range(SIZE))
    assert not moves.done()
    moves.cancel()
    wait(moves.done)
    assert not others.done()
    assert (moves.error, others.error) == (None, None)


def test_the_slowest_rank_says_how_far_they_are(engine) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(*args) -> None:
        entered.set()
        assert leave.wait(30)
        copy_blocks(*args)

    engine.backends[2].copies = slow
    moves = engine.movers.attach(PEER).begin()
    moves.submit(Move((1,), (4,), -1))
    assert entered.wait(30)
    wait(lambda: engine.holds(0, {4: 1}) and engine.holds(1, {4: 1}))
    assert moves.num_moved == 0
    moves.cancel()
    time.sleep(0.01)  # enough for one that does not wait for the copy
    assert not moves.done()
    leave.set()
    wait(moves.done)


def begins_early(service: type[MoverService]) -> bool:
    """Whether a worker copies while steps are under way on it that may touch the blocks."""
    engine = Engine(service)
    try:
        caches = engine.movers.attach(PEER)
        engine.num_done = 7
        moves = caches.begin()
        moves.submit(Move((1,), (4,), -1))
        wait(lambda: engine.holds(0, {4: 1}))
        time.sleep(0.02)
        early = any(engine.holds(rank, {4: 1}) for rank in (1, 2))
        engine.done_by_workers.release(2)
        wait(lambda: moves.num_moved == 1)
        return early
    finally:
        engine.close()


def test_a_worker_waits_for_its_own_steps() -> None:
    assert not begins_early(MoverService)


class Hasty(MoverService):
    """Takes the leader's steps for those of its rank."""

    def __init__(self, pipe, movers, wait_done) -> None:
        super().__init__(pipe, movers, lambda num_steps: None)


def test_mutant_a_worker_that_does_not_wait_is_caught() -> None:
    assert begins_early(Hasty)


@pytest.mark.parametrize("rank", range(SIZE))
def test_what_fails_on_a_rank_fails_with_its_name_and_nothing_else_does(engine, rank) -> None:
    caches = engine.movers.attach(PEER)
    well, broken = caches.begin(), caches.begin()
    first = caches.begin()
    first.submit(Move((2,), (1,), -1))
    wait(lambda: first.num_moved == 1)

    def fail(*args) -> None:
        raise OSError("no such memory")

    engine.backends[rank].copies = fail
    broken.submit(Move((1,), (4,), -1))
    wait(lambda: broken.error is not None)
    assert str(broken.error) == ("no such memory" if rank == 0 else f"rank {rank}: no such memory")
    assert broken.num_moved == 0
    engine.backends[rank].copies = copy_blocks
    broken.submit(Move((1,), (4,), -1))  # whoever submits may not know yet
    broken.cancel()
    wait(broken.done)
    well.submit(Move((1,), (5,), -1))
    wait(lambda: well.num_moved == 1)


@pytest.mark.parametrize("rank", range(SIZE))
def test_a_source_that_a_rank_cannot_reach_is_let_go_by_all(engine, rank) -> None:
    engine.backends[rank].failure = "too far"
    with pytest.raises(TransferError, match="^too far$" if rank == 0 else f"^rank {rank}: too far$"):
        engine.movers.attach(PEER)
    assert engine.source.times_closed == SIZE - 1
    engine.backends[rank].failure = ""
    moves = engine.movers.attach(PEER).begin()
    moves.submit(Move((1,), (4,), -1))
    wait(lambda: moves.num_moved == 1)


def test_to_let_go_of_a_source_ends_what_was_begun(engine) -> None:
    caches = engine.movers.attach(PEER)
    moves = caches.begin()
    moves.submit(Move((1,), (4,), 0))  # a step that never comes
    caches.close()
    assert moves.done()
    assert engine.source.times_closed == SIZE


def test_a_worker_that_is_gone_moves_nothing_more(engine) -> None:
    caches = engine.movers.attach(PEER)
    moves: Moves = caches.begin()
    moves.submit(Move((1,), (4,), 0))
    with socket.socket(fileno=os.dup(engine.pipes[1][1].fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
    wait(lambda: moves.error is not None)
    assert str(moves.error) == "rank 2: it is gone"
    moves.cancel()
    wait(moves.done)
    with pytest.raises(TransferError, match=r"^rank 2: it is gone$"):
        engine.movers.attach(PEER)
    assert caches.begin().error is not None


def test_pipes_that_are_closed_on_a_failure_end_all(engine) -> None:
    moves = engine.movers.attach(PEER).begin()
    moves.submit(Move((1,), (4,), 0))
    for ours, theirs in engine.pipes:  # as whoever ends workers does, which end by force
        with socket.socket(fileno=os.dup(theirs.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        ours.close()
    engine.movers.close()
    assert moves.done()


def test_the_pipes_serve_one_engine_after_another(engine) -> None:
    for number in range(1, 3):
        moves = engine.movers.attach(PEER).begin()
        moves.submit(Move((1,), (4,), -1))
        wait(lambda moves=moves: moves.num_moved == 1)
        caches = engine.movers.attach(PEER)
        left = caches.begin()
        left.submit(Move((1,), (5,), 0))
        engine.movers.close()
        assert left.done()
        assert all(backend.is_closed for backend in engine.backends)
        assert engine.source.times_closed == number * 2 * SIZE
        left.submit(Move((1,), (5,), -1))  # these three find nobody, now or in the next engine
        left.cancel()
        caches.close()
        assert not any(theirs.poll() for _, theirs in engine.pipes)
        for backend in engine.backends:
            backend.is_closed = False
        engine.build()
