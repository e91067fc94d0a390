"""What goes wrong between two engines: links that lose, change and cut messages, copies that stop, and engines that are killed.

None of it is in the product: a `Tap` is a port of its own, which sinks are sent to instead of the source's.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import Message, ProtocolError

Change = Callable[[Message], Iterable[Message | bytes]]
"""What becomes of a message: those that go on instead of it, in order. Bytes go as they are, and end the link. It may wait, and
all that comes after waits with it."""


def unchanged(message: Message) -> Iterable[Message | bytes]:
    """A link that works."""
    return (message,)


def without(kind: type[Message]) -> Change:
    """A link that loses messages of a kind."""
    return lambda message: () if isinstance(message, kind) else (message,)


class Tap:
    """Stands between sinks and a source.

    Args:
        host: where it listens, an abstract socket as `Reference.host` has them.
        source: where the source does, likewise.
        secret: that all of them know.
        to_sink, to_source: what becomes of messages on their way there.
    """

    def __init__(
        self, host: str, source: str, secret: bytes, *, to_sink: Change = unchanged, to_source: Change = unchanged
    ) -> None:
        self.host = host
        self._source, self._secret = _address(source), secret
        self._changes = to_sink, to_source
        self._links: list[Link] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_address(host))
        self._listener.listen()
        self._run(self._accept)

    def cut(self) -> None:
        """End all links at once, as if their ends were killed."""
        for link in self._links:
            link.close()

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _run(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            try:
                sink = Link(stream, self._secret, is_asking=False)
                onward = socket.socket(socket.AF_UNIX)
                onward.connect(self._source)
                source = Link(onward, self._secret, is_asking=True)
            except (OSError, LinkError):
                stream.close()
                continue
            self._links += [sink, source]
            self._run(self._pass, source, sink, self._changes[0])
            self._run(self._pass, sink, source, self._changes[1])

    def _pass(self, origin: Link, target: Link, change: Change) -> None:
        try:
            while True:
                message = origin.receive(1.0)
                for one in () if message is None else change(message):
                    if isinstance(one, bytes):
                        target.send_bytes(one)
                        # Closed with something unread, the socket would take back what was sent, too.
                        target._stream.shutdown(socket.SHUT_WR)
                        return
                    target.send(one)
        except (LinkError, ProtocolError, OSError):
            origin.close()
            target.close()


def _address(host: str) -> str:
    """Of a socket, as the system has it."""
    assert host[0] == "@", host
    return "\0" + host[1:]
