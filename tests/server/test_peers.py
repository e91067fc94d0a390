"""An engine that several fronts talk to: each hears of its own requests, all of the load, and nobody computes for the dead."""

import threading
from contextlib import contextmanager

import pytest
import zmq

from stepgraph.server.engine_process import EngineProcess
from stepgraph.server.messages import (
    Accepted,
    Add,
    AskGraphs,
    FrontGone,
    Hello,
    Progress,
    Stop,
    decode_from_engine,
    encode,
)

PROMPT = [5, 6, 7]


def add(name: str, max_tokens: int) -> Add:
    settings = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return Add(name, [(name, settings)], PROMPT)


class End:
    """One end of a socket of the engine's."""

    def __init__(self, socket: zmq.Socket):
        self._socket = socket
        self.heard: list = []

    def send(self, message) -> None:
        self._socket.send(encode(message))

    def wait_for(self, condition):
        """The first message for which this holds; all before it are noted."""
        while self._socket.poll(60_000):
            self.heard.append(message := decode_from_engine(self._socket.recv()))
            if condition(message):
                return message
        raise AssertionError(f"the engine never said it; it said {self.heard[-5:]}")

    def drain(self) -> None:
        """Note what is there."""
        while self._socket.poll(0):
            self.heard.append(decode_from_engine(self._socket.recv()))

    def tokens(self, name: str) -> list[int]:
        updates = [update for message in self.heard if isinstance(message, Progress) for update in message.updates]
        return [token for update in updates if update.id == name for token in update.token_ids]


@contextmanager
def serving(engine, *names: str):
    """The supervisor's end, and those of fronts of these names."""
    context = zmq.Context()
    sockets = {kind: context.socket(kind) for kind in (zmq.PAIR, zmq.ROUTER)}
    for kind, socket in sockets.items():
        socket.bind(f"inproc://{kind}")
    ends = []
    for kind, name in ((zmq.PAIR, "supervisor"), *((zmq.DEALER, name) for name in names)):
        socket = context.socket(kind)
        socket.setsockopt(zmq.IDENTITY, name.encode())
        socket.connect(f"inproc://{zmq.PAIR if kind == zmq.PAIR else zmq.ROUTER}")
        ends.append(End(socket))
    process = EngineProcess(engine, sockets[zmq.PAIR], sockets[zmq.ROUTER])
    thread = threading.Thread(target=process.run)
    thread.start()
    try:
        yield ends
    finally:
        ends[0].send(Stop())
        thread.join(60)
        context.destroy(linger=0)
        assert not thread.is_alive()


def ends(name: str):
    return lambda message: (
        isinstance(message, Progress) and any(update.id == name and update.finish_reason for update in message.updates)
    )


def load_of(count: int):
    return lambda message: isinstance(message, Progress) and message.load.num_running == count


@pytest.fixture
def engine(create_engine):
    return create_engine()


def test_each_front_hears_of_its_own_requests_and_all_of_the_load_and_the_steps_once(engine) -> None:
    with serving(engine, "a", "b", "idle") as (supervisor, a, b, idle):
        idle.send(Hello())
        for front, name in ((a, "one"), (b, "two")):
            front.send(add(name, 200))
        for front, name in ((a, "one"), (b, "two")):
            front.wait_for(ends(name))
            assert [message.group for message in front.heard if isinstance(message, Accepted)] == [name]
            assert len(front.tokens(name)) == 200
        assert a.tokens("one") == b.tokens("two")
        assert not a.tokens("two")
        for end in (idle, supervisor):
            end.wait_for(lambda message: load_of(1)(message) or load_of(2)(message))
            end.wait_for(load_of(0))
            assert not any(message.updates for message in end.heard if isinstance(message, Progress))
        assert not any(message.steps for message in a.heard if isinstance(message, Progress))
        supervisor.send(AskGraphs(7))
        graphs = supervisor.wait_for(lambda message: getattr(message, "number", None) == 7).content
        told = sum(len(message.steps) for message in supervisor.heard if isinstance(message, Progress))
        assert told == graphs["steps"] >= 200


def test_requests_of_a_front_that_is_gone_end_also_those_that_come_later(engine) -> None:
    with serving(engine, "front-0-0", "front-1-0") as (supervisor, dead, other):
        dead.send(add("long", 490))
        other.send(add("longer", 490))
        dead.wait_for(lambda message: dead.tokens("long"))
        supervisor.send(FrontGone("front-0-0"))
        supervisor.send(AskGraphs(1))
        supervisor.wait_for(lambda message: getattr(message, "number", None) == 1)
        dead.send(add("late", 4))
        other.wait_for(ends("longer"))
        other.send(add("last", 4))
        other.wait_for(ends("last"))
        supervisor.send(AskGraphs(2))
        supervisor.wait_for(lambda message: getattr(message, "number", None) == 2)
        assert not engine.has_work
        dead.drain()
    assert len(dead.tokens("long")) < 490
    assert "late" not in [message.group for message in dead.heard if isinstance(message, Accepted)]
