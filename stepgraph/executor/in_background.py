"""Work done in a thread while something else goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from stepgraph.platforms import Platform


@contextmanager
def in_background(work: Iterator[None], platform: Platform) -> Iterator[None]:
    """Do `work` step by step in a thread while the body runs. Leaving the body waits for its end, and raises what it raised; if
    the body fails, the rest of the work is left."""
    left = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="stepgraph-background") as thread:
        done = thread.submit(_run, work, platform, left)
        try:
            yield
        except BaseException:
            left.set()
            raise
        done.result()


def _run(work: Iterator[None], platform: Platform, left: threading.Event) -> None:
    with platform.side_stream():
        for _ in work:
            if left.is_set():
                return
