"""Fetches from a source over its port: what comes is what was asked for, and all else ends them with the reason."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from fake_engines import KEYS, LAYOUT, NUM_BLOCKS, Clock, Rogue, creating, ends, fails, reference_to, wait

from stepgraph.errors import RequestError
from stepgraph.transfer import transfers
from stepgraph.transfer.base import FetchFailure, FetchState, TransferError
from stepgraph.transfer.leases import Leases, LossReason
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
)
from stepgraph.transfer.peer import Patience
from stepgraph.transfer.sockets import AllowedHosts
from stepgraph.transfer.transfers import EngineTransfers


@pytest.fixture
def create() -> Iterator[Callable[..., EngineTransfers]]:
    with creating() as create:
        yield create


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


def test_what_another_engine_or_none_has_is_not_fetched(create) -> None:
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


def test_requests_cannot_have_any_number_of_places_connected_to(create, monkeypatch) -> None:
    monkeypatch.setattr(transfers, "_MAX_PEERS", 1)
    source, other, sink = create(), create(), create()
    source.leases.open("a")
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    sink.renew([reference_to(other)])
    fails(sink.fetch(reference_to(other), 0, [1], KEYS[:1]), FetchFailure.LINK)
    fetch.cancel()
    source.close()
    wait(lambda: not sink._peers)
    fails(sink.fetch(reference_to(other), 0, [1], KEYS[:1]), LossReason.UNKNOWN)


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
    wait(lambda: source.leases._leases["a"].tell is not None)
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


def test_a_link_that_this_end_has_ended_is_no_trouble(create, caplog) -> None:
    source, sink = create(), create()
    source.leases.open("a")
    sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: sink.movers.attached and sink.movers.attached[0])
    sink.close()
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})
    assert not caplog.messages


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
        for name in ("fetched", "waiting"):
            lease = source.leases._leases[name]
            wait(lambda lease=lease: lease.expires_at == clock.now + 30.0)
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
    wait(lambda: stuck.total is not None)
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


def test_a_key_that_is_no_number_is_another_key(create, rogue) -> None:
    sink = create()
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    with rogue.link() as link:
        assert link.receive(10) == Open("a", 0)
        link.send(Filled("a", 0, (1,), ("?" * 64,), -1))
        assert link.receive(10) == Drop("a")
        fails(fetch, FetchFailure.OTHER_BLOCKS)


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


def test_a_lease_that_nobody_fetches_ends_at_once_and_no_other_does(create) -> None:
    source, sink, other = create(), create(), create()
    for name in "abc":
        source.leases.open(name)
    fetch = sink.fetch(reference_to(source, "a"), 0, [1], KEYS[:1])
    wait(lambda: source.leases._leases["a"].tell)
    for one in (sink, other):
        one.leave(reference_to(source, "a"))
    other.leave(reference_to(source, "b"))
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 1})
    sink.leave(reference_to(source, "c"))
    wait(lambda: source.leases.ended == {LossReason.DROPPED: 2})
    source.leases.complete("a")
    wait(lambda: fetch.state is FetchState.DONE)
    for name in "bc":
        fails(sink.fetch(reference_to(source, name), 0, [1], KEYS[:1]), LossReason.DROPPED)


def test_a_fetch_that_is_cancelled_before_there_is_a_link_leaves_its_lease(create, rogue) -> None:
    sink = create()
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    fetch.cancel()
    assert fetch.done()
    with rogue.link() as link:
        assert link.receive(10) == Drop("a")
        again = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
        assert link.receive(10) == Open("a", 0)
        link.send(Dropped("a"))
        link.send(Lost("a", "dropped"))
        fails(again, LossReason.DROPPED)


def test_a_garbled_frame_is_a_protocol_error(create, rogue) -> None:
    sink = create()
    fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
    with rogue.link() as link:
        assert link.receive(10) == Open("a", 0)
        link._stream.sendall(b"\0\0\0\4none")
        fails(fetch, FetchFailure.PROTOCOL)
