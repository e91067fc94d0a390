"""The ring of orders: memory that a leader writes and its workers read, each at its own pace.

An order is four int32 words (a kind, a number, a shape, how many words follow) and, rarely, more. So a step that differs from the
one before it in nothing costs 16 bytes. Orders may be longer than the ring: they pass through it piece by piece.

A reader spins for some microseconds, then looks again and again with short naps between, and some milliseconds after the last
order it falls asleep until the writer wakes it. The writer pays a system call only for those that are asleep: none while steps
follow each other.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import select
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int32]

CAPACITY = 1 << 18
"""Words of the ring."""
NUMBERS = 1 << 31
"""Numbers of orders are below it."""
_STORES_IN_ORDER = platform.machine() in ("x86_64", "AMD64")
"""Whether processors show each other their stores in the order of the program."""
_HEADER = struct.Struct("4i")
_HEADER_WORDS = 4
_LINE = 8
"""int64 words of a line of the table before the ring, so that no two processes write one line of a cache."""
_READ, _ASLEEP, _FAILED, _TAKEN = range(4)
"""Columns of a reader's line. Line 0 is the writer's, where `_READ` says how many words it has written. `_FAILED` has the number
of a failure above what failed, and `_TAKEN`, which the writer writes, that of the last one taken."""
_WHAT_BITS = 32
_SPIN_S = 20e-6
_SPIN_BEFORE_LAUNCH_S = 300e-6
"""After orders that a launch follows as a rule."""
_NAP_S = 50e-6
_AWAKE_S = 20e-3
"""So long after the last order a reader falls asleep."""
_PATIENT_S = 200e-6
"""After so long a wait for a reader, the writer looks what ails it."""
_SLEEP_S = 0.1
"""How long a reader sleeps at most: stores of two processes may pass each other on some machines, and a wake-up be lost."""


class Kind(IntEnum):
    """What an order is about."""

    LAUNCH = 1
    """Launch the graph of a shape, on a plan that changed where words follow."""
    EAGER = 2
    """The same without a graph."""
    SHAPE = 3
    """Give a shape a number."""
    CAPTURE = 4
    """Capture the graph of a shape, and agree on it."""
    TRY = 5
    """Run a shape without a graph, on nothing, and agree on whether memory suffices."""
    ADMIT = 6
    MASKS = 7
    CALL = 8
    """Call a function and reply."""
    END = 9
    """There are no more orders of this engine."""
    ONLY = 10
    """The next order is for one rank alone."""


class Order(NamedTuple):
    """What a leader wants."""

    kind: int
    number: int
    shape: int
    words: Words
    """What follows."""


NOTHING: Words = np.zeros(0, dtype=np.int32)


def create_memory(num_readers: int, capacity: int = CAPACITY) -> int:
    """A file that is no name's, of the size of a ring; returns its descriptor."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("stepgraph-ring")
    else:
        descriptor, path = tempfile.mkstemp(prefix="stepgraph-ring-")
        os.unlink(path)
    os.ftruncate(descriptor, _size(num_readers, capacity))
    return descriptor


def _size(num_readers: int, capacity: int) -> int:
    return 8 * _LINE * (1 + num_readers) + 4 * capacity


class _Memory:
    def __init__(self, descriptor: int, num_readers: int, capacity: int) -> None:
        self.map = mmap.mmap(descriptor, _size(num_readers, capacity))
        self.start = 8 * _LINE * (1 + num_readers)
        self.table = memoryview(self.map)[: self.start].cast("q")
        self.words: Words = np.frombuffer(self.map, dtype=np.int32, offset=self.start)
        self.capacity = capacity
        self._lock = threading.Lock()
        self._acquire, self._release = self._lock.acquire, self._lock.release

    def exchange_fence(self) -> None:
        """What was stored before is seen before anything is loaded after."""
        self._acquire()
        self._release()

    def fence(self) -> None:
        """What was stored before is seen before what is stored after, and what is loaded after was not before."""
        with self._lock:
            pass
        with self._lock:
            pass


