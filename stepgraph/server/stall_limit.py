"""Cuts off clients that do not read. Closed in another way, their connections stay for as long as they like, and with them what
was not taken."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

_STALLED_S = 60.0
"""A client that takes nothing for so long is cut off, if more waits for it than the buffers of its connection hold."""


class StallLimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol; breaks connections off whose client takes nothing of what it is sent."""

    _looking: asyncio.TimerHandle | None = None
    """For the next look at what waits, while writes have to."""

    def pause_writing(self) -> None:
        """See `HttpToolsProtocol`."""
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        """See `HttpToolsProtocol`."""
        super().resume_writing()
        self._stop_looking()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `HttpToolsProtocol`."""
        super().connection_lost(exc)
        self._stop_looking()

    def _look_later(self) -> None:
        self._looking = self.loop.call_later(_STALLED_S, self._look, self.transport.get_write_buffer_size())

    def _look(self, num_bytes: int) -> None:
        """Break off, unless fewer bytes wait than before."""
        if self.transport.get_write_buffer_size() < num_bytes:
            self._look_later()
        else:
            logger.warning("the client at %s reads nothing and is cut off", self.client)
            self.transport.abort()

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
