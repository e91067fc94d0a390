"""KVEvents: what enters and leaves one prefix cache, noted as it happens and taken by whoever tells others.

The engine's thread notes: a note is a tuple put into a queue, a microsecond or less. All else, hashes as others know them, bytes
and sockets, is the work of the thread that takes the notes (`stepgraph.engine.kv_event_publisher`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import StrEnum
from queue import Empty, SimpleQueue
from typing import NamedTuple

_MOST_TAKEN = 256
"""Notes that are taken at a time: they make one message."""
_NAP_S, _MOST_NAPS = 0.005, 20
"""Between looks whether there is something to take, and how many come before whoever takes sleeps until it is woken: waking it
costs the engine's thread more than a note."""


class Medium(StrEnum):
    """Where blocks are, in the words of vLLM's events: in the device's memory, whatever that is, or in the host's beside it."""

    GPU = "GPU"
    CPU = "CPU"


class Stored(NamedTuple):
    """Blocks of one chain, in its order, can be found."""

    keys: Sequence[bytes]
    parent: bytes | None
    """Key of the block before them; None if they begin the chain."""
    tokens: tuple[Sequence[int], Sequence[int]]
    """All of theirs: those of the prompt, and those of the answer behind it."""
    adapter: str | None
    """Name of the LoRA adapter."""
    salt: str | None


class StoredOnHost(NamedTuple):
    """Blocks, of any chains, can be found in host memory too."""

    keys: Sequence[bytes]


class Removed(NamedTuple):
    """Blocks cannot be found any more."""

    keys: Sequence[bytes]
    medium: Medium


class Cleared(NamedTuple):
    """No block can be found any more, wherever it was."""


Event = Stored | StoredOnHost | Removed | Cleared


class KVEvents:
    """One thread notes, another takes. If that one is too far behind, all that waits is dropped, and it hears that the cache was
    cleared: what others then know is less than there is, but never more.

    Args:
        max_queued: events that may wait.
    """

    def __init__(self, max_queued: int) -> None:
        self._queue: SimpleQueue[Event | None] = SimpleQueue()
        self._max_queued = max_queued
        self._is_overrun = False

    def stored(
        self,
        keys: Sequence[bytes],
        parent: bytes | None,
        tokens: tuple[Sequence[int], Sequence[int]],
        adapter: str | None,
        salt: str | None,
    ) -> None:
        """See `Stored`."""
        self._note(Stored(keys, parent, tokens, adapter, salt))

    def removed(self, keys: Sequence[bytes]) -> None:
        """The device's memory has blocks no more."""
        self._note(Removed(keys, Medium.GPU))

    def stored_on_host(self, keys: Sequence[bytes]) -> None:
        """See `StoredOnHost`."""
        self._note(StoredOnHost(keys))

    def removed_from_host(self, keys: Sequence[bytes]) -> None:
        """Host memory has blocks no more."""
        self._note(Removed(keys, Medium.CPU))

    def cleared(self) -> None:
        """See `Cleared`."""
        self._note(Cleared())

    def close(self) -> None:
        """Nothing more comes."""
        self._queue.put(None)

    def take(self) -> list[Event] | None:
        """Wait for events, and take them; None once nothing more comes."""
        for _ in range(_MOST_NAPS):
            time.sleep(_NAP_S)
            if not self._queue.empty():
                break
        event = self._queue.get()
        events: list[Event] = []
        while event is not None:
            events.append(event)
            if self._is_overrun:
                # Reset before the queue is emptied: what overruns it again meanwhile is then told of again.
                self._is_overrun = False
                self._empty()
                return [Cleared()]
            if len(events) == _MOST_TAKEN:
                return events
            try:
                event = self._queue.get_nowait()
            except Empty:
                return events
        if events:
            self._queue.put(None)  # the end is for the next call
        return events or None

    def _note(self, event: Event) -> None:
        if self._queue.qsize() < self._max_queued:
            self._queue.put(event)
        elif not self._is_overrun:
            self._is_overrun = True
            self._queue.put(Cleared())  # or whoever takes might not hear of it until something else happens

    def _empty(self) -> None:
        """Drop what waits, but for the end."""
        try:
            while self._queue.get_nowait() is not None:
                pass
        except Empty:
            return
        self._queue.put(None)
