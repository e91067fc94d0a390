"""Ctrl-C between steps: an interrupt in the middle of one would leave the engine in a state nobody knows."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

_PATIENCE_S = 0.5
"""A Ctrl-C that comes sooner after the first is the same wish, of an impatient finger; a later one says that the step hangs."""


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the end of the block, and let one through at once that comes half a second or more after the first.

    Signals reach the main thread only; in others this does nothing, and neither does it where Ctrl-C is ignored or handled
    outside Python.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held_since: float | None = None

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held_since
        if held_since is None:
            held_since = monotonic()
        elif monotonic() - held_since >= _PATIENCE_S:
            held_since = None
            handler(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held_since is not None:
            handler(signal.SIGINT, None)
