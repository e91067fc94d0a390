"""What an engine may do now."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stepgraph.errors import EngineDeadError, StepgraphError

T = TypeVar("T")


class Lifecycle:
    """Steps are launched unless the engine is paused, asleep or without weights; nothing is done after a failure or its end."""

    def __init__(self) -> None:
        self.is_paused = False
        self.sleep_level = 0
        """How deep it sleeps; 0 if it does not."""
        self.has_weights = True
        self.failure: BaseException | None = None
        self.is_shut_down = False

    @property
    def idle_reason(self) -> str | None:
        """Why no step is launched whatever waits, and what ends that; None if steps are launched."""
        if self.sleep_level:
            return "it sleeps; call wake_up()"
        if not self.has_weights:
            return "it has no weights; call update_weights()"
        return "it is paused; call resume()" if self.is_paused else None

    def check_alive(self) -> None:
        """EngineDeadError after a failure, or the end."""
        if self.is_shut_down:
            raise EngineDeadError("the engine was shut down; create another one")
        if self.failure is not None:
            raise EngineDeadError(f"the engine stopped on an earlier error: {self.failure}") from self.failure

    def noting_failure(self, call: Callable[[], T]) -> T:
        """What fails in `call` leaves requests and the device in a state nobody knows: the engine ends."""
        try:
            return call()
        except BaseException as error:
            self.failure = error
            if isinstance(error, StepgraphError) or not isinstance(error, Exception):
                raise
            raise EngineDeadError(f"the engine stopped on an error: {error}") from error
