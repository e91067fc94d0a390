"""Blocks that the source writes into the sink's memory: nobody gets them before the source can write there no more."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from fake_engines import KEYS, LAYOUT, NUM_BLOCKS, SECRET, Clock, Rogue, creating, ends, fails, reference_to, wait

from stepgraph.transfer.base import FetchFailure, FetchState, TransferError
from stepgraph.transfer.fetch import Pushed
from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.link import Link
from stepgraph.transfer.messages import Arrived, Confirm, Drop, Filled, Hello, Message, Open
from stepgraph.transfer.peer import Patience
from stepgraph.transfer.transfers import EngineTransfers

KEY = (KEYS[0].hex(),)


@pytest.fixture
def create() -> Iterator[Callable[..., EngineTransfers]]:
    with creating() as create:
        yield partial(create, moves="source")


@pytest.fixture
def pair(create) -> tuple[EngineTransfers, EngineTransfers]:
    source, sink = create(), create()
    source.movers.moves_at_once = False
    source.leases.open("a")
    return source, sink


def test_a_source_moves_what_is_filled_where_the_sink_wants_it(create) -> None:
    source, sink = create(), create()
    source.leases.open("a")
    source.leases.fill("a", 0, [7, 3, 5], KEYS[:3], 4)
    fetch = sink.fetch(reference_to(source), 1, [2, 9, 8], KEYS[1:4])
    wait(lambda: len(source.movers.last.moved) == 2)
    source.leases.fill("a", 3, [1, 6], KEYS[3:5], 5)  # one more than is wanted
    source.leases.complete("a")
    wait(lambda: fetch.state is FetchState.DONE)
    assert source.movers.last.moved == [(3, 2, 4), (5, 9, 4), (1, 8, 5)]
    assert fetch.num_blocks == 3
    assert fetch.done()
    assert sink.movers.attached == []
    assert sink.counts().bytes_received == source.counts().bytes_sent == 3 * 24
    assert sorted(source.leases.collect()) == [1, 3, 5, 6, 7]


def test_nothing_is_confirmed_before_it_has_arrived(pair) -> None:
    source, sink = pair
    source.leases.fill("a", 0, [7, 3], KEYS[:2], 4)
    source.leases.complete("a")
    fetch = sink.fetch(reference_to(source), 0, [1, 2], KEYS[:2])
    wait(lambda: len(source.movers.last.moved) == 2)
    source.movers.last.num_moved = 1
    time.sleep(0.05)
    assert fetch.state is FetchState.UNDER_WAY
    assert source.leases.ended == {}
    source.movers.last.num_moved = 2
    wait(lambda: fetch.state is FetchState.DONE)


def is_fenced(pair: tuple[EngineTransfers, EngineTransfers], give_up: Callable) -> bool:
    """Whether a fetch that is given up is not done before the source's copy, which is under way, has ended."""
    source, sink = pair
    source.leases.fill("a", 0, [7], KEYS[:1], 4)
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: source.movers.last.moved)
    moves = source.movers.last
    moves.is_busy = True
    give_up(source, fetch)
    wait(lambda: fetch.state is FetchState.FAILED)
    wait(lambda: moves.is_cancelled)
    time.sleep(0.05)
    fenced = not fetch.done()
    moves.is_busy = False
    wait(fetch.done)
    return fenced


def cancel_fetch(source, fetch) -> None:
    fetch.cancel()


def cancel_lease(source, fetch) -> None:
    source.leases.cancel("a", LossReason.CANCELLED)


@pytest.mark.parametrize("give_up", [cancel_fetch, cancel_lease])
def test_what_is_given_up_is_not_done_before_the_source_has_stopped(pair, give_up) -> None:
    assert is_fenced(pair, give_up)
    wait(lambda: len(pair[0].leases) == 0)


def test_mutant_a_fetch_that_is_done_when_it_is_cancelled_is_caught(pair, monkeypatch) -> None:
    monkeypatch.setattr(Pushed, "cancel", Pushed.stop)
    assert not is_fenced(pair, cancel_fetch)


