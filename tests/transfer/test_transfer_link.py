"""A link carries messages between those who know its secret, and nothing to others."""

import hashlib
import hmac
import os
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import MAX_MESSAGE_BYTES, Bye, Confirmed, Filled, ProtocolError

SECRET = b"secret"


def linked(asking: bytes = SECRET, asked: bytes = SECRET) -> tuple[Link, Link]:
    one, other = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(Link, one, asking, is_asking=True, timeout_s=5)
        try:
            answering = Link(other, asked, is_asking=False, timeout_s=5)
        finally:
            error = future.exception()
    assert error is None, error
    return future.result(), answering


def test_messages_pass_both_ways_in_their_order() -> None:
    one, other = linked()
    long = Filled("a", 0, tuple(range(20_000)), ("00" * 32,) * 20_000, -1)
    sent = [Confirmed("a"), long, Bye("end")]
    sending = threading.Thread(target=lambda: [one.send(message) for message in sent])
    sending.start()
    other.send(Confirmed("b"))
    assert [other.receive(5) for _ in sent] == sent
    assert one.receive(5) == Confirmed("b")
    assert one.receive(0.0) is None
    sending.join()
    one.close()
    with pytest.raises(LinkError):
        other.receive(5)


def test_a_short_look_is_not_made_a_millisecond_long(monkeypatch) -> None:
    one, other = linked()
    waits: list[float] = []
    polled = one._poll.poll

    class Poll:
        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            waits.append(milliseconds)
            return polled(milliseconds)

    monkeypatch.setattr(one, "_poll", Poll())
    assert one.receive(2e-4) is None
    assert waits == [0, 0]  # `poll` would round up
    other.send(Confirmed("a"))
    while (message := one.receive(2e-4)) is None:
        pass
    assert message == Confirmed("a")
    assert not any(waits)


def test_many_may_send_at_once() -> None:
    one, other = linked()
    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            pool.submit(lambda name: [one.send(Confirmed(name * 50)) for _ in range(50)], str(number))
        received = [other.receive(5) for _ in range(200)]
    assert sorted(message.lease for message in received) == sorted(str(n) * 50 for n in range(4) for _ in range(50))


def test_who_does_not_know_the_secret_is_told_nothing() -> None:
    for secrets in ((b"other", SECRET), (SECRET, b"other")):
        with pytest.raises(LinkError):
            linked(*secrets)


def test_another_user_of_the_machine_is_told_nothing(monkeypatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12_345_678)
    with pytest.raises(LinkError, match="and this one of 12345678"):
        linked()


def test_a_link_that_this_end_has_closed_is_not_waited_for() -> None:
    one, _ = linked()
    one.close()
    with pytest.raises(LinkError, match="this end has closed"):
        one.receive(30)


def raw(answer: Callable[[socket.socket], None], *, is_asking: bool = False) -> None:
    """Make a link with another end that does as `answer` says."""
    one, other = socket.socketpair()
    thread = threading.Thread(target=answer, args=(other,))
    thread.start()
    try:
        Link(one, SECRET, is_asking=is_asking, timeout_s=0.3)
    finally:
        thread.join()
        other.close()


def test_a_proof_sent_back_to_its_maker_proves_nothing() -> None:
    def mirror(stream: socket.socket) -> None:
        for count in (32, 32):
            stream.sendall(stream.recv(count))

    with pytest.raises(LinkError, match="does not know the secret"):
        raw(mirror, is_asking=True)


def test_who_asks_gets_no_proof_before_giving_one() -> None:
    got = []

    def guess(stream: socket.socket) -> None:
        stream.sendall(os.urandom(64))
        while received := stream.recv(1024):
            got.append(received)

    with pytest.raises(LinkError, match="does not know the secret"):
        raw(guess)
    assert len(b"".join(got)) == 32  # the number


def test_an_end_that_says_nothing_is_given_up() -> None:
    with pytest.raises(LinkError, match="does not answer"):
        raw(lambda stream: None)


def test_a_proof_of_the_secret_by_other_means_is_one() -> None:
    """As documented, so that another implementation could talk to this one."""

    def answer(stream: socket.socket) -> None:
        own = os.urandom(32)
        stream.sendall(own)
        nonces = own + stream.recv(32)
        stream.sendall(hmac.digest(SECRET, b"stepgraph kv 1 asking" + nonces, hashlib.sha256))

    raw(answer)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (struct.pack("!I", MAX_MESSAGE_BYTES + 1), ProtocolError),
        (struct.pack("!I", 4) + b"none", ProtocolError),
        (struct.pack("!I", 9) + b"{}", LinkError),
    ],
)
def test_what_is_no_message_ends_the_link(frame, error) -> None:
    one, other = linked()
    one._stream.sendall(frame)
    one.close()
    with pytest.raises(error):
        other.receive(5)
