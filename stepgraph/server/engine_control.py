"""What the engine's process does for administrators, in the engine's thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from stepgraph.engine.engine import Engine
from stepgraph.errors import ConfigError, RequestError
from stepgraph.models.adapters import AdapterFile
from stepgraph.server.messages import Beat, LoadAdapter, Pause, Question, ResetPrefixCache, Resume, Sleep, WakeUp


def control(engine: Engine, question: Question, announce: Callable[[Beat], None]) -> int | None:
    """Do what is asked; the answer.

    Args:
        engine: between two steps.
        question: one that says what to do with it.
        announce: tells whoever watches the loop that it may be silent for long.

    Raises:
        ConfigError: the settings do not allow it, or others use the memory that it needs.
        ModelError: the weights cannot be read again.
    """
    if isinstance(question, Pause):
        engine.pause()
    elif isinstance(question, Resume):
        engine.resume()
    elif isinstance(question, Sleep):
        if question.level == 2 and engine.config.model.load_format == "dummy":
            raise ConfigError(
                "sleep level 2 drops the weights, and load_format=dummy has none to be read again; use level 1"
            )
        announce(Beat(reads=True))
        engine.sleep(question.level)
    elif isinstance(question, WakeUp):
        announce(Beat(reads=True))
        _wake(engine)
    elif isinstance(question, ResetPrefixCache):
        return engine.reset_prefix_cache(preempt=question.preempt)
    return None


def keep(engine: Engine, question: LoadAdapter, file: AdapterFile) -> None:
    """Take an adapter that was read into the device's memory. If requests use all places for some, the first request for this one
    reads it again."""
    with contextlib.suppress(RequestError):
        engine.load_adapter(file, replace=question.anew)


def _wake(engine: Engine) -> None:
    engine.wake_up()
    if engine.has_weights:
        return
    try:
        engine.update_weights(engine.source)
    except BaseException:
        engine.sleep(2)
        raise
