"""What the engine and the processes that follow grammars tell each other, through sockets.

A frame is a kind, a number and a payload.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

_HEADER = struct.Struct("<BII")
_READ_BYTES = 1 << 18


class Kind(IntEnum):
    """What a frame says. Its number is the guide's, unless said otherwise."""

    # From the engine to a grammar's process.
    COMPILE = 1
    """The first: what to compile, as JSON."""
    FOLLOW = 2
    """Take in tokens, and say what may come next: int32, how many tokens, these, and proposals that follow them."""
    DROP = 3
    """A guide is not needed any more."""
    # From a grammar's process.
    COMPILED = 4
    """The number is the bytes that the grammar takes."""
    REFUSED = 5
    """It cannot be compiled; the payload is a `Fault` as JSON."""
    MASKS = 6
    """What may come next, and after each proposal that may stand: int32 [n, W]."""
    LEFT = 7
    """The tokens leave the grammar; the payload says where."""
    NOT_STARTED = 16
    """From the fork server in the process's stead: the system lets no more processes be. The payload says why."""
    # From the engine to the fork server. The number is the process's, as the engine counts them.
    VOCABULARY = 8
    """The first: a pickled `Vocabulary`."""
    FORK = 9
    """Start a process; a socket comes with it."""
    END = 10
    YIELD = 11
    """Let it give way to other processes for good."""
    PAUSE = 12
    RESUME = 13
    # From the fork server.
    READY = 14
    ENDED = 15
    """A process is gone; the payload is one int32, its exit status, negative for a signal."""


class Frame(NamedTuple):
    """One message."""

    kind: int
    number: int
    payload: bytes


class Channel:
    """A socket's frames. Sending never waits if the socket does not block: what finds no room goes with a later `flush`."""

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self.closed = False
        """The other side is gone; what it had sent has been read."""
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def _read(self, size: int) -> bytes:
        return self.socket.recv(size)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, kind: Kind, number: int = 0, payload: bytes = b"") -> None:
        """Queue a frame, and send what there is room for."""
        self._outgoing += _HEADER.pack(kind, number, len(payload))
        self._outgoing += payload
        self.flush()

    def send_with(self, descriptor: socket.socket, kind: Kind, number: int) -> bool:
        """Send a frame without payload, and a socket's other end with it; False, and nothing is sent, if there is no room now."""
        if self._outgoing:
            return False
        try:
            sent = socket.send_fds(self.socket, [_HEADER.pack(kind, number, 0)], [descriptor.fileno()])
        except OSError:
            return False
        assert sent == _HEADER.size, sent
        return True

    def flush(self) -> None:
        """Send what is queued, as far as there is room."""
        while self._outgoing:
            try:
                del self._outgoing[: self.socket.send(self._outgoing)]
            except BlockingIOError:
                return
            except OSError:  # the other side is gone, as reading will show
                self._outgoing.clear()

    def receive(self) -> Iterator[Frame]:
        """The frames that have arrived. Waits for some if the socket blocks; ends without one when the other side is gone."""
        try:
            data = self._read(_READ_BYTES)
            self.closed = not data
        except BlockingIOError:
            return
        except OSError:
            self.closed, data = True, b""
        self._incoming += data
        while len(self._incoming) >= _HEADER.size:
            kind, number, size = _HEADER.unpack_from(self._incoming)
            if len(self._incoming) < _HEADER.size + size:
                return
            payload = bytes(self._incoming[_HEADER.size : _HEADER.size + size])
            del self._incoming[: _HEADER.size + size]
            yield Frame(kind, number, payload)
