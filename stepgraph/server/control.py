"""What fronts ask of the supervisor."""

from __future__ import annotations

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
