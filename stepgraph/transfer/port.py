"""Port: the door of a source. Those who know its secret take leases over."""

from __future__ import annotations

import logging
import socket
import threading
import time
from dataclasses import replace

from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import (
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


class Port:
    """Serves leases, each link in a thread of its own.

    Args:
        listener: listens; it is the port's from now on.
        secret: that sinks know.
        leases: that they ask for.
        timeout_s: of an answer.
    """

    def __init__(self, listener: socket.socket, secret: bytes, leases: Leases, *, timeout_s: float = 10.0) -> None:
        self.leases = leases
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
            threading.Thread(target=self._serve, args=(stream,), name="stepgraph-port-link", daemon=True).start()

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
                served.end(None)
                with self._lock:
                    self._served.remove(served)
        except (LinkError, ProtocolError, OSError) as error:
            logger.info("a link of the transfer port has ended: %s", error)
        finally:
            self._places.release()


class _Reader:
    """Tells a sink of one lease.

    Args:
        outbox: of the sink's link.
        first: index of the first block that it wants.
    """

    def __init__(self, outbox: Outbox, first: int) -> None:
        self.first = first
        self.is_lost = False
        self._outbox = outbox

    def tell(self, message: Message) -> None:
        if isinstance(message, Filled) and (unwanted := max(0, self.first - message.start)):
            if unwanted >= len(message.blocks):
                return
            message = replace(message, start=self.first, blocks=message.blocks[unwanted:], keys=message.keys[unwanted:])
        if isinstance(message, Lost):
            self.is_lost = True
        self._outbox.post(message)


class _Served:
    """A link, as the source sees it."""

    def __init__(self, port: Port, link: Link, hello: Hello) -> None:
        self._port, self._link, self._leases = port, link, port.leases
        self._outbox = Outbox(link)
        self._outbox.post(hello)
        self._lock = threading.Lock()
        self._readers: dict[str, _Reader] = {}
        self._is_over = False

    def run(self) -> None:
        """Answer until the link ends.

        Raises:
            LinkError, ProtocolError: that was not asked for.
        """
        if not isinstance(self._link.receive(self._port.timeout_s), Hello):
            raise ProtocolError("a sink does not begin with Hello")
        while True:
            message = self._link.receive(_LOOK_S)
            with self._lock:
                if self._is_over or isinstance(message, Bye):
                    return
                if message is not None:
                    self._answer(message)

    def end(self, reason: str | None) -> None:
        """End the link, if it has not ended, and say why; None: who is there knows, or cannot hear it. Any thread may call it."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            for name, reader in self._readers.items():
                if not reader.is_lost:
                    self._leases.drop(name)
        if reason is not None:
            self._outbox.post(Bye(reason))
        self._outbox.close()

    def _answer(self, message: Message) -> None:
        match message:
            case Open(into=()):
                self._open(message)
            case Renew():
                for name in message.leases:
                    self._leases.renew(name)
            case Confirm():
                self._confirm(message)
            case Drop():
                reader = self._readers.pop(message.lease, None)
                if reader is not None and not reader.is_lost:
                    self._leases.drop(message.lease)
                self._outbox.post(Dropped(message.lease))
            case _:
                raise ProtocolError(f"a sink sent what it may not: {type(message).__name__}")

    def _open(self, message: Open) -> None:
        self._readers = {name: reader for name, reader in self._readers.items() if not reader.is_lost}
        if message.lease in self._readers:
            raise ProtocolError("a sink opened a lease twice")
        reader = _Reader(self._outbox, message.first)
        self._leases.read(message.lease, reader.tell)
        if not reader.is_lost:
            self._readers[message.lease] = reader

    def _confirm(self, message: Confirm) -> None:
        reader = self._readers.pop(message.lease, None)
        if reader is None:  # it never was, or it was lost meanwhile, as the sink is about to hear
            self._outbox.post(Lost(message.lease, LossReason.UNKNOWN))
        elif not reader.is_lost:
            reason = self._leases.confirm(message.lease, message.num_blocks)
            if reason is not None:
                self._outbox.post(Lost(message.lease, reason))
            else:
                self._outbox.post(Confirmed(message.lease))
                self._port.count_sent(max(0, message.num_blocks - reader.first))
