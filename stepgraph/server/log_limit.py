"""Keeps the log from being filled by who need no key for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_MAX_PATH = 256


class LogLimit(logging.Filter):
    """Lets so many lines of a kind through in each span of time; the first of the next span says how many there were beyond. A
    kind is what has the same message before its values are put in.

    Args:
        limits: whether a record is limited at all.
        max_lines: in each span.
        span_s: length of a span.
    """

    def __init__(
        self,
        limits: Callable[[logging.LogRecord], bool] = lambda record: True,
        *,
        max_lines: int = 10,
        span_s: float = 10.0,
    ):
        super().__init__()
        self._limits = limits
        self._max_lines = max_lines
        self._span_s = span_s
        self._spans: dict[str, tuple[float, int]] = {}  # by kind: when it began, and lines since

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        if not self._limits(record):
            return True
        kind, now = str(record.msg), time.monotonic()
        began, count = self._spans.get(kind, (now, 0))
        if now - began >= self._span_s:
            if count > self._max_lines:
                record.msg = f"{record.msg} ({count - self._max_lines} more such lines were left out)"
            began, count = now, 0
        self._spans[kind] = began, count + 1
        return count < self._max_lines


def is_refused_access(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's access log is of a request without a key that opens the API."""
    return isinstance(record.args, tuple) and record.args[-1:] == (401,)


def shorten_path(record: logging.LogRecord) -> bool:
    """For `Logger.addFilter`, to uvicorn's access log: a path may be as long as the headers of a request."""
    if isinstance(record.args, tuple) and len(record.args) == 5 and len(path := str(record.args[2])) > _MAX_PATH:
        record.args = (*record.args[:2], path[:_MAX_PATH] + "…", *record.args[3:])
    return True
