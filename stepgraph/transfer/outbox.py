"""Outbox: what is to be sent over a link, by those who must not wait for the other end."""

from __future__ import annotations

import logging
import threading
from collections import deque

from stepgraph.transfer.link import Link, LinkError, frame_of
from stepgraph.transfer.messages import Message

logger = logging.getLogger(__name__)

_MAX_WAITING = 4096
"""Messages, beyond which the other end takes too few of them to be waited for."""


class Outbox:
    """Sends messages: at once if the other end takes them, for another thread may have to wait while this one computes; else
    in a thread of its own. Closes the link in the end.

    Args:
        link: over which nothing else is sent from now on.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._changed = threading.Condition()
        self._frames: deque[bytes] = deque()
        self._is_sending = self._is_closed = False
        threading.Thread(target=self._run, name="stepgraph-outbox", daemon=True).start()

    def post(self, message: Message) -> None:
        """Send a message after those that were posted before, if the link lasts. Any thread may call it; does not wait."""
        with self._changed:
            if self._is_closed:
                return
            frame = frame_of(message)
            try:
                if not self._is_sending and not self._frames:
                    frame = frame[self._link.offer(frame) :]
                    if not frame:
                        return
                if len(self._frames) == _MAX_WAITING:
                    logger.warning("the other end of a transfer link does not take its messages; the link ends")
                    raise LinkError("it takes nothing")
                self._frames.append(frame)
            except LinkError as error:
                logger.debug("%s", error)  # who receives hears of it, too
                self._frames.clear()
                self._is_closed = True
                self._link.close()
            self._changed.notify()

    def close(self) -> None:
        """Send what was posted, and close the link. Does not wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            while (frame := self._next()) is not None:
                self._link.send_bytes(frame)
        except LinkError as error:
            logger.debug("%s", error)  # who receives hears of it, too
        finally:
            with self._changed:
                self._is_closed = True
                self._frames.clear()
            self._link.close()

    def _next(self) -> bytes | None:
        with self._changed:
            self._is_sending = False
            while not self._frames and not self._is_closed:
                self._changed.wait()
            self._is_sending = bool(self._frames)
            return self._frames.popleft() if self._frames else None
