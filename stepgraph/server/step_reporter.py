"""Tells the supervisor of an engine's steps while somebody looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count

from stepgraph.engine.engine import Engine
from stepgraph.engine.step_recorder import StepRecorder
from stepgraph.server.messages import Seen, Watch

_TELL_S = 0.1
"""Many steps go together: a message costs more than what a step adds to it."""


class StepReporter:
    """Belongs to the engine's thread.

    Args:
        engine: to watch.
        send: a message to the supervisor; never waits.
    """

    def __init__(self, engine: Engine, send: Callable[[Seen], None]):
        self._engine, self._send = engine, send
        self._numbers: Iterator[int] | None = None
        self._recorder: StepRecorder | None = None
        self._begins = self._is_over = False
        self._until = self._told_at = 0.0

    @property
    def is_on(self) -> bool:
        """Whether somebody looks; if not, `tell` has nothing to do."""
        return self._recorder is not None

    def go_on(self, message: Watch) -> None:
        """Somebody looks."""
        if self._numbers is None:
            self._numbers = count(message.first, message.stride)
        if self._recorder is None:
            self._recorder, self._begins = StepRecorder(self._engine, self._numbers), True
        self._until, self._is_over = message.until, False

    def tell(self, *, at_once: bool) -> None:
        """Send what is there, if it is time or `at_once`. Once nobody looks any more, nothing is noted."""
        assert self._recorder is not None
        now = time.monotonic()
        if self._is_over:
            self._recorder.end()
            self._recorder = None
        elif at_once or now - self._told_at >= _TELL_S:
            steps, requests, _ = self._recorder.take()
            if steps or requests or self._begins:
                self._told_at = now
                self._send(Seen(steps, requests, self._begins))
                self._begins = False
        # not at once: after a step of seconds, the news that somebody looks on is still to be read
        self._is_over = now >= self._until
