"""Sharing few places among many that work, so that slow ones hold up nobody who is quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

SLICE_SECONDS = 0.1
"""How long work goes on before it has to let others have its place."""

W = TypeVar("W")


class _Work:
    """How long something has worked, and since when it does."""

    def __init__(self, number: int):
        self.number = number  # in the order of arrivals
        self.before = 0.0  # seconds
        self.since: float | None = None

    def seconds(self, now: float) -> float:
        return self.before + (0.0 if self.since is None else now - self.since)


class TimeSlices(Generic[W]):
    """Who works: few at once, and first of all those that have worked for the shortest time.

    Args:
        limit: how many work at once.
        start: lets one work that has not begun, or was paused; False if it cannot now.
        pause: stops one until it is started again.
        slow: called once for one that has worked for a whole slice.
    """

    def __init__(
        self, limit: int, *, start: Callable[[W], bool], pause: Callable[[W], None], slow: Callable[[W], None]
    ):
        self._limit = limit
        self._start, self._pause, self._slow = start, pause, slow
        self._works: dict[W, _Work] = {}
        self._working: set[W] = set()
        self._known_slow: set[W] = set()
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._works)

    def __contains__(self, worker: W) -> bool:
        return worker in self._works

    def is_working(self, worker: W) -> bool:
        """Whether it has a place."""
        return worker in self._working

    def seconds(self, worker: W, now: float) -> float:
        """How long it has worked."""
        return self._works[worker].seconds(now)

    def enter(self, worker: W) -> None:
        """It has work to do, and waits for `turn` to start it."""
        self._num_arrived += 1
        self._works[worker] = _Work(self._num_arrived)

    def leave(self, worker: W) -> None:
        """It has nothing to do any more, if it had."""
        self._works.pop(worker, None)
        self._working.discard(worker)
        self._known_slow.discard(worker)

    def begin_anew(self, worker: W, now: float) -> None:
        """It is done with a part of its work: what it worked for that does not count."""
        self._works[worker].before = 0.0
        if worker in self._working:
            self._works[worker].since = now
        self._known_slow.discard(worker)

    def turn(self, now: float) -> None:
        """Start those whose turn it is, and pause those whose slice is over if others wait."""
        for worker in self._working - self._known_slow:
            if self.seconds(worker, now) > SLICE_SECONDS:
                self._known_slow.add(worker)
                self._slow(worker)
        if not self._has_place(now):
            return
        for first in sorted(self._works.keys() - self._working, key=lambda worker: self._rank(worker, now)):
            if not self._has_place(now):
                return
            last = None
            if len(self._working) == self._limit and (last := self._last_before(first, now)) is None:
                return
            if not self._start(first):  # which holds up none of those behind it
                continue
            if last is not None:
                self._stop(last, now)
            self._works[first].since = now
            self._working.add(first)

    def _has_place(self, now: float) -> bool:
        return len(self._working) < self._limit or any(self._may_pause(worker, now) for worker in self._working)

    def _rank(self, worker: W, now: float) -> tuple[float, int]:
        return self.seconds(worker, now), self._works[worker].number

    def _may_pause(self, worker: W, now: float) -> bool:
        since = self._works[worker].since
        assert since is not None
        return now > since + SLICE_SECONDS

    def _last_before(self, first: W, now: float) -> W | None:
        """Who makes room for `first`; None if it has worked for as long as they."""
        last = max(
            (worker for worker in self._working if self._may_pause(worker, now)),
            key=lambda worker: self._rank(worker, now),
        )
        return last if self.seconds(last, now) > self.seconds(first, now) else None

    def _stop(self, last: W, now: float) -> None:
        work = self._works[last]
        work.before, work.since = work.seconds(now), None
        self._working.discard(last)
        self._pause(last)
