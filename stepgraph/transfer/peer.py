"""Peer: a source, as a sink sees it: the link to it, and what is fetched from it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TypeVar

from stepgraph.transfer.base import FetchFailure, Inbox, Move, Movers, SourceCaches, TransferError
from stepgraph.transfer.fetch import Pushed, Reason, RemoteFetch
from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import (
    Arrived,
    Bye,
    Complete,
    Confirm,
    Confirmed,
    Drop,
    Dropped,
    Filled,
    Hello,
    Lost,
    Message,
    Open,
    ProtocolError,
    Renew,
)
from stepgraph.transfer.outbox import Outbox
from stepgraph.transfer.sockets import connect

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
"""Between two looks at the clock, while nothing comes."""
_BRIEF_LOOK_S = 2e-4
"""While bytes are all that is missing."""
_IDLE_S = 60.0
"""After which a link that nothing is fetched over ends."""


R = TypeVar("R")


@dataclass(frozen=True)
class Patience:
    """How long a sink waits, in seconds."""

    lease_s: float = 30.0
    """After which leases expire that nobody renews."""
    timeout_s: float = 30.0
    """For anything to happen, once the prompt is computed; and for a connection."""
    wait_s: float = 120.0
    """For anything to happen before that: prompts wait for others."""


class Peer:
    """The link to one source, with a thread that opens it and receives.

    Args:
        host, port: of the source, see `stepgraph.transfer.sockets.connect`.
        secret: that it knows.
        hello: of this engine.
        movers: of this engine.
        receive: see `ExportedCache.receive`.
        patience: of this engine.
        clock: seconds, monotonic.
        gone: called when nothing can be fetched over it any more.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        hello: Hello,
        movers: Movers,
        receive: Callable[[], Inbox] | None,
        patience: Patience,
        clock: Callable[[], float],
        gone: Callable[[Peer], None],
    ) -> None:
        self.host, self.port = host, port
        self._secret, self._hello, self._movers, self._patience, self._clock = secret, hello, movers, patience, clock
        self._gone, self._receive, self._is_pushed_to = gone, receive, receive is not None
        self._pushed: list[Pushed] = []  # that the source may still copy for
        self._lock = threading.RLock()
        self._fetches: dict[str, RemoteFetch] = {}  # by lease; those that the source may still speak of
        self._waiting: set[str] = set()  # leases to be renewed once there is a link
        self._left: set[str] = set()  # that nobody fetches, and of which the source has yet to say that it has heard so
        self._source: Hello | None = None
        self._caches: SourceCaches | None = None  # these two: the one or the other, after the thread has begun
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None
        self._is_over = False
        self._used_at = self._renewed_at = clock()
        self._thread = threading.Thread(target=self._run, name="stepgraph-peer", daemon=True)
        self._thread.start()

    # Any thread

    def fetch(self, fetch: RemoteFetch) -> bool:
        """Begin a fetch; False if nothing can be fetched from here any more."""
        with self._lock:
            if self._is_over:
                return False
            self._used_at = self._clock()
            if fetch.reference.lease in self._fetches:
                fetch.end(LossReason.CONFIRMED)  # somebody else has it
                return True
            fetch.peer = self
            self._fetches[fetch.reference.lease] = fetch
            if self._outbox is not None:
                self._open(fetch)
            return True

    def renew(self, leases: Collection[str]) -> bool:
        """Keep leases alive that are not being fetched; False if that cannot be done from here any more."""
        with self._lock:
            if self._is_over:
                return False
            self._used_at = self._clock()
            if self._outbox is None:
                self._waiting |= set(leases)
            else:
                self._outbox.post(Renew(tuple(leases)))
            return True

    def leave(self, lease: str) -> None:
        """Tell the source that nobody is going to fetch a lease, if nobody does. Does not wait."""
        with self._lock:
            if not self._is_over and lease not in self._fetches:
                self._used_at = self._clock()
                self._waiting.discard(lease)
                self._left.add(lease)
                if self._outbox is not None:
                    self._outbox.post(Drop(lease))

    def give_up(self, fetch: RemoteFetch, reason: Reason) -> None:
        """End a fetch that is under way, and tell the source. Does not wait."""
        with self._lock:
            if fetch.end(reason) and not self._is_over and self._fetches.get(fetch.reference.lease) is fetch:
                if self._outbox is None:
                    del self._fetches[fetch.reference.lease]  # it was never opened
                    self.leave(fetch.reference.lease)
                else:
                    self._drop(fetch)

    def end(self, reason: Reason) -> None:
        """Fetch nothing any more: all that is under way ends for a reason. Does not wait."""
        with self._lock:
            if not self._is_over:
                self._end(reason)

    @property
    def is_alive(self) -> bool:
        """Whether the source's memory may still be reached."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait until the source's memory is not reached any more."""
        self._thread.join(timeout_s)

    # The peer's thread

    def _run(self) -> None:
        reason: Reason = FetchFailure.LINK
        try:
            self._converse(self._connect())
        except _RefusedError as refused:
            reason = refused.reason
            logger.warning("engine at %s: its keys and values cannot be taken over: %s", self._name, refused)
        except ProtocolError as error:
            reason = FetchFailure.PROTOCOL
            logger.warning("engine at %s does not keep to the protocol of transfers: %s", self._name, error)
        except (LinkError, OSError) as error:
            # One that this end has ended is gone as it was meant to be.
            logger.log(
                logging.DEBUG if self._is_over else logging.WARNING,
                "engine at %s cannot be reached: %s",
                self._name,
                error,
            )
        finally:
            self.end(reason)
            if self._caches is not None:
                self._caches.close()
            if self._inbox is not None:
                self._inbox.close()
            for pushed in self._pushed:
                pushed.stop()

    @property
    def _name(self) -> str:
        return self.host if not self.port else f"{self.host}:{self.port}"

    def _connect(self) -> Link:
        timeout_s = min(self._patience.timeout_s, 10.0)
        link = Link(connect(self.host, self.port, timeout_s), self._secret, is_asking=True, timeout_s=timeout_s)
        try:
            link.send(self._greeting())
            source = link.receive(timeout_s)
            if source is None:
                raise LinkError("it does not say who it is")
            if isinstance(source, Bye):
                raise LinkError(f"it says: {source.reason[:80]}")
            if not isinstance(source, Hello):
                raise ProtocolError(f"it begins with {type(source).__name__}")
            for mine, its, reason in (
                (self._hello.protocol, source.protocol, FetchFailure.PROTOCOL),
                (self._hello.model, source.model, FetchFailure.OTHER_MODEL),
                (self._hello.layout, source.layout, FetchFailure.OTHER_LAYOUT),
            ):
                if mine != its:
                    raise _RefusedError(reason, f"{reason}: this engine has {mine!r:.80}, and that one {its!r:.80}")
            if not set(source.backends) & set(self._hello.backends):
                raise _RefusedError(
                    FetchFailure.BACKEND,
                    f"it moves bytes by {source.backends}, and this engine by {self._hello.backends}",
                )
            if not self._is_pushed_to:
                self._caches = self._reached(lambda: self._movers.attach(source))
        except BaseException:
            link.close()
            raise
        with self._lock:
            if self._is_over:
                link.close()
                raise LinkError("it is not wanted any more")
            self._source, self._outbox = source, Outbox(link)
            for fetch in list(self._fetches.values()):
                self._open(fetch)
            if self._waiting:
                self._outbox.post(Renew(tuple(self._waiting)))
            for lease in self._left:
                self._outbox.post(Drop(lease))
        return link

    def _greeting(self) -> Hello:
        """What the source is told first."""
        if self._receive is None:
            return self._hello
        self._inbox = self._reached(self._receive)
        return replace(self._hello, ranks=self._inbox.ranks)

    def _reached(self, reach: Callable[[], R]) -> R:
        try:
            return reach()
        except TransferError as error:
            raise _RefusedError(FetchFailure.BACKEND, str(error)) from error

    def _converse(self, link: Link) -> None:
        while True:
            with self._lock:
                brief = not self._is_pushed_to and any(
                    fetch.total is not None and not fetch.is_confirming for fetch in self._under_way()
                )
            message = link.receive(_BRIEF_LOOK_S if brief else _LOOK_S)
            with self._lock:
                if self._is_over:
                    return
                if message is not None and not self._hear(message):
                    return
                for fetch in self._under_way():
                    self._look_at(fetch)
                self._look_at_the_clock()
                if self._is_over:
                    return

    def _end(self, reason: Reason) -> None:
        self._is_over = True
        for fetch in self._fetches.values():
            fetch.end(reason)
        self._fetches.clear()
        if self._outbox is not None:
            self._outbox.post(Bye("done"))
            self._outbox.close()
        self._gone(self)

    def _under_way(self) -> list[RemoteFetch]:
        return [fetch for fetch in self._fetches.values() if fetch.is_under_way]

    def _open(self, fetch: RemoteFetch) -> None:
        assert self._source is not None
        assert self._outbox is not None
        if fetch.reference.engine != self._source.engine:
            del self._fetches[fetch.reference.lease]
            fetch.end(FetchFailure.STALE)
            return
        if self._is_pushed_to:
            self._pushed = [other for other in self._pushed if not other.done()]
            self._pushed.append(pushed := Pushed())
            fetch.moves = pushed
        else:
            assert self._caches is not None
            fetch.moves = self._caches.begin()
        into = fetch.blocks if self._is_pushed_to else ()
        self._outbox.post(Open(fetch.reference.lease, fetch.first, into))

    def _drop(self, fetch: RemoteFetch) -> None:
        assert self._outbox is not None
        fetch.dropped_at = self._clock()
        self._outbox.post(Drop(fetch.reference.lease))

    def _forget(self, fetch: RemoteFetch) -> None:
        """The source speaks of it no more, and copies nothing for it."""
        del self._fetches[fetch.reference.lease]
        if isinstance(fetch.moves, Pushed):
            fetch.moves.stop()

    def _hear(self, message: Message) -> bool:
        """Take a message of the source. False if it ends the link."""
        match message:
            case Bye():
                known = message.reason in LossReason.__members__.values()
                self._end(LossReason(message.reason) if known else FetchFailure.LINK)
                return False
            case Lost():
                return self._lose(message)
            case Dropped() if message.lease in self._left:
                self._left.remove(message.lease)
            case Filled() | Complete() | Arrived() | Confirmed() | Dropped():
                fetch = self._fetches.get(message.lease)
                if fetch is None:
                    raise ProtocolError(f"{type(message).__name__} of a lease that was not opened")
                is_dropped = fetch.dropped_at is not None
                if isinstance(message, Dropped) != is_dropped:
                    if not is_dropped:
                        raise ProtocolError("Dropped of a lease that was not dropped")
                    return True  # it was on its way
                match message:
                    case Filled():
                        self._fill(fetch, message)
                    case Complete():
                        self._complete(fetch, message)
                    case Arrived():
                        self._arrive(fetch, message)
                    case Confirmed():
                        if not fetch.is_confirming:
                            raise ProtocolError("Confirmed before it was asked for")
                        self._forget(fetch)
                        fetch.end(None)
                    case Dropped():
                        self._forget(fetch)
            case _:
                raise ProtocolError(f"a source sent what it may not: {type(message).__name__}")
        return True

    def _lose(self, message: Lost) -> bool:
        try:
            reason = LossReason(message.reason)
        except ValueError as error:
            raise ProtocolError("a lease was lost for no known reason") from error
        fetch = self._fetches.get(message.lease)
        if fetch is not None and fetch.dropped_at is None:  # else it was on its way
            fetch.end(reason)
            if self._is_pushed_to:
                self._drop(fetch)  # to hear when nothing is copied any more
            else:
                self._forget(fetch)
        return True

    def _fill(self, fetch: RemoteFetch, message: Filled) -> None:
        index = message.start - fetch.first
        if fetch.total is not None or index < fetch.num_told or not message.blocks:
            raise ProtocolError("Filled does not go on where it stopped")
        if index > fetch.num_told:
            self.give_up(fetch, FetchFailure.OTHER_BLOCKS)  # the first ones that are wanted are not to be had
            return
        fetch.num_told += len(message.blocks)
        fetch.progress_at = self._clock()
        count = min(fetch.num_told, len(fetch.blocks)) - index
        if count <= 0:
            return
        assert fetch.moves is not None
        source = message.blocks[:count]
        if any(key != fetch.keys[index + k].hex() for k, key in enumerate(message.keys[:count])):
            self.give_up(fetch, FetchFailure.OTHER_BLOCKS)
        elif self._caches is not None and any(not 0 < block < self._caches.num_blocks for block in source):
            self.give_up(fetch, FetchFailure.OUT_OF_RANGE)
        else:
            fetch.moves.submit(Move(source, fetch.blocks[index : index + count], message.step))

    def _complete(self, fetch: RemoteFetch, message: Complete) -> None:
        if fetch.total is not None or max(0, message.num_blocks - fetch.first) != fetch.num_told:
            raise ProtocolError(f"Complete with {message.num_blocks} blocks, after {fetch.num_told}")
        fetch.total = min(fetch.num_told, len(fetch.blocks))
        fetch.progress_at = self._clock()

    def _arrive(self, fetch: RemoteFetch, message: Arrived) -> None:
        num_moved = message.num_blocks - fetch.first
        if not isinstance(fetch.moves, Pushed) or not fetch.moves.num_moved < num_moved <= fetch.num_told:
            raise ProtocolError(f"Arrived with {message.num_blocks} blocks")
        fetch.moves.num_moved = num_moved

    def _look_at(self, fetch: RemoteFetch) -> None:
        """See how far a fetch under way has come."""
        if fetch.moves is None or self._outbox is None:
            return
        if fetch.moves.error is not None:
            self.give_up(fetch, FetchFailure.BACKEND)
            return
        num_moved, now = fetch.moves.num_moved, self._clock()
        if num_moved != fetch.num_moved:
            fetch.num_moved, fetch.progress_at = num_moved, now
        if fetch.total is not None and num_moved == fetch.total and not fetch.is_confirming:
            fetch.is_confirming = True
            self._outbox.post(Confirm(fetch.reference.lease, fetch.first + fetch.total if fetch.total else 0))
        patience = self._patience
        limit_s = patience.timeout_s if fetch.total is not None else max(patience.wait_s, patience.timeout_s)
        if now - fetch.progress_at > limit_s:
            self.give_up(fetch, FetchFailure.TIMEOUT)

    def _look_at_the_clock(self) -> None:
        now = self._clock()
        assert self._outbox is not None
        if any(
            fetch.dropped_at is not None and now - fetch.dropped_at > self._patience.timeout_s
            for fetch in self._fetches.values()
        ):
            raise ProtocolError("no answer to Drop")
        if self._fetches:
            self._used_at = now
        elif now - self._used_at > _IDLE_S:
            self._end(FetchFailure.LINK)  # of nothing
            return
        if now - self._renewed_at > self._patience.lease_s / 3:
            self._renewed_at = now
            if leases := tuple(fetch.reference.lease for fetch in self._under_way()):
                self._outbox.post(Renew(leases))


class _RefusedError(Exception):
    """A source is not one to fetch from."""

    def __init__(self, reason: FetchFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason
