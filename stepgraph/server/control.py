"""What fronts ask of the supervisor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Control(Protocol):
    """The way to whoever owns the engines, whichever process that is in."""

    async def administer(self, action: str, **arguments: Any) -> Any:
        """Do what an administrator asks; `action`: the name of a method of `Administrator`.

        Raises:
            APIError, StepgraphError: see there.
        """

    async def metrics(self, accept: str | None) -> tuple[bytes, str]:
        """Everything that was counted as text, and its content type; see `Metrics.render`."""

    async def load(self) -> list[int]:
        """Requests in each engine, one for each answer."""

    async def graphs(self) -> list[dict[str, Any]]:
        """The captured graphs of each engine and their uses; of one that cannot tell, ``{"error": why}``.

        Raises:
            EngineDeadError: no engine can tell.
        """

    async def look(self, cursor: Sequence[int] | None) -> dict[str, Any]:
        """What there is to see of the engines; see `Watched.look`."""

    async def trace(self, seconds: float) -> bytes:
        """A trace as JSON, see `chrome_trace`: of what comes in so many seconds, or with 0 of what is kept."""
