"""What keeps the engine from running steps because an administrator wants it so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass
class Rest:
    """Kept by the supervisor: it holds for the next process, too, if the engine's ends."""

    sleep_level: int = 0
    """See `Engine.sleep`; 0 is awake."""
    paused: bool = False
    coming: str | None = None
    """Why new requests are refused while the engine is being brought to rest; None if it is not."""

    @property
    def trouble(self) -> str | None:
        """Why requests are refused; None if they are taken, though they may wait."""
        return self.standstill if self.sleep_level else self.coming

    @property
    def standstill(self) -> str | None:
        """Why requests under way do not end; None if they do."""
        if self.sleep_level:
            return "the engine sleeps; POST /wake_up wakes it"
        return "the engine is paused; POST /resume lets it go on" if self.paused else None

    @property
    def delay(self) -> str | None:
        """Why a request sent now would not run at once; None if it would."""
        return self.trouble or self.standstill

    @property
    def status(self) -> str:
        """In a word."""
        return "asleep" if self.sleep_level else "paused" if self.paused else "ok"


class Dormancy:
    """A process that ended while the engine slept stays away until the engine is to wake up: its memory was given to others."""

    def __init__(self) -> None:
        self._here = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def is_here(self) -> bool:
        """Whether there is no process for that reason."""
        return self._here.is_set()

    async def stay(self) -> None:
        """Wait until it is to end."""
        self._over.clear()
        self._here.set()
        await self._over.wait()

    async def end(self, settled: asyncio.Event) -> None:
        """Have the process started; returns when it is `settled` what became of that, or it stays away again."""
        self._here.clear()
        self._over.set()
        outcomes = [asyncio.create_task(event.wait()) for event in (settled, self._here)]
        try:
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for outcome in outcomes:
                outcome.cancel()
