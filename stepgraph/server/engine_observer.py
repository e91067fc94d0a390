"""What those who watch the engine get to know of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from stepgraph.server.generation import EndedRequest
from stepgraph.server.messages import Progress


class EngineState(StrEnum):
    """Where the engine's process is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"  # it died, and waits to be started again or loads
    FAILED = "failed"  # its settings or model are unusable
    STOPPED = "stopped"


class RestartCause(StrEnum):
    """Why a serving engine is started again."""

    DIED = "died"
    HUNG = "hung"


class Observer(Protocol):
    """Watches the engine and its requests. Called in the event loop, so it must be quick."""

    def on_progress(self, message: Progress) -> None:
        """Steps ran, or the load changed."""

    def on_first_token(self, seconds: float) -> None:
        """A request got its first token so long after it arrived."""

    def on_token_gap(self, seconds: float) -> None:
        """A request got further tokens so long after its last ones."""

    def on_end(self, request: EndedRequest) -> None:
        """A request has ended."""

    def on_state(self, state: EngineState) -> None:
        """The engine's process has come to another state of its life."""

    def on_restart(self, cause: RestartCause) -> None:
        """A serving engine is started again."""
