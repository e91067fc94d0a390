"""Port: the door of a source. Those who know its secret take leases over."""

from __future__ import annotations

import logging
import socket
import threading
import time
from dataclasses import replace

from stepgraph.transfer.base import Move, Movers, Moves, SourceCaches, TransferError
from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import (
    Arrived,
    Bye,
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
from stepgraph.transfer.sockets import set_options

logger = logging.getLogger(__name__)

_MAX_LINKS = 256
"""At a time, those that have proved nothing yet included."""
_LOOK_S = 1.0
"""Between two looks at whether a link that nothing comes from is still wanted."""
_BRIEF_LOOK_S = 5e-4
"""Between two looks at how far moves have come."""


class Port:
    """Serves leases, each link in a thread of its own.

    Args:
        listener: listens; it is the port's from now on.
        secret: that sinks know.
        leases: that they ask for.
        movers: that write into sinks' caches; None: sinks read from here.
        timeout_s: of an answer.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: bytes,
        leases: Leases,
        movers: Movers | None = None,
        *,
        timeout_s: float = 10.0,
    ) -> None:
        self.leases, self.movers = leases, movers
        self.num_sent = 0
        """Blocks that sinks have confirmed."""
        self.timeout_s = timeout_s
        self._listener, self._secret = listener, secret
        self._lock = threading.Lock()
        self._hello: Hello | None = None
        self._served: set[_Served] = set()
        self._places = threading.Semaphore(_MAX_LINKS)
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, name="stepgraph-port", daemon=True)
        self._thread.start()

    def serve(self, hello: Hello) -> None:
        """Let sinks in from now on, telling them this."""
        with self._lock:
            self._hello = hello

    def suspend(self, reason: str) -> None:
        """End all links, and let nobody in until `serve`. What links had opened is dropped. Does not wait."""
        with self._lock:
            self._hello = None
            served = list(self._served)
        for one in served:
            one.end(reason)

    def close(self) -> None:
        """Let nobody in any more."""
        self._is_closed = True
        self.suspend("closed")
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in `accept`
        except OSError:  # not everywhere
            logger.debug("a listening socket was not shut down")
        self._listener.close()
        self._thread.join(self.timeout_s)

    def count_sent(self, num_blocks: int) -> None:
        """So many more have been confirmed."""
        with self._lock:
            self.num_sent += num_blocks

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                stream, _ = self._listener.accept()
            except OSError as error:
                if not self._is_closed:
                    logger.warning("the transfer port cannot take a link (%s)", error)
                    time.sleep(0.1)  # until there are descriptors again
                continue
            if not self._places.acquire(blocking=False):
                logger.warning("the transfer port has %d links, and takes no more", _MAX_LINKS)
                stream.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(stream,), name="stepgraph-port-link", daemon=True).start()
            except RuntimeError as error:  # there are too many
                logger.warning("the transfer port cannot serve a link (%s)", error)
                stream.close()
                self._places.release()

    def _serve(self, stream: socket.socket) -> None:
        try:
            set_options(stream)
            link = Link(stream, self._secret, is_asking=False, timeout_s=self.timeout_s)
            with self._lock:
                hello = self._hello
                if hello is None:
                    link.close()
                    return
                served = _Served(self, link, hello)
                self._served.add(served)
            try:
                served.run()
            finally:
                with self._lock:
                    self._served.remove(served)
        except (LinkError, ProtocolError, OSError) as error:
            logger.info("a link of the transfer port has ended: %s", error)
        finally:
            self._places.release()


class _Reader:
    """Tells a sink of one lease, and has its blocks moved if that is done here.

    Args:
        outbox: of the sink's link.
        opened: what the sink wants.
        moves: into its caches; None: it moves them itself.
    """

    def __init__(self, outbox: Outbox, opened: Open, moves: Moves | None) -> None:
        self.opened, self.moves = opened, moves
        self.is_lost = False
        self.num_arrived = 0
        """Blocks of which the sink was told that they are there."""
        self._outbox = outbox

    def tell(self, message: Message) -> None:
        """See `Leases.read`."""
        first = self.opened.first
        if isinstance(message, Filled) and (unwanted := max(0, first - message.start)):
            if unwanted >= len(message.blocks):
                return
            message = replace(message, start=first, blocks=message.blocks[unwanted:], keys=message.keys[unwanted:])
        if self.moves is not None and isinstance(message, Filled):
            into = self.opened.into[message.start - first :][: len(message.blocks)]
            if into:
                self.moves.submit(Move(message.blocks[: len(into)], into, message.step))
        if isinstance(message, Lost):
            self.lose()
        self._outbox.post(message)

    def lose(self) -> None:
        """There is nothing to be had of the lease any more."""
        self.is_lost = True
        if self.moves is not None:
            self.moves.cancel()


class _Served:
    """A link, as the source sees it."""

    def __init__(self, port: Port, link: Link, hello: Hello) -> None:
        self._port, self._link, self._leases, self._hello = port, link, port.leases, hello
        self._outbox = Outbox(link)
        self._outbox.post(hello)
        self._lock = threading.Lock()
        self._caches: SourceCaches | None = None
        self._readers: dict[str, _Reader] = {}
        self._stopping: list[_Reader] = []  # dropped, and maybe still moved
        self._is_over = False

    def run(self) -> None:
        """Answer until the link ends.

        Raises:
            LinkError, ProtocolError: that was not asked for.
        """
        try:
            self._attach(self._link.receive(self._port.timeout_s))
            while True:
                is_moving = self._caches is not None and (self._readers or self._stopping)
                message = self._link.receive(_BRIEF_LOOK_S if is_moving else _LOOK_S)
                with self._lock:
                    if self._is_over or isinstance(message, Bye):
                        return
                    if message is not None:
                        self._answer(message)
                    self._look_at_moves()
        finally:
            self.end(None)
            if self._caches is not None:
                self._caches.close()

    def end(self, reason: str | None) -> None:
        """End the link, if it has not ended, and say why; None: who is there knows, or cannot hear it. Any thread may call it."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            for name, reader in self._readers.items():
                if not reader.is_lost:
                    reader.lose()
                    self._leases.drop(name)
        if reason is not None:
            self._outbox.post(Bye(reason))
        self._outbox.close()

    def _attach(self, sink: Message | None) -> None:
        """Reach the sink's caches, if this end moves."""
        if not isinstance(sink, Hello):
            raise ProtocolError("a sink does not begin with Hello")
        if self._port.movers is not None:
            mine = self._hello
            if (sink.protocol, sink.model, sink.layout) != (mine.protocol, mine.model, mine.layout):
                raise LinkError(f"engine {sink.engine} has another model or layout")
            try:
                self._caches = self._port.movers.attach(sink)
            except TransferError as error:
                raise LinkError(f"engine {sink.engine} cannot be reached: {error}") from error

    def _answer(self, message: Message) -> None:
        match message:
            case Open():
                self._open(message)
            case Renew():
                for name in message.leases:
                    self._leases.renew(name)
            case Confirm():
                self._confirm(message)
            case Drop():
                self._drop(message.lease)
            case _:
                raise ProtocolError(f"a sink sent what it may not: {type(message).__name__}")

    def _open(self, message: Open) -> None:
        # Those that are lost and moved are dropped by the sink, for it must hear when nothing is written any more.
        readers = self._readers.items()
        self._readers = {name: reader for name, reader in readers if not reader.is_lost or reader.moves is not None}
        if message.lease in self._readers:
            raise ProtocolError("a sink opened a lease twice")
        if bool(message.into) != (self._caches is not None):
            raise ProtocolError("this end and a sink do not agree on who moves bytes")
        moves = None
        if self._caches is not None:
            if any(not 0 < block < self._caches.num_blocks for block in message.into):
                raise ProtocolError("a sink has not the blocks that it wants to have filled")
            moves = self._caches.begin()
        reader = _Reader(self._outbox, message, moves)
        self._leases.read(message.lease, reader.tell)
        if not reader.is_lost or moves is not None:
            self._readers[message.lease] = reader

    def _confirm(self, message: Confirm) -> None:
        reader = self._readers.get(message.lease)
        if reader is None or reader.is_lost:
            # It never was; or it was lost meanwhile, as the sink is about to hear.
            if reader is None:
                self._outbox.post(Lost(message.lease, LossReason.UNKNOWN))
            return
        if reader.moves is not None and message.num_blocks > reader.opened.first + reader.num_arrived:
            raise ProtocolError("a sink confirms blocks that have not arrived")
        reason = self._leases.confirm(message.lease, message.num_blocks)
        reader.lose()
        if reason is not None:
            self._outbox.post(Lost(message.lease, reason))
            return
        del self._readers[message.lease]
        self._outbox.post(Confirmed(message.lease))
        self._port.count_sent(max(0, message.num_blocks - reader.opened.first))

    def _drop(self, name: str) -> None:
        reader = self._readers.pop(name, None)
        if reader is None:
            self._leases.leave(name)
        elif not reader.is_lost:
            reader.lose()
            self._leases.drop(name)
        if reader is None or reader.moves is None:
            self._outbox.post(Dropped(name))
        else:
            self._stopping.append(reader)

    def _look_at_moves(self) -> None:
        """Tell the sink what has arrived, and what nobody writes into any more."""
        for name, reader in self._readers.items():
            if reader.moves is None or reader.is_lost:
                continue
            if reader.moves.error is not None:
                self._leases.cancel(name, LossReason.NOT_MOVED)
            elif reader.moves.num_moved > reader.num_arrived:
                reader.num_arrived = reader.moves.num_moved
                self._outbox.post(Arrived(name, reader.opened.first + reader.num_arrived))
        for reader in [reader for reader in self._stopping if reader.moves is None or reader.moves.done()]:
            self._stopping.remove(reader)
            self._outbox.post(Dropped(reader.opened.lease))
