"""What watches steps that do not end."""

import threading
import time

import pytest

from stepgraph.executor.step_watch import StepWatch


def test_a_step_that_does_not_end_is_told_of_once() -> None:
    told, watch = [], None
    ended = threading.Event()
    watch = StepWatch(0.05, lambda: (told.append(watch.is_late), ended.set()))
    watch.since = time.monotonic()
    assert ended.wait(30)
    watch.close()
    assert told == [True]
    assert watch.is_late


def test_steps_that_end_are_not_whatever_comes_between_them() -> None:
    watch = StepWatch(1.0, lambda: pytest.fail("no step was late"))
    for _ in range(6):
        watch.since = time.monotonic()
        time.sleep(0.2)
        watch.since = None
    time.sleep(0.3)
    watch.close()
    assert not watch.is_late
