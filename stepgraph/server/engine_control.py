"""What the engine's process does for administrators, in the engine's thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from stepgraph.engine.engine import Engine
from stepgraph.errors import ConfigError, EngineDeadError, RequestError
from stepgraph.models.adapters import AdapterFile
from stepgraph.server.messages import (
    Beat,
    LoadAdapter,
    Pause,
    Question,
    ResetPrefixCache,
    Resume,
    Sleep,
    UpdateWeights,
    WakeUp,
)


class EngineControl:
    """Does what is asked of an engine, and knows which weights it has.

    Args:
        engine: asked between two steps only.
        announce: tells whoever watches the loop that it may be silent for long.
    """

    def __init__(self, engine: Engine, announce: Callable[[Beat], None]):
        self._engine = engine
        self._announce = announce
        self._weights: str | None = None
        """Those that replaced the model's own."""

    def obey(self, question: Question) -> int | None:
        """Do what is asked; the answer.

        Raises:
            ConfigError: the settings do not allow it, or others use the memory that it needs.
            ModelError: weights cannot be read, or are not of the model.
            EngineDeadError: the engine cannot go on.
        """
        engine = self._engine
        if isinstance(question, Pause):
            engine.pause()
        elif isinstance(question, Resume):
            engine.resume()
        elif isinstance(question, Sleep):
            self._sleep(question.level)
        elif isinstance(question, WakeUp):
            self._wake()
        elif isinstance(question, UpdateWeights):
            self.update_weights(question.folder)
        elif isinstance(question, ResetPrefixCache):
            return engine.reset_prefix_cache(preempt=question.preempt)
        return None

    def update_weights(self, folder: str) -> None:
        """See `Engine.update_weights`. If new weights are damaged, those from before are read again."""
        self._announce(Beat(reads=True))
        try:
            self._engine.update_weights(folder)
        except Exception as error:
            if not self._engine.has_weights:
                self._read_again(error)
            raise
        self._weights = folder

    def keep(self, question: LoadAdapter, file: AdapterFile) -> None:
        """Take an adapter that was read into the device's memory. If requests use all places for some, the first request for this
        one reads it again."""
        with contextlib.suppress(RequestError):
            self._engine.load_adapter(file, replace=question.anew)

    def _sleep(self, level: int) -> None:
        if level == 2 and self._engine.config.model.load_format == "dummy":
            raise ConfigError(
                "sleep level 2 drops the weights, and load_format=dummy has none to be read again; use level 1"
            )
        self._announce(Beat(reads=True))
        self._engine.sleep(level)

    def _wake(self) -> None:
        self._announce(Beat(reads=True))
        self._engine.wake_up()
        if self._engine.has_weights:
            return
        try:
            self._engine.update_weights(self._weights or self._engine.source)
        except BaseException:
            self._engine.sleep(2)
            raise

    def _read_again(self, reason: Exception) -> None:
        try:
            self._engine.update_weights(self._weights or self._engine.source)
        except Exception as error:
            raise EngineDeadError(f"new weights are damaged ({reason}), and the old ones are gone: {error}") from error
