"""What those who watch an engine get to know of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import msgspec

from stepgraph.server.generation import EndedRequest
from stepgraph.server.messages import Failed, FromEngine, Progress, Ready


class EngineState(StrEnum):
    """Where an engine's process is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"  # it died, and waits to be started again or loads
    FAILED = "failed"  # its settings or model are unusable
    STOPPED = "stopped"


class RestartCause(StrEnum):
    """Why a serving engine is started again."""

    DIED = "died"
    HUNG = "hung"


class EngineStatus(msgspec.Struct):
    """What becomes of an engine's process."""

    state: EngineState = EngineState.LOADING
    ready: Ready | None = None
    """What the running engine said of itself, or the last one."""
    failure: Failed | None = None
    """Why the engine died last."""
    is_dormant: bool = False
    """The process ended while it slept: it is started when it is to wake up, as its memory was given away."""
    address: str | None = None
    """Where front processes of their own reach it."""

    @property
    def trouble(self) -> str | None:
        """Why it serves no requests now; None if it does."""
        if self.state is EngineState.LOADING:
            return "the model is being loaded"
        if self.is_dormant:
            return "the engine's process ended while it slept; POST /wake_up starts it"
        if self.state is EngineState.RESTARTING:
            reason = "" if self.failure is None else f" ({self.failure.message})"
            return f"the engine stopped{reason} and is being started again"
        if self.state is not EngineState.READY:
            return "the engine has stopped" + ("" if self.failure is None else f": {self.failure.message}")
        return None


class EngineListener(Protocol):
    """Hears what becomes of the engines, which are numbered from 0. Called in the event loop, so it must be quick."""

    def on_message(self, replica: int, message: FromEngine) -> None:
        """News of requests and steps."""

    def on_status(self, replica: int, status: EngineStatus) -> None:
        """The engine's process has come to another state of its life."""

    def on_restart(self, replica: int, cause: RestartCause) -> None:
        """A serving engine is started again."""

    def on_end(self, replica: int, reason: str) -> None:
        """The process is gone, and what it had to do with it."""


class RequestObserver(Protocol):
    """Watches the requests of one engine. Called in the event loop, so it must be quick."""

    def on_progress(self, message: Progress) -> None:
        """Requests got tokens."""

    def on_first_token(self, seconds: float) -> None:
        """A request got its first token so long after it arrived."""

    def on_token_gap(self, seconds: float) -> None:
        """A request got further tokens so long after its last ones."""

    def on_end(self, request: EndedRequest) -> None:
        """A request has ended."""
