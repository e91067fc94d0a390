"""Fetches from a source over its port: what comes is what was asked for, and all else ends them with the reason."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from stepgraph.errors import RequestError
from stepgraph.transfer.base import FetchFailure, FetchState, TransferError
from stepgraph.transfer.layout import BlockLayout, TensorLayout
from stepgraph.transfer.leases import Leases, LossReason
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
    Message,
    Open,
    Renew,
)
from stepgraph.transfer.peer import Patience
from stepgraph.transfer.rank_cache import ExportedCache
from stepgraph.transfer.reference import Reference
from stepgraph.transfer.sockets import AllowedHosts, listen
from stepgraph.transfer.transfers import EngineTransfers

SECRET = b"secret"
KEYS = [bytes([number]) * 32 for number in range(9)]
LAYOUT = BlockLayout(2, 0, 1, ((TensorLayout((3,), "torch.float32", has_heads=False),),), (0,))
NUM_BLOCKS = 10


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


class FakeMoves:
    """Says what it was to copy, and is as far as a test says."""

    def __init__(self) -> None:
        self.num_moved, self.error = 0, None
        self.is_cancelled, self.is_busy = False, False
        self.moved: list = []

    def submit(self, move) -> None:
        assert len(move.source) == len(move.target)
        self.moved += zip(move.source, move.target, [move.step] * len(move.source), strict=True)

    def cancel(self) -> None:
        self.is_cancelled = True

    def done(self) -> bool:
        return self.is_cancelled and not self.is_busy


class FakeMovers:
    """Copies nothing. `attached` has what was begun of each source."""

    def __init__(self) -> None:
        self.attached: list[list[FakeMoves]] = []
        self.num_closed = 0
        self.moves_at_once = True
        self.error: Exception | None = None

    def attach(self, peer: Hello):
        if self.error is not None:
            raise self.error
        begun: list[FakeMoves] = []
        self.attached.append(begun)
        movers = self

        class Source:
            num_blocks = NUM_BLOCKS

            def begin(self) -> FakeMoves:
                begun.append(InstantMoves() if movers.moves_at_once else FakeMoves())
                return begun[-1]

            def close(self) -> None:
                movers.num_closed += 1
                assert all(moves.is_cancelled for moves in begun)

        return Source()

    def close(self) -> None: ...

    @property
    def last(self) -> FakeMoves:
        """What was begun last."""
        return self.attached[-1][-1] if self.attached and self.attached[-1] else FakeMoves()


class InstantMoves(FakeMoves):
    def submit(self, move) -> None:
        super().submit(move)
        self.num_moved = len(self.moved)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def create(stack) -> Callable[..., EngineTransfers]:
    def create(*, model="model", layout=LAYOUT, secret=SECRET, leases=None, **settings) -> EngineTransfers:
        movers = FakeMovers()
        cache = ExportedCache(layout, is_cut=False, ranks=("here",))
        settings = {"hosts": AllowedHosts(None), "address": ("127.0.0.1", None)} | settings
        made = EngineTransfers(
            cache, movers, model, "fake", Leases(30.0, 2.0) if leases is None else leases, secret, **settings
        )
        stack.callback(made.close)
        made.movers = movers
        return made

    return create


def reference_to(source: EngineTransfers, lease: str = "a") -> Reference:
    return Reference(source.engine_id, source.host, source.port, lease)


@pytest.mark.parametrize("port", [None, 0])
def test_blocks_of_a_lease_are_moved_where_they_belong_and_confirmed(create, port) -> None:
    source, sink = create(address=("127.0.0.1", port)), create()
    sink.check(reference_to(source))
    source.leases.open("a")
    source.leases.fill("a", 0, [7, 3, 5], KEYS[:3], 4)
    fetch = sink.fetch(reference_to(source), 1, [2, 9, 8], KEYS[1:4])
    source.leases.fill("a", 3, [1, 6], KEYS[3:5], 5)
    time.sleep(0.05)
    assert fetch.state is FetchState.UNDER_WAY  # the source may still compute other tokens
    assert not fetch.done()
    source.leases.complete("a")
    wait(lambda: fetch.state is FetchState.DONE)
    assert fetch.num_blocks == 3
    assert fetch.reason is None
    assert fetch.done()
    assert fetch.seconds > 0
    assert sink.movers.last.moved == [(3, 2, 4), (5, 9, 4), (1, 8, 5)]
    assert sorted(source.leases.collect()) == [1, 3, 5, 6, 7]
    wait(lambda: source.counts().blocks_sent)
    sent, received = source.counts(), sink.counts()
    assert (sent.blocks_sent, sent.bytes_sent) == (received.blocks_received, received.bytes_received) == (3, 3 * 24)
    assert sent.leases_ended == {"confirmed": 1}
    assert sent.num_leases == received.num_fetches == 0
    assert received.failures == {}


def test_nothing_is_confirmed_before_all_bytes_are_there(create) -> None:
    source, sink = create(), create()
    sink.movers.moves_at_once = False
    source.leases.open("a")
    source.leases.fill("a", 0, [7, 3], KEYS[:2], -1)
    source.leases.complete("a")
    fetch = sink.fetch(reference_to(source), 0, [1, 2], KEYS[:2])
    wait(lambda: len(sink.movers.last.moved) == 2)
    sink.movers.last.num_moved = 1
    time.sleep(0.05)
    assert fetch.state is FetchState.UNDER_WAY
    assert source.leases.ended == {}
    assert sink.counts().num_fetches == 1
    sink.movers.last.num_moved = 2
    wait(lambda: fetch.state is FetchState.DONE)


def test_a_prompt_that_is_shorter_than_hoped_brings_what_it_has(create) -> None:
    source, sink = create(), create()
    for name, num_blocks in (("two", 2), ("none", 0)):
        source.leases.open(name)
        source.leases.fill(name, 0, list(range(1, 1 + num_blocks)), KEYS[:num_blocks], -1) if num_blocks else None
        source.leases.complete(name)
    two = sink.fetch(reference_to(source, "two"), 1, [1, 2, 3], KEYS[1:4])
    none = sink.fetch(reference_to(source, "none"), 0, [4], KEYS[:1])
    for fetch, num_blocks in ((two, 1), (none, 0)):
        wait(lambda fetch=fetch: fetch.state is FetchState.DONE)
        assert fetch.num_blocks == num_blocks
    assert len(source.leases) == 0


def fails(fetch, reason) -> None:
    wait(lambda: fetch.state is not FetchState.UNDER_WAY)
    assert (fetch.state, fetch.reason) == (FetchState.FAILED, reason)
    wait(fetch.done)


def test_what_another_engine_or_none_has_is_not_fetched(create, stack) -> None:
    sink, source = create(), create()
    source.leases.open("a")
    other_layout = replace(LAYOUT, block_size=4)
    cases = [
        (create(model="other"), FetchFailure.OTHER_MODEL),
        (create(layout=other_layout), FetchFailure.OTHER_LAYOUT),
        (create(secret=b"other"), FetchFailure.LINK),
    ]
    for other, reason in cases:
        other.leases.open("a")
        fails(sink.fetch(reference_to(other), 0, [1], KEYS[:1]), reason)
        assert other.leases.ended == {}
    fails(sink.fetch(replace(reference_to(source), engine="before"), 0, [1], KEYS[:1]), FetchFailure.STALE)
    fails(sink.fetch(reference_to(source, "b"), 0, [1], KEYS[:1]), LossReason.UNKNOWN)
    gone = create()
    gone.close()
    fails(sink.fetch(reference_to(gone), 0, [1], KEYS[:1]), FetchFailure.LINK)
    fails(sink.fetch(replace(reference_to(source), host="192.0.2.1", port=9), 0, [1], KEYS[:1]), FetchFailure.LINK)
    sink.movers.error = TransferError("too slow")
    other = create()
    fails(sink.fetch(reference_to(other), 0, [1], KEYS[:1]), FetchFailure.BACKEND)
    assert sink.counts().failures == {
        "other_model": 1, "other_layout": 1, "link": 3, "stale": 1, "unknown": 1, "backend": 1
    }  # fmt: skip


def test_requests_are_told_where_nothing_is_fetched_from(create) -> None:
    source, sink = create(hosts=None), create(hosts=AllowedHosts(["10.0.0.0/8", "prefill"]))
    for host in ("10.1.2.3", "PREFILL", source.host):
        sink.check(replace(reference_to(source), host=host))
    for host in ("/run/docker.sock", "127.0.0.1", "@other", "11.0.0.1"):
        with pytest.raises(RequestError, match="--kv-transfer-peers"):
            sink.check(replace(reference_to(source), host=host))
    with pytest.raises(RequestError, match="--splitwise-role decode"):
        source.check(reference_to(sink))


def test_a_lease_is_fetched_once(create) -> None:
    source, sink, other = create(), create(), create()
    source.leases.open("a")
    first = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    fails(sink.fetch(reference_to(source), 0, [2], KEYS[:1]), LossReason.CONFIRMED)
    wait(lambda: sink.movers.attached and sink.movers.attached[0])
    time.sleep(0.05)
    fails(other.fetch(reference_to(source), 0, [2], KEYS[:1]), LossReason.CONFIRMED)
    source.leases.fill("a", 0, [5], KEYS[:1], -1)
    source.leases.complete("a")
    wait(lambda: first.state is FetchState.DONE)


@pytest.mark.parametrize(
    ("block", "key", "reason"),
    [
        (4, KEYS[0], FetchFailure.OTHER_BLOCKS),
        (0, KEYS[1], FetchFailure.OUT_OF_RANGE),
        (NUM_BLOCKS, KEYS[1], FetchFailure.OUT_OF_RANGE),
    ],
)
def test_a_block_that_is_not_the_right_one_ends_the_fetch_alone(create, block, key, reason) -> None:
    source, sink = create(), create()
    for name in "ab":
        source.leases.open(name)
    wrong = sink.fetch(reference_to(source, "a"), 0, [1, 2], KEYS[:2])
    right = sink.fetch(reference_to(source, "b"), 0, [3], KEYS[:1])
    source.leases.fill("a", 0, [4], KEYS[:1], 0)
    source.leases.fill("a", 1, [block], [key], 0)
    fails(wrong, reason)
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})
    assert sorted(source.leases.collect()) == sorted((block, 4))
    source.leases.fill("b", 0, [5], KEYS[:1], 0)
    source.leases.complete("b")
    wait(lambda: right.state is FetchState.DONE)


def test_a_lease_that_begins_behind_what_is_wanted_is_no_use(create) -> None:
    source, sink = create(), create()
    source.leases.open("a")
    source.leases.fill("a", 2, [4], KEYS[2:3], 0)
    fails(sink.fetch(reference_to(source), 0, [1, 2, 3], KEYS[:3]), FetchFailure.OTHER_BLOCKS)


def test_what_the_source_gives_up_is_lost(create) -> None:
    source, sink = create(), create()
    source.leases.open("a")
    source.leases.open("b")
    one, other = (sink.fetch(reference_to(source, name), 0, [1], KEYS[:1]) for name in "ab")
    wait(lambda: sink.movers.attached and len(sink.movers.attached[0]) == 2)
    time.sleep(0.05)
    source.leases.cancel("a", LossReason.CANCELLED)
    fails(one, LossReason.CANCELLED)
    source.cache_lost(LossReason.CACHE_LOST)
    fails(other, LossReason.CACHE_LOST)
    wait(lambda: sink.movers.num_closed == 1)
    fails(sink.fetch(reference_to(source, "a"), 0, [1], KEYS[:1]), FetchFailure.LINK)
    source.cache_back("new")
    wait(lambda: not sink._peers)
    fails(sink.fetch(reference_to(source, "a"), 0, [1], KEYS[:1]), FetchFailure.OTHER_MODEL)
    source.cache_lost(LossReason.CACHE_LOST)
    source.cache_back("model")
    source.leases.open("c")
    source.leases.complete("c")
    wait(lambda: not sink._peers)
    fetch = sink.fetch(reference_to(source, "c"), 0, [1], KEYS[:1])
    wait(lambda: fetch.state is FetchState.DONE)


def test_a_sink_that_loses_its_cache_fetches_nothing(create) -> None:
    source, sink = create(), create()
    source.leases.open("a")
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: sink.movers.attached and sink.movers.attached[0])
    sink.cache_lost(LossReason.CACHE_LOST)
    fails(fetch, LossReason.CACHE_LOST)
    fails(sink.fetch(reference_to(source), 0, [1], KEYS[:1]), LossReason.CACHE_LOST)
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})
    sink.cache_back("model")
    source.leases.open("b")
    source.leases.complete("b")
    fetch = sink.fetch(reference_to(source, "b"), 0, [1], KEYS[:1])
    wait(lambda: fetch.state is FetchState.DONE)


def test_a_fetch_that_is_cancelled_is_done_when_its_copy_is(create) -> None:
    source, sink = create(), create()
    sink.movers.moves_at_once = False
    source.leases.open("a")
    source.leases.fill("a", 0, [4], KEYS[:1], -1)
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: sink.movers.last.moved)
    moves = sink.movers.last
    moves.is_busy = True
    fetch.cancel()
    assert (fetch.state, fetch.reason) == (FetchState.FAILED, FetchFailure.CANCELLED)
    assert not fetch.done()
    assert sink.counts().num_fetches == 1
    moves.is_busy = False
    assert fetch.done()
    assert sink.counts().num_fetches == 0
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})
    fetch.cancel()
    fails(fetch, FetchFailure.CANCELLED)


def test_a_copy_that_fails_ends_its_fetch(create) -> None:
    source, sink = create(), create()
    sink.movers.moves_at_once = False
    source.leases.open("a")
    source.leases.fill("a", 0, [4], KEYS[:1], -1)
    source.leases.complete("a")
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: sink.movers.last.moved)
    sink.movers.last.error = RuntimeError("no")
    fails(fetch, FetchFailure.BACKEND)


def test_leases_outlive_their_duration_while_they_are_wanted(create) -> None:
    clock = Clock()
    source = create(leases=Leases(30.0, 2.0, clock))
    sink = create(patience=Patience(30.0, 1000.0), clock=clock)
    sink.movers.moves_at_once = False
    for name in ("fetched", "waiting", "forgotten"):
        source.leases.open(name)
        source.leases.fill(name, 0, [len(name)], KEYS[:1], -1)
        source.leases.complete(name)
    fetch = sink.fetch(reference_to(source, "fetched"), 0, [1], KEYS[:1])
    wait(lambda: sink.movers.last.moved)
    for _ in range(4):
        clock.now += 10.1
        sink.renew([reference_to(source, "waiting")])
        time.sleep(0.25)  # longer than peers look away
        source.leases.collect()
    assert source.leases.ended == {LossReason.EXPIRED: 1}
    assert fetch.state is FetchState.UNDER_WAY
    clock.now += 31
    source.leases.collect()
    fails(fetch, LossReason.EXPIRED)


def test_what_does_not_come_in_time_is_given_up(create) -> None:
    clock = Clock()
    source = create()
    sink = create(patience=Patience(30.0, 5.0, 50.0), clock=clock)
    sink.movers.moves_at_once = False
    for name in "ab":
        source.leases.open(name)
    slow, stuck = (sink.fetch(reference_to(source, name), 0, [1], KEYS[:1]) for name in "ab")
    source.leases.fill("b", 0, [4], KEYS[:1], -1)
    source.leases.complete("b")
    wait(lambda: sink.movers.attached and len(sink.movers.attached[0]) == 2 and sink.movers.last.moved)
    time.sleep(0.3)
    clock.now += 6
    fails(stuck, FetchFailure.TIMEOUT)  # its bytes
    assert slow.state is FetchState.UNDER_WAY  # prompts may have to wait
    clock.now += 50
    fails(slow, FetchFailure.TIMEOUT)
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 2})


def test_a_link_that_nobody_needs_ends(create) -> None:
    clock = Clock()
    source, sink = create(), create(clock=clock)
    source.leases.open("a")
    source.leases.complete("a")
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: fetch.state is FetchState.DONE)
    clock.now += 61
    wait(lambda: not sink._peers)
    wait(lambda: sink.movers.num_closed)


class Rogue:
    """A source that does as a test says."""

    def __init__(self) -> None:
        self.listener, self.host, _ = listen("127.0.0.1", None)
        self.reference = Reference("rogue", self.host, 0, "a")

    @contextmanager
    def link(self) -> Iterator[Link]:
        stream, _ = self.listener.accept()
        link = Link(stream, SECRET, is_asking=False, timeout_s=10)
        assert isinstance(link.receive(10), Hello)
        link.send(Hello(1, "rogue", "model", LAYOUT.digest, ("fake",), False, ("here",)))
        yield link
        link.close()


@pytest.fixture
def rogue() -> Iterator[Rogue]:
    made = Rogue()
    yield made
    made.listener.close()


KEY = (KEYS[0].hex(),)


@pytest.mark.parametrize(
    "messages",
    [
        [Confirmed("a")],
        [Dropped("a")],
        [Complete("b", 1)],
        [Complete("a", 1)],
        [Filled("a", 0, (1,), KEY, -1), Filled("a", 0, (1,), KEY, -1)],
        [Filled("a", 0, (1,), KEY, -1), Complete("a", 1), Complete("a", 1)],
        [Filled("a", 0, (1,), KEY, -1), Complete("a", 1), Filled("a", 1, (1,), KEY, -1)],
        [Filled("a", 0, (), (), -1)],
        [Lost("a", "whim")],
        [Open("a", 0)],
        [Hello(1, "rogue", "model", LAYOUT.digest, ("fake",), False, ("here",))],
    ],
)
def test_a_source_that_makes_no_sense_is_left(create, rogue, messages: list[Message]) -> None:
    sink = create()
    sink.movers.moves_at_once = False
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    with rogue.link() as link:
        assert link.receive(10) == Open("a", 0)
        for message in messages:
            link.send(message)
        fails(fetch, FetchFailure.PROTOCOL)
        assert ends(link)


def ends(link: Link) -> bool:
    """Whether a link ends, after whatever else comes."""
    try:
        while link.receive(10) is not None:
            pass
    except LinkError:
        return True
    return False


def test_a_source_that_ends_amid_a_fetch_is_counted(create, rogue) -> None:
    sink = create()
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    with rogue.link() as link:
        assert link.receive(10) == Open("a", 0)
    fails(fetch, FetchFailure.LINK)
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    with rogue.link() as link:
        assert link.receive(10) == Open("a", 0)
        link.send(Bye("closed"))
        fails(fetch, FetchFailure.LINK)
    wait(lambda: sink.movers.num_closed == 2)


def test_messages_that_cross_are_no_mistake(create, rogue) -> None:
    sink = create()
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    with rogue.link() as link:
        assert link.receive(10) == Open("a", 0)
        fetch.cancel()
        assert link.receive(10) == Drop("a")
        link.send(Filled("a", 0, (1,), KEY, -1))
        link.send(Complete("a", 1))
        link.send(Lost("a", "expired"))
        link.send(Dropped("a"))
        link.send(Lost("a", "expired"))
        again = sink.fetch(replace(rogue.reference, lease="b"), 0, [1], KEYS[:1])
        assert link.receive(10) == Open("b", 0)
        link.send(Filled("b", 0, (1,), KEY, -1))
        link.send(Complete("b", 1))
        assert link.receive(10) == Confirm("b", 1)
        link.send(Confirmed("b"))
        wait(lambda: again.state is FetchState.DONE)
    assert sink.counts().failures == {"cancelled": 1}


class TestPort:
    """A source, before sinks that do as a test says."""

    @pytest.fixture
    def source(self, create) -> EngineTransfers:
        return create(address=("127.0.0.1", 0))

    @pytest.fixture
    def connect(self, source, stack) -> Callable[..., Link]:
        def connect(*, greets: bool = True, secret: bytes = SECRET) -> Link:
            link = Link(socket.create_connection((source.host, source.port)), secret, is_asking=True, timeout_s=10)
            stack.callback(link.close)
            if greets:
                link.send(Hello(1, "sink", "model", LAYOUT.digest, ("fake",), False, ("",)))
                assert isinstance(link.receive(10), Hello)
            return link

        return connect

    def test_who_does_not_know_the_secret_is_refused(self, connect) -> None:
        with pytest.raises(LinkError):
            connect(secret=b"")
        connect()

    def test_nobody_touches_what_another_link_has_opened(self, source, connect) -> None:
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
    def test_a_sink_that_makes_no_sense_is_left_and_its_leases_end(self, source, connect, message) -> None:
        link = connect()
        source.leases.open("a")
        link.send(Open("a", 0))
        link.send(message)
        with pytest.raises(LinkError):
            link.receive(10)
        wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})

    def test_a_link_begins_with_hello(self, source, connect) -> None:
        link = connect(greets=False)
        link.send(Renew(("a",)))
        assert isinstance(link.receive(10), Hello)
        with pytest.raises(LinkError):
            link.receive(10)

    def test_leases_of_a_link_that_breaks_end(self, source, connect) -> None:
        link = connect()
        source.leases.open("a")
        source.leases.fill("a", 0, [4], KEYS[:1], -1)
        link.send(Open("a", 0))
        assert isinstance(link.receive(10), Filled)
        link._stream.sendall(b"\0\0\1")  # within a frame
        link.close()
        wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})
        assert source.leases.collect() == [4]

    def test_a_sink_that_reads_nothing_holds_nobody_up(self, source, connect) -> None:
        link = connect()
        source.leases.open("a")
        link.send(Open("a", 0))
        source.leases.fill("a", 0, [4], KEYS[:1], -1)
        assert isinstance(link.receive(10), Filled)
        for number in range(8000):  # more than sockets and queues take
            if not source.leases.fill("a", 1 + 20 * number, [4] * 20, [KEYS[1]] * 20, -1):
                break
        wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})

    def test_links_are_bounded(self, source, connect, monkeypatch) -> None:
        source._port._places = threading.Semaphore(1)
        first = connect()
        with pytest.raises(LinkError):
            connect()
        first.close()
        wait(lambda: source._port._places._value == 1)
        connect()

    def test_after_the_end_nobody_is_there(self, source, connect) -> None:
        link = connect()
        source.close()
        assert isinstance(link.receive(10), Bye)
        with pytest.raises(LinkError):
            link.receive(10)
        with pytest.raises((LinkError, OSError)):
            connect()
        assert not [thread for thread in threading.enumerate() if thread.name == "stepgraph-port"]


def test_a_garbled_frame_is_a_protocol_error(create, rogue) -> None:
    sink = create()
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    with rogue.link() as link:
        assert link.receive(10) == Open("a", 0)
        link._stream.sendall(b"\0\0\0\4none")
        fails(fetch, FetchFailure.PROTOCOL)
