"""Outbox: what is to be sent over a link, by those who must not wait for the other end."""

from __future__ import annotations

import logging
import threading
from collections import deque

from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import Message

logger = logging.getLogger(__name__)

_MAX_WAITING = 4096
"""Messages, beyond which the other end takes too few of them to be waited for."""


class Outbox:
    """Sends messages in a thread of its own, and closes the link in the end.

    Args:
        link: over which nothing else is sent from now on.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._changed = threading.Condition()
        self._messages: deque[Message] = deque()
        self._is_closed = False
        threading.Thread(target=self._run, name="stepgraph-outbox", daemon=True).start()

    def post(self, message: Message) -> None:
        """Send a message after those that were posted before, if the link lasts. Any thread may call it; does not wait."""
        with self._changed:
            if self._is_closed:
                return
            if len(self._messages) == _MAX_WAITING:
                logger.warning("the other end of a transfer link does not take its messages; the link ends")
                self._messages.clear()
                self._is_closed = True
                self._link.close()
            else:
                self._messages.append(message)
            self._changed.notify()

    def close(self) -> None:
        """Send what was posted, and close the link. Does not wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            while (message := self._next()) is not None:
                self._link.send(message)
        except LinkError as error:
            logger.debug("%s", error)  # who receives hears of it, too
        finally:
            with self._changed:
                self._is_closed = True
                self._messages.clear()
            self._link.close()

    def _next(self) -> Message | None:
        with self._changed:
            while not self._messages and not self._is_closed:
                self._changed.wait()
            return self._messages.popleft() if self._messages else None
