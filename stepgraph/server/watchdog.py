"""Tells an engine that hangs from one that is busy, by what is heard of its loop."""

from __future__ import annotations

import contextlib
from pathlib import Path

from stepgraph.server.messages import Beat, FromEngine, Ready

_HANG_S = 120.0
"""Silence that is a hang where nobody set a limit: far above what a step takes on a GPU."""
_CAPTURE_S = 600.0
"""A capture may compile kernels, and takes no longer than this."""
_START_S = 600.0
"""A process that starts or wakes up and neither computes nor reads anything for so long is stuck."""
_TICKS = 8
"""Looks in the time of the limit, one a second at most."""


class Watchdog:
    """Counts how long an engine's process has given no sign of life.

    Serving, that is a message: the loop sends some all the time. A process that starts or wakes up sends none for as long as its
    model takes to load, which nobody can know; its sign of life is that it, or a compiler that it runs, uses the processor.

    Args:
        session: process id of the engine, and of the session that it leads.
        limit_s: silence after which a loop counts as hanging; None chooses it by what the engine says of its steps.
    """

    def __init__(self, session: int, limit_s: float | None):
        self._session = session
        self._given_s = limit_s
        self._ready: Ready | None = None
        self._captures = self._reads = False
        self._heard = False
        self._cpu_ticks: int | None = None
        self.silent_s = 0.0
        """Counted in looks: a watcher that stood still itself, or its whole machine, has missed nothing."""

    @property
    def _starts(self) -> bool:
        """Whether it does what takes as long as its model does to load."""
        return self._ready is None or self._reads

    @property
    def limit_s(self) -> float:
        """Silence that is a hang."""
        limit_s = self._given_s
        if limit_s is None:
            limit_s = _HANG_S if self._ready is None else max(_HANG_S, self._ready.longest_step_s)
        if self._starts:
            return max(limit_s, _START_S)
        return max(limit_s, _CAPTURE_S) if self._captures else limit_s

    @property
    def tick_s(self) -> float:
        """Time between two looks."""
        return min(1.0, self.limit_s / _TICKS)

    def hear(self, message: FromEngine) -> None:
        """A message has come."""
        self._heard = True
        self._captures = isinstance(message, Beat) and message.captures
        self._reads = isinstance(message, Beat) and message.reads
        if isinstance(message, Ready):
            self._ready = message

    def look(self) -> bool:
        """Take note of one more tick; whether the process hangs."""
        self.silent_s = 0.0 if self._heard else self.silent_s + self.tick_s
        self._heard = False
        if self.silent_s < self.limit_s:
            return False
        if self._starts:
            before, self._cpu_ticks = self._cpu_ticks, cpu_ticks(self._session)
            if self._cpu_ticks is None or self._cpu_ticks != before:
                self.silent_s = 0.0
                return False
        return True


def cpu_ticks(session: int) -> int | None:
    """Clock ticks that the processes of a session have used, those of ended children included; None where there is no /proc."""
    ticks = None
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks = (ticks or 0) + sum(map(int, fields[11:15]))
    return ticks
