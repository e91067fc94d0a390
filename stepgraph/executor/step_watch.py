"""Notices a step that does not end: some collectives wait for ever for a rank that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LOOKS = 8
"""In the time of the limit."""


class StepWatch:
    """Watches one step after another, in a thread of its own.

    Args:
        limit_s: that a step may take.
        late: called once, by that thread, when a step takes longer.
    """

    def __init__(self, limit_s: float, late: Callable[[], None]) -> None:
        self.limit_s = limit_s
        self.is_late = False
        """Whether a step has taken longer."""
        self._late = late
        self.since: float | None = None
        """When the wait under way began, by `time.monotonic`; who waits says so."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stepgraph-step-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self.limit_s / _LOOKS):
            since = self.since
            if since is not None and time.monotonic() - since > self.limit_s:
                self.is_late = True
                self._late()
                return