class RingWriter:
    """The leader's end. One thread writes.

    Args:
        descriptor: of `create_memory`.
        wakes: of each reader, the descriptor by which it is woken.
        check: called again and again while a reader is waited for, with its number and the seconds since it did anything;
            raises what ends the waiting.
        capacity: words of the ring.
    """

    def __init__(
        self, descriptor: int, wakes: Sequence[int], check: Callable[[int, float], None], capacity: int = CAPACITY
    ) -> None:
        self._memory = _Memory(descriptor, len(wakes), capacity)
        self._wakes, self._check = wakes, check
        self._lines = range(_LINE, _LINE * (1 + len(wakes)), _LINE)
        self._sleepers = [(line + _ASLEEP, wake) for line, wake in zip(self._lines, wakes, strict=True)]
        self._written = 0
        self._limit = capacity  # words up to which there is room, as far as is known

    def write(self, kind: Kind, number: int = 0, shape: int = 0, words: Words = NOTHING) -> None:
        """Give an order. Waits where readers leave no room.

        Args:
            words: contiguous.
        """
        # Steps follow each other at some hundred microseconds, after which any line of Python is slow: there are few here.
        memory, length = self._memory, len(words)
        if self._limit - self._written < _HEADER_WORDS:
            self._await_room(_HEADER_WORDS)
        offset = memory.start + 4 * (self._written % memory.capacity)
        _HEADER.pack_into(memory.map, offset, kind, number, shape, length)
        self._written += _HEADER_WORDS
        if length:
            self._write_words(words)
        self._publish()

    def _write_words(self, words: Words) -> None:
        memory, length, done = self._memory, len(words), 0
        while done < length:
            if self._limit == self._written:
                self._publish()
                self._await_room(1)
            begin = self._written % memory.capacity
            count = min(length - done, self._limit - self._written, memory.capacity - begin)
            memory.words[begin : begin + count] = words[done : done + count]
            self._written += count
            done += count
        self._written += -length % _HEADER_WORDS  # where the next order begins: a header lies in one piece

    def take_failure(self, reader: int) -> int:
        """What a reader could not carry out, as it has reported since the last call; 0 if nothing."""
        table, line = self._memory.table, self._lines[reader]
        number, what = divmod(table[line + _FAILED], 1 << _WHAT_BITS)
        if number == table[line + _TAKEN]:
            return 0
        table[line + _TAKEN] = number
        return what

    def _publish(self) -> None:
        memory, table = self._memory, self._memory.table
        if not _STORES_IN_ORDER:
            memory.fence()
        table[_READ] = self._written
        memory.exchange_fence()
        for asleep, wake in self._sleepers:
            if table[asleep]:
                table[asleep] = 0
                # It may have been told often enough, or be gone, as those find who wait for it.
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(wake, b"\0")

    def _await_room(self, count: int) -> None:
        memory = self._memory
        for reader in range(len(self._wakes)):
            self._await(reader, self._written + count - memory.capacity)
        self._limit = min(memory.table[line + _READ] for line in self._lines) + memory.capacity
        memory.fence()

    def _await(self, reader: int, position: int) -> None:
        """Wait until a reader has read the words up to `position`."""
        table, place = self._memory.table, self._lines[reader] + _READ
        seen, since = table[place], time.perf_counter()
        while (now := table[place]) < position:
            waited = time.perf_counter() - since
            if now != seen:
                seen, since = now, time.perf_counter()
            if waited > _PATIENT_S:
                self._check(reader, waited)
                time.sleep(_PATIENT_S / 10)


class RingReader:
    """A worker's end.

    Args:
        descriptor: of `create_memory`.
        reader: its number, from 0 on.
        num_readers: of the ring.
        wake: by which the writer wakes it.
        capacity: words of the ring.
    """

    def __init__(self, descriptor: int, reader: int, num_readers: int, wake: int, capacity: int = CAPACITY) -> None:
        self.waited_s = 0.0
        """Seconds spent waiting for orders."""
        self._memory = _Memory(descriptor, num_readers, capacity)
        self._line = _LINE * (1 + reader)
        self._wake = wake
        self._poll = select.poll()
        self._poll.register(wake, select.POLLIN)
        self._read = self._memory.table[self._line + _READ]
        self._spin_s = _SPIN_S

    def next(self) -> Order:
        """The next order; waits for it."""
        memory = self._memory
        self._await_words()
        offset = memory.start + 4 * (self._read % memory.capacity)
        kind, number, shape, length = _HEADER.unpack_from(memory.map, offset)
        self._read += _HEADER_WORDS
        words = self._take(length) if length else NOTHING
        memory.fence()
        memory.table[self._line + _READ] = self._read
        self._spin_s = _SPIN_BEFORE_LAUNCH_S if kind in (Kind.ADMIT, Kind.MASKS, Kind.ONLY) else _SPIN_S
        return Order(kind, number, shape, words)

    def report_failure(self, what: int) -> None:
        """Have the leader see that an order could not be carried out.

        Args:
            what: not 0; kept until the leader takes it, and dropped while it has not taken the one before.
        """
        table, line = self._memory.table, self._line
        number = table[line + _FAILED] >> _WHAT_BITS
        if number == table[line + _TAKEN]:
            table[line + _FAILED] = (number + 1) << _WHAT_BITS | what

    def _take(self, length: int) -> Words:
        memory, words, done = self._memory, np.empty(length, dtype=np.int32), 0
        while done < length:
            written = self._await_words()
            begin = self._read % memory.capacity
            count = min(length - done, written - self._read, memory.capacity - begin)
            words[done : done + count] = memory.words[begin : begin + count]
            done += count
            self._read += count
            if done < length:
                memory.fence()
                memory.table[self._line + _READ] = self._read
        self._read += -length % _HEADER_WORDS
        return words

    def _await_words(self) -> int:
        """Wait until there are words that were not read; returns how many were written in all."""
        memory, table = self._memory, self._memory.table
        if table[_READ] <= self._read:
            started = time.perf_counter()
            waited = 0.0
            while table[_READ] <= self._read and waited < _AWAKE_S:
                if waited > self._spin_s:
                    time.sleep(_NAP_S)
                waited = time.perf_counter() - started
            while table[_READ] <= self._read:
                table[self._line + _ASLEEP] = 1
                memory.fence()
                if table[_READ] <= self._read and self._poll.poll(_SLEEP_S * 1e3):
                    os.read(self._wake, 4096)
                table[self._line + _ASLEEP] = 0
            self.waited_s += time.perf_counter() - started
        memory.fence()
        return table[_READ]
