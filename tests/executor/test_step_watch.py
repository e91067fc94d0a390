"""What watches steps that do not end."""

import threading
import time

import pytest

from stepgraph.executor.step_watch import StepWatch


def test_a_step_that_does_not_end_is_told_of_once() -> None:
    told, watch = [], None
    ended = threading.Event()
    watch = StepWatch(0.05, lambda: (told.append(watch.is_late), ended.set()))
    with watch.watching():
        assert ended.wait(30)
    watch.close()
    assert told == [True]
    assert watch.is_late


def test_steps_that_end_are_not_whatever_comes_between_them() -> None:
    watch = StepWatch(1.0, lambda: pytest.fail("no step was late"))
    for _ in range(10):
        with watch.watching():
            pass
    with pytest.raises(KeyError), watch.watching():
        raise KeyError
    time.sleep(1.5)
    watch.close()
    assert not watch.is_late
