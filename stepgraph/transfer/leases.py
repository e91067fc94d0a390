"""Leases: blocks that an engine holds for others to take over, and until when.

A lease begins with a request whose blocks are wanted elsewhere, grows as its prompt is computed, and is *complete* once the
engine has read the results of the last of these steps. A sink *reads* it, maybe from the start on, renews it meanwhile, and has
it *confirmed* when the bytes have arrived. That ends it: its blocks go back.

    growing ──complete──► complete ──confirm──► over
       │                      ├─dropped──► over
       │                      └─expired──► closing ──after a grace period, if anybody may read it──► over
       └─cancelled, as a complete one may be──► over

A lease that is closing or over is lost to whoever asks, with the reason. What was read of it is worth nothing, for its blocks may
be others' by then; the grace period only keeps sinks that are late from reading what is written meanwhile. A name that was used
once is never taken again.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from stepgraph.transfer.messages import Complete, Filled, Lost, Message

_MAX_REMEMBERED = 65_536
"""Names of leases that are over, with what became of them."""


class LossReason(StrEnum):
    """Why a lease gives nothing."""

    UNKNOWN = "unknown"  # there never was one of that name here, or too long ago
    CONFIRMED = "confirmed"  # somebody else has it
    EXPIRED = "expired"
    DROPPED = "dropped"  # by the sink
    CANCELLED = "cancelled"  # its request has ended before its prompt was computed
    CACHE_LOST = "cache_lost"  # the engine sleeps, has new weights, or could not run a step
    NOT_MOVED = "not_moved"  # its bytes cannot be copied
    NOT_COMPLETE = "not_complete"  # confirmed too early, or more blocks than there are


@dataclass
class _Lease:
    expires_at: float = math.inf  # never while its request is computed, which ends it otherwise
    blocks: list[int] = field(default_factory=list)
    first: int = 0  # index of the first of them among the prompt's
    sent: list[Filled] = field(default_factory=list)
    is_complete: bool = False
    tell: Callable[[Message], None] | None = None  # its reader


class Leases:
    """The leases of one engine. Any thread may call it, but for what is said to be the engine's.

    Args:
        duration_s: after which a lease expires that nobody renews.
        grace_s: after which blocks of a lease that was being read go back.
        clock: seconds, monotonic.
    """

    def __init__(self, duration_s: float, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._duration_s, self._grace_s, self._clock = duration_s, grace_s, clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._over: OrderedDict[str, LossReason] = OrderedDict()
        self._closing: list[tuple[float, list[int]]] = []
        self._free: list[int] = []
        self.ended: Counter[LossReason] = Counter()
        """How many are over, by what became of them."""

    def __len__(self) -> int:
        return len(self._leases)

    # The engine's

    def open(self, name: str) -> bool:
        """Begin a lease; False if there is one of that name, or was."""
        with self._lock:
            if name in self._leases or name in self._over:
                return False
            self._leases[name] = _Lease()
            return True

    def fill(self, name: str, start: int, blocks: Sequence[int], keys: Sequence[bytes], step: int) -> bool:
        """Add blocks, which the caller holds once more for this: `collect` gives them back. False if the lease is over; the
        caller keeps them then.

        Args:
            name: of the lease.
            start: index of the first among those of the prompt; after the first call, that after the last one's.
            blocks, keys: of the same number; see `stepgraph.engine.blocks.block_key`.
            step: that writes them; -1: they are written.
        """
        assert len(blocks) == len(keys), (blocks, keys)
        with self._lock:
            lease = self._leases.get(name)
            if lease is None:
                return False
            if not lease.blocks:
                lease.first = start
            assert start == lease.first + len(lease.blocks), (start, lease)
            lease.blocks += blocks
            message = Filled(name, start, tuple(blocks), tuple(key.hex() for key in keys), step)
            lease.sent.append(message)
            if lease.tell is not None:
                lease.tell(message)
            return True

    def complete(self, name: str) -> None:
        """The results of all steps that fill its blocks have been read. From now on it expires."""
        with self._lock:
            lease = self._leases.get(name)
            if lease is not None:
                lease.is_complete, lease.expires_at = True, self._clock() + self._duration_s
                if lease.tell is not None:
                    lease.tell(Complete(name, lease.first + len(lease.blocks)))

    def cancel(self, name: str, reason: LossReason) -> None:
        """End a lease, if it is not over. `collect` gives its blocks back."""
        with self._lock:
            self._cancel(name, reason)

    def cancel_all(self, reason: LossReason) -> None:
        """End all leases: what their blocks hold is lost. `collect` gives all of them back."""
        with self._lock:
            for name in list(self._leases):
                self._cancel(name, reason)
            self._free += [block for _, blocks in self._closing for block in blocks]
            self._closing = []

    def collect(self) -> list[int]:
        """Blocks that nobody reads any more, each as often as it was given; the caller no longer holds them for a lease."""
        with self._lock:
            now = self._clock()
            for name in [name for name, lease in self._leases.items() if lease.expires_at <= now]:
                self._expire(name)
            for until, blocks in self._closing:
                if until <= now:
                    self._free += blocks
            self._closing = [closing for closing in self._closing if closing[0] > now]
            free, self._free = self._free, []
            return free

    # The sink's

    def read(self, name: str, tell: Callable[[Message], None]) -> None:
        """Take a lease over. `tell` gets what is there of it, then what comes, and, if it ends otherwise than confirmed or
        dropped, why: soon, in any thread, and without waiting for anything. One sink reads a lease; for others there is none."""
        with self._lock:
            lease = self._leases.get(name)
            if lease is None or lease.tell is not None:
                tell(Lost(name, LossReason.CONFIRMED if lease is not None else self._reason(name)))
                return
            lease.tell = tell
            for message in lease.sent:
                tell(message)
            if lease.is_complete:
                tell(Complete(name, lease.first + len(lease.blocks)))

    def renew(self, name: str) -> None:
        """Put off the end of a lease, if it is not over."""
        with self._lock:
            lease = self._leases.get(name)
            if lease is not None and self._clock() < lease.expires_at < math.inf:
                lease.expires_at = self._clock() + self._duration_s

    def confirm(self, name: str, num_blocks: int) -> LossReason | None:
        """Whether what was read of the first `num_blocks` blocks of the prompt until now was right: None, and the lease is over.
        Else why not."""
        with self._lock:
            lease = self._leases.get(name)
            if lease is None:
                return self._reason(name)
            reason = LossReason.CONFIRMED
            if lease.expires_at <= self._clock():
                reason = LossReason.EXPIRED
            elif not lease.is_complete or num_blocks > lease.first + len(lease.blocks):
                reason = LossReason.NOT_COMPLETE
            self._give_back(name, reason)
            return None if reason is LossReason.CONFIRMED else reason

    def drop(self, name: str) -> None:
        """The sink gives a lease up: it has stopped reading."""
        with self._lock:
            if name in self._leases:
                self._give_back(name, LossReason.DROPPED)

    def leave(self, name: str) -> None:
        """Nobody is going to read a lease: it ends, if nobody reads it now."""
        with self._lock:
            lease = self._leases.get(name)
            if lease is not None and lease.tell is None:
                self._give_back(name, LossReason.DROPPED)

    def _give_back(self, name: str, reason: LossReason) -> None:
        """End a lease that nobody reads."""
        self._free += self._leases.pop(name).blocks
        self._remember(name, reason)

    def _cancel(self, name: str, reason: LossReason) -> None:
        """End a lease, if it is not over."""
        lease = self._leases.get(name)
        if lease is not None:
            self._give_back(name, reason)
            if lease.tell is not None:
                lease.tell(Lost(name, reason))

    def _expire(self, name: str) -> None:
        """End a lease that somebody may read."""
        lease = self._leases.pop(name)
        self._closing.append((self._clock() + (0.0 if lease.tell is None else self._grace_s), lease.blocks))
        self._remember(name, LossReason.EXPIRED)
        if lease.tell is not None:
            lease.tell(Lost(name, LossReason.EXPIRED))

    def _remember(self, name: str, reason: LossReason) -> None:
        self.ended[reason] += 1
        self._over[name] = reason
        if len(self._over) > _MAX_REMEMBERED:
            self._over.popitem(last=False)

    def _reason(self, name: str) -> LossReason:
        return self._over.get(name, LossReason.UNKNOWN)