def test_a_link_that_ends_is_no_proof_that_nothing_is_written(create) -> None:
    source, sink = create(), create()
    source.leases.open("a")
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: source.movers.attached and source.movers.attached[0])
    sink.movers.may_close.clear()
    source.close()
    wait(lambda: fetch.state is FetchState.FAILED)
    time.sleep(0.15)
    assert not fetch.done()
    assert sink.counts().num_fetches == 1
    sink.movers.may_close.set()
    wait(fetch.done)


def test_a_source_that_does_not_say_that_it_has_stopped_loses_its_link() -> None:
    clock, rogue = Clock(), Rogue()
    with creating() as create:
        sink = create(moves="source", clock=clock, patience=Patience(30.0, 5.0))
        fetch = sink.fetch(rogue.reference, 0, [1], KEYS[:1])
        with rogue.link() as link:
            assert link.receive(10) == Open("a", 0, (1,))
            fetch.cancel()
            assert link.receive(10) == Drop("a")
            assert not fetch.done()
            clock.now += 6
            wait(fetch.done)
            assert sink.movers.num_closed == 1
            assert ends(link)
    rogue.listener.close()


def test_bytes_that_cannot_be_moved_are_lost(pair) -> None:
    source, sink = pair
    source.leases.fill("a", 0, [7], KEYS[:1], 4)
    fetch = sink.fetch(reference_to(source), 0, [1], KEYS[:1])
    wait(lambda: source.movers.last.moved)
    source.movers.last.error = RuntimeError("no")
    fails(fetch, LossReason.NOT_MOVED)
    assert source.leases.ended == {LossReason.NOT_MOVED: 1}


def test_a_source_that_cannot_reach_the_sink_says_nothing_more(pair) -> None:
    source, sink = pair
    source.movers.error = TransferError("no")
    fails(sink.fetch(reference_to(source), 0, [1], KEYS[:1]), FetchFailure.LINK)


@pytest.mark.parametrize("number", [-1, 0, 2])
def test_a_source_that_miscounts_is_left(number) -> None:
    rogue = Rogue()
    with creating() as create:
        fetch = create(moves="source").fetch(rogue.reference, 0, [1, 2], KEYS[:2])
        with rogue.link() as link:
            assert link.receive(10) == Open("a", 0, (1, 2))
            link.send(Filled("a", 0, (4,), KEY, 0))
            link.send(Arrived("a", number))
            fails(fetch, FetchFailure.PROTOCOL)
    rogue.listener.close()


@pytest.mark.parametrize(
    "messages",
    [
        [Open("a", 0)],
        [Open("a", 0, (0,))],
        [Open("a", 0, (NUM_BLOCKS,))],
        [Open("a", 0, (1,)), Confirm("a", 1)],
    ],
)
def test_a_sink_that_makes_no_sense_is_left(pair, messages: list[Message]) -> None:
    source, _ = pair
    link = connect(source)
    for message in messages:
        link.send(message)
    assert ends(link)
    wait(lambda: not [thread for thread in threading.enumerate() if thread.name == "stepgraph-port-link"])
    assert source.movers.num_closed == 1


def connect(source: EngineTransfers, model: str = "model") -> Link:
    """A link of a sink that has said Hello."""
    stream = socket.socket(socket.AF_UNIX)
    stream.connect("\0" + source.host[1:])
    link = Link(stream, SECRET, is_asking=True, timeout_s=10)
    link.send(Hello(1, "sink", model, LAYOUT.digest, ("fake",), False, ("",)))
    assert isinstance(link.receive(10), Hello)
    return link


def test_nothing_is_written_into_another_model_s_cache(pair) -> None:
    source, _ = pair
    assert ends(connect(source, model="other"))
    assert source.movers.attached == []


def test_who_moves_is_agreed_upon(pair) -> None:
    source, _ = pair
    with creating() as create:
        sink = create()  # which would move itself
        fails(sink.fetch(reference_to(source), 0, [1], KEYS[:1]), FetchFailure.LINK)
