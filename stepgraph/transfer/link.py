"""Link: an authenticated connection between two engines that carries messages.

Both ends prove that they know a secret, by a keyed hash over numbers that both have chosen, before either reads anything else:
first the one that asks, so that nobody else gets a hash to try secrets on.
What follows is neither encrypted nor signed: between machines it belongs on a network of their own.

A frame is four bytes, its length, and so many bytes of content.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from contextlib import suppress

from stepgraph.errors import StepgraphError
from stepgraph.transfer.messages import MAX_MESSAGE_BYTES, Message, ProtocolError, decode, encode

_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("iII")
_NONCE_BYTES = 32
_POLL_S = 1e-3
"""What `poll` waits at least, whatever less it is asked for: it counts in whole milliseconds, rounded up."""
_ASKED, _ASKING = b"stepgraph kv 1 asked", b"stepgraph kv 1 asking"


class LinkError(StepgraphError):
    """The other end is gone, does not answer, or does not know the secret."""


class Link:
    """One end. One thread receives, and any may send.

    Args:
        stream: a connected stream socket, which is the link's from now on.
        secret: that both ends know.
        is_asking: whether this end has connected to the other.
        timeout_s: for the proof, and for each frame once it has begun.

    Raises:
        LinkError: the other end does not know the secret, is of another user of this machine, or does not answer in time.
    """

    def __init__(self, stream: socket.socket, secret: bytes, *, is_asking: bool, timeout_s: float = 10.0) -> None:
        self._stream, self._timeout_s = stream, timeout_s
        self._poll, self._room, self._sending = select.poll(), select.poll(), threading.Lock()
        self._poll.register(stream, select.POLLIN)
        self._room.register(stream, select.POLLOUT)
        stream.settimeout(timeout_s)
        self._received = bytearray()
        try:
            _check_user(stream)
            self._prove(secret, is_asking, time.monotonic() + timeout_s)
        except BaseException:
            stream.close()
            raise

    def send(self, message: Message) -> None:
        """Send a message whole. LinkError if the other end takes nothing for `timeout_s`, or is gone."""
        self.send_bytes(frame_of(message))

    def send_bytes(self, content: bytes) -> None:
        """Send what `frame_of` returned, or what `offer` has left of it; as `send`."""
        try:
            with self._sending:
                self._stream.sendall(content)
        except OSError as error:
            raise LinkError(f"the other end of a transfer link is gone ({error})") from error

    def offer(self, content: bytes) -> int:
        """Send as much of this as is taken without waiting; returns how many bytes. LinkError if the other end is gone."""
        try:
            with self._sending:
                if self._stream.fileno() < 0 or not self._room.poll(0):
                    return 0
                return self._stream.send(content)
        except OSError as error:
            raise LinkError(f"the other end of a transfer link is gone ({error})") from error

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None if none begins within `timeout_s`.

        Raises:
            LinkError: the other end is gone, or stops within a message.
            ProtocolError: what came is no message; nothing that follows can be trusted.
        """
        try:
            length = _LENGTH.unpack(self._take(_LENGTH.size, time.monotonic() + timeout_s))[0]
        except _NothingYetError:
            return None
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are taken")
        try:
            return decode(self._take(length, time.monotonic() + self._timeout_s))
        except _NothingYetError as error:
            raise LinkError("the other end stopped within a message") from error

    def close(self) -> None:
        """End the link; whoever receives at either end is told."""
        with suppress(OSError):  # it has ended
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def _prove(self, secret: bytes, is_asking: bool, deadline: float) -> None:
        own = secrets.token_bytes(_NONCE_BYTES)
        mine, others = (_ASKING, _ASKED) if is_asking else (_ASKED, _ASKING)
        try:
            self.send_bytes(own)
            other = self._take(_NONCE_BYTES, deadline)
            nonces = own + other if is_asking else other + own
            proof = hmac.digest(secret, mine + nonces, hashlib.sha256)
            if is_asking:
                self.send_bytes(proof)
            theirs = self._take(len(proof), deadline)
        except _NothingYetError as error:
            raise LinkError("the other end of a transfer link does not answer") from error
        if not hmac.compare_digest(theirs, hmac.digest(secret, others + nonces, hashlib.sha256)):
            raise LinkError("the other end of a transfer link does not know the secret of this one")
        if not is_asking:
            self.send_bytes(proof)

    def _take(self, count: int, deadline: float) -> bytes:
        """The next `count` bytes; what has come of them by the deadline is kept for later."""
        while len(self._received) < count:
            if (
                self._stream.fileno() < 0
            ):  # closed by this end; the number that is polled may be another stream's by now
                raise LinkError("this end has closed a transfer link")
            if not self._has_come(deadline - time.monotonic()):
                raise _NothingYetError
            try:
                received = self._stream.recv(1 << 16)
            except (OSError, ValueError) as error:
                raise LinkError(f"the other end of a transfer link is gone ({error})") from error
            if not received:
                raise LinkError("the other end of a transfer link is gone")
            self._received += received
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken

    def _has_come(self, within_s: float) -> bool:
        """Whether there is something to receive by then."""
        if within_s >= _POLL_S:
            return bool(self._poll.poll(within_s * 1e3))
        if self._poll.poll(0):
            return True
        time.sleep(max(0.0, within_s))
        return bool(self._poll.poll(0))


def frame_of(message: Message) -> bytes:
    """A message as it is sent."""
    content = encode(message)
    assert len(content) <= MAX_MESSAGE_BYTES, len(content)
    return _LENGTH.pack(len(content)) + content


def _check_user(stream: socket.socket) -> None:
    """LinkError if the other end is on this machine, as can be told, and another user's."""
    if stream.family == socket.AF_UNIX and hasattr(socket, "SO_PEERCRED"):
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(credentials)
        if user != os.getuid():
            raise LinkError(f"the other end of a transfer link is of user {user}, and this one of {os.getuid()}")


class _NothingYetError(Exception):
    """It has not come by the deadline."""
