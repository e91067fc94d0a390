"""A port before sinks that do as a test says: each gets what it has opened, and harms nobody else."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fake_engines import KEYS, LAYOUT, SECRET, creating, wait

from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import (
    Bye,
    Complete,
    Confirm,
    Confirmed,
    Drop,
    Dropped,
    Filled,
    Hello,
    Lost,
    Open,
    Renew,
)
from stepgraph.transfer.transfers import EngineTransfers

KEY = (KEYS[0].hex(),)


def accepting() -> set[threading.Thread]:
    """Threads of ports, whoever's."""
    return {thread for thread in threading.enumerate() if thread.name == "stepgraph-port"}


@pytest.fixture
def others() -> set[threading.Thread]:
    """Those of before."""
    return accepting()


@pytest.fixture
def source() -> Iterator[EngineTransfers]:
    with creating() as create:
        yield create(address=("127.0.0.1", 0))


@pytest.fixture
def connect(source) -> Iterator[Callable[..., Link]]:
    stack = ExitStack()

    def connect(*, greets: bool = True, secret: bytes = SECRET) -> Link:
        link = Link(socket.create_connection((source.host, source.port)), secret, is_asking=True, timeout_s=10)
        stack.callback(link.close)
        if greets:
            link.send(Hello(1, "sink", "model", LAYOUT.digest, ("fake",), False, ("",)))
            assert isinstance(link.receive(10), Hello)
        return link

    with stack:
        yield connect


def test_who_does_not_know_the_secret_is_refused(connect) -> None:
    with pytest.raises(LinkError):
        connect(secret=b"")
    connect()


def test_nobody_touches_what_another_link_has_opened(source, connect) -> None:
    one, other = connect(), connect()
    source.leases.open("a")
    source.leases.fill("a", 0, [4], KEYS[:1], -1)
    source.leases.complete("a")
    one.send(Open("a", 0))
    assert one.receive(10) == Filled("a", 0, (4,), KEY, -1)
    for message, answer in (
        (Confirm("a", 1), Lost("a", "unknown")),
        (Drop("a"), Dropped("a")),
        (Open("a", 0), Lost("a", "confirmed")),
    ):
        other.send(message)
        assert other.receive(10) == answer
    other.close()
    assert one.receive(10) == Complete("a", 1)
    one.send(Confirm("a", 1))
    assert one.receive(10) == Confirmed("a")


@pytest.mark.parametrize(
    "message", [Confirmed("a"), Open("a", 0, (1,)), Open("a", 0), Hello(1, "", "", "", (), False, ())]
)
def test_a_sink_that_makes_no_sense_is_left_and_its_leases_end(source, connect, message) -> None:
    link = connect()
    source.leases.open("a")
    link.send(Open("a", 0))
    link.send(message)
    with pytest.raises(LinkError):
        link.receive(10)
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})


def test_a_link_begins_with_hello(source, connect) -> None:
    link = connect(greets=False)
    link.send(Renew(("a",)))
    assert isinstance(link.receive(10), Hello)
    with pytest.raises(LinkError):
        link.receive(10)


def test_leases_of_a_link_that_breaks_end(source, connect) -> None:
    link = connect()
    source.leases.open("a")
    source.leases.fill("a", 0, [4], KEYS[:1], -1)
    link.send(Open("a", 0))
    assert isinstance(link.receive(10), Filled)
    link._stream.sendall(b"\0\0\1")  # within a frame
    link.close()
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})
    assert source.leases.collect() == [4]


def test_a_sink_that_reads_nothing_holds_nobody_up(source, connect) -> None:
    link = connect()
    source.leases.open("a")
    link.send(Open("a", 0))
    source.leases.fill("a", 0, [4], KEYS[:1], -1)
    assert isinstance(link.receive(10), Filled)
    for number in range(8000):  # more than sockets and queues take
        if not source.leases.fill("a", 1 + 20 * number, [4] * 20, [KEYS[1]] * 20, -1):
            break
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})


def test_links_are_bounded(source, connect) -> None:
    source._port._places = threading.Semaphore(1)
    first = connect()
    with pytest.raises(LinkError):
        connect()
    first.close()
    wait(lambda: source._port._places._value == 1)
    connect()


def test_a_port_goes_on_behind_a_link_for_which_there_is_no_thread(source, connect, monkeypatch) -> None:
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == "stepgraph-port-link":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_others)
        with pytest.raises(LinkError):
            connect()
    connect()


def test_after_the_end_nobody_is_there(others, source, connect) -> None:
    assert accepting() - others
    link = connect()
    source.close()
    assert isinstance(link.receive(10), Bye)
    with pytest.raises(LinkError):
        link.receive(10)
    with pytest.raises((LinkError, OSError)):
        connect()
    wait(lambda: not accepting() - others)
