"""The ring of orders, its ends in threads of this process."""

import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from stepgraph.executor.ring import Kind, Order, RingReader, RingWriter, create_memory

CAPACITY = 64


class Ends:
    """A writer, and readers of a ring of few words."""

    def __init__(self, num_readers: int) -> None:
        memory, pipes = create_memory(num_readers, CAPACITY), [os.pipe() for _ in range(num_readers)]
        self.descriptors = [memory, *(end for pipe in pipes for end in pipe)]
        for _, wake in pipes:
            os.set_blocking(wake, False)
        self.checks = 0
        self.waiting_for: int | None = None
        self.failure: Exception | None = None
        self.writer = RingWriter(memory, [wake for _, wake in pipes], self.check, CAPACITY)
        self.readers = [RingReader(memory, i, num_readers, pipe[0], CAPACITY) for i, pipe in enumerate(pipes)]

    def check(self, reader: int, waited_s: float) -> None:
        self.checks += 1
        self.waiting_for = reader
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def two() -> Iterator[Ends]:
    ends = Ends(2)
    yield ends
    for descriptor in ends.descriptors:
        os.close(descriptor)


def read(reader: RingReader, count: int, into: list[Order], seconds: float = 0.0) -> None:
    for _ in range(count):
        into.append(reader.next())
        time.sleep(seconds)


def test_every_reader_gets_all_orders_in_order_whatever_their_length_and_its_pace(two) -> None:
    lengths = [0, 3, 4, 5, 0, CAPACITY - 4, CAPACITY, CAPACITY + 1, 1, 1000, 0] * 4
    found: list[list[Order]] = [[], []]
    threads = [
        threading.Thread(target=read, args=(reader, len(lengths), into, pause))
        for reader, into, pause in zip(two.readers, found, (0.0, 0.002), strict=True)
    ]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(0)
    sent = [rng.integers(-(2**31), 2**31, length, dtype=np.int32) for length in lengths]
    for number, words in enumerate(sent):
        two.writer.write(Kind.LAUNCH, number, shape=7, words=words)
    for thread in threads:
        thread.join()
    for orders in found:
        assert [order[:3] for order in orders] == [(Kind.LAUNCH, number, 7) for number in range(len(sent))]
        assert all(np.array_equal(order.words, words) for order, words in zip(orders, sent, strict=True))


def test_an_order_without_words_takes_sixteen_bytes(two) -> None:
    two.failure = RuntimeError("the ring is full")
    for number in range(CAPACITY * 4 // 16):
        two.writer.write(Kind.LAUNCH, number, 2)
    with pytest.raises(RuntimeError, match="the ring is full"):
        two.writer.write(Kind.LAUNCH)


def test_a_reader_that_sleeps_is_woken_and_says_how_long_it_waited(two) -> None:
    found: list[Order] = []
    thread = threading.Thread(target=read, args=(two.readers[0], 1, found))
    thread.start()
    time.sleep(0.05)
    two.writer.write(Kind.END)
    thread.join()
    assert [order.kind for order in found] == [Kind.END]
    assert two.readers[0].waited_s > 0.01


def test_waiting_for_a_reader_ends_with_what_the_check_raises(two) -> None:
    two.failure = RuntimeError("rank 2 is gone")
    with pytest.raises(RuntimeError, match="rank 2 is gone"):
        two.writer.write(Kind.ADMIT, words=np.zeros(CAPACITY, dtype=np.int32))
    assert two.waiting_for == 0


def test_the_first_failure_is_taken_once(two) -> None:
    two.readers[1].report_failure(5)
    two.readers[1].report_failure(6)
    assert [two.writer.take_failure(reader) for reader in (0, 1, 1)] == [0, 5, 0]
    two.readers[1].report_failure(5)
    assert [two.writer.take_failure(1) for _ in range(2)] == [5, 0]


def test_a_failure_that_is_taken_while_the_next_one_is_reported_is_not_told_again(two) -> None:
    [reader, _], taken = two.readers, []

    class Table:
        """A reader's, where the writer looks after each of its looks."""

        def __init__(self, table: memoryview) -> None:
            self.table = table

        def __getitem__(self, place: int) -> int:
            found = self.table[place]
            taken.append(two.writer.take_failure(0))
            return found

        def __setitem__(self, place: int, value: int) -> None:
            self.table[place] = value

    reader.report_failure(5)
    reader._memory.table = Table(reader._memory.table)
    reader.report_failure(6)
    taken.append(two.writer.take_failure(0))
    assert [what for what in taken if what] in ([5], [5, 6])
