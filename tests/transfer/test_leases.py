"""Every block of a lease goes back once, and what is confirmed was held to that moment."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.messages import Complete, Filled, Lost

KEY = bytes(32)
DURATION_S, GRACE_S = 10.0, 3.0
NAMES = st.sampled_from("abc")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock) -> Leases:
    return Leases(DURATION_S, GRACE_S, clock)


def test_a_reader_hears_what_was_there_and_what_comes(leases) -> None:
    heard: list = []
    assert leases.open("a")
    assert leases.fill("a", 2, [7, 9], [KEY, KEY], 4)
    leases.read("a", heard.append)
    assert leases.fill("a", 4, [3], [KEY], 5)
    leases.complete("a")
    keys = (KEY.hex(),) * 2
    assert heard == [Filled("a", 2, (7, 9), keys, 4), Filled("a", 4, (3,), keys[:1], 5), Complete("a", 5)]
    assert leases.collect() == []
    assert leases.confirm("a", 5) is None
    assert sorted(leases.collect()) == [3, 7, 9]
    assert leases.confirm("a", 5) is LossReason.CONFIRMED
    assert not leases.open("a")
    assert len(leases) == 0


def test_a_lease_that_nobody_renews_expires_and_spares_those_who_read(leases, clock) -> None:
    heard: list = []
    for name, tell in (("read", heard.append), ("unread", None)):
        assert leases.open(name)
        leases.fill(name, 0, [len(name)], [KEY], 1)
        leases.complete(name)
        if tell is not None:
            leases.read(name, tell)
    clock.now = DURATION_S - 1
    leases.renew("unread")
    clock.now = DURATION_S
    assert leases.collect() == []
    assert heard[-1] == Lost("read", LossReason.EXPIRED)
    assert leases.confirm("read", 1) is LossReason.EXPIRED
    clock.now = DURATION_S + GRACE_S
    assert leases.collect() == [len("read")]
    clock.now = 2 * DURATION_S - 1
    assert leases.collect() == [len("unread")]
    assert leases.ended == {LossReason.EXPIRED: 2}


def test_what_is_confirmed_late_is_not_right_though_nobody_has_looked_at_the_clock(leases, clock) -> None:
    leases.open("a")
    leases.fill("a", 0, [1], [KEY], 1)
    leases.complete("a")
    leases.read("a", lambda message: None)
    clock.now = DURATION_S
    assert leases.confirm("a", 1) is LossReason.EXPIRED
    assert leases.collect() == [1]


def test_a_lease_is_not_complete_before_the_engine_says_so(leases, clock) -> None:
    for name in ("early", "short"):
        leases.open(name)
        leases.read(name, lambda message: None)
        leases.fill(name, 0, [1], [KEY], 1)
    clock.now = 100 * DURATION_S  # a prompt may wait as long as it wants
    leases.complete("short")
    assert leases.confirm("early", 1) is LossReason.NOT_COMPLETE
    assert leases.confirm("short", 2) is LossReason.NOT_COMPLETE
    assert leases.confirm("other", 2) is LossReason.UNKNOWN


def test_a_second_reader_gets_nothing(leases) -> None:
    first, second = [], []
    leases.open("a")
    leases.fill("a", 0, [1], [KEY], 1)
    leases.read("a", first.append)
    leases.read("a", second.append)
    assert len(first) == 1
    assert second == [Lost("a", LossReason.CONFIRMED)]
    leases.drop("a")
    assert leases.collect() == [1]
    leases.read("a", second.append)
    assert second[1:] == [Lost("a", LossReason.DROPPED)]
    assert not leases.fill("a", 1, [2], [KEY], 2)


def test_blocks_whose_content_is_lost_go_back_at_once(leases, clock) -> None:
    heard: list = []
    for number, name in enumerate(("closing", "read", "unread"), start=1):
        leases.open(name)
        leases.fill(name, 0, [number], [KEY], 1)
    leases.complete("closing")
    leases.read("closing", heard.append)
    clock.now = DURATION_S
    assert leases.collect() == []
    leases.read("read", heard.append)
    leases.cancel_all(LossReason.CACHE_LOST)
    assert sorted(leases.collect()) == [1, 2, 3]
    assert [message for message in heard if isinstance(message, Lost)] == [
        Lost("closing", LossReason.EXPIRED),
        Lost("read", LossReason.CACHE_LOST),
    ]


class AnyLeases(RuleBasedStateMachine):
    """Blocks that are given to leases and come back, in any order of what engines and sinks do."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.leases = Leases(DURATION_S, GRACE_S, self.clock)
        self.held: dict[int, str] = {}
        self.num_blocks: dict[str, int] = {}
        self.lost: set[str] = set()
        self.round = 0

    def name(self, name: str) -> str:
        return f"{name}{self.round}"

    def hear(self, message) -> None:
        if isinstance(message, Lost) and message.reason != LossReason.CONFIRMED:  # else a second reader is told
            self.lost.add(message.lease)

    @rule()
    def go_on_to_other_names(self) -> None:
        self.round += 1

    @rule(name=NAMES)
    def open(self, name) -> None:
        if self.leases.open(self.name(name)):
            assert self.name(name) not in self.num_blocks
            self.num_blocks[self.name(name)] = 0
            self.lost.discard(self.name(name))  # for who asked before there was any

    @rule(name=NAMES, count=st.integers(1, 3))
    def fill(self, name, count) -> None:
        name = self.name(name)
        first = len(self.held) + 1000 * self.round + sum(self.num_blocks.values())
        blocks = [max(self.held, default=0) + first + k + 1 for k in range(count)]
        if self.leases.fill(name, self.num_blocks.get(name, 0), blocks, [KEY] * count, 0):
            self.held |= dict.fromkeys(blocks, name)
            self.num_blocks[name] += count

    @rule(name=NAMES)
    def complete(self, name) -> None:
        self.leases.complete(self.name(name))

    @rule(name=NAMES)
    def read(self, name) -> None:
        self.leases.read(self.name(name), self.hear)

    @rule(name=NAMES)
    def renew(self, name) -> None:
        self.leases.renew(self.name(name))

    @rule(name=NAMES)
    def confirm(self, name) -> None:
        name = self.name(name)
        if self.leases.confirm(name, self.num_blocks.get(name, 0)) is None:
            blocks = [block for block, lease in self.held.items() if lease == name]
            assert len(blocks) == self.num_blocks[name]  # none had gone back
            assert name not in self.lost

    @rule(name=NAMES)
    def drop(self, name) -> None:
        self.leases.drop(self.name(name))

    @rule(name=NAMES)
    def cancel(self, name) -> None:
        self.leases.cancel(self.name(name), LossReason.CANCELLED)

    @rule()
    def lose_all(self) -> None:
        self.leases.cancel_all(LossReason.CACHE_LOST)
        assert len(self.leases) == 0

    @rule(seconds=st.sampled_from((1.0, GRACE_S, DURATION_S)))
    def wait(self, seconds) -> None:
        self.clock.now += seconds

    @rule()
    def collect(self) -> None:
        for block in self.leases.collect():
            del self.held[block]  # once

    @invariant()
    def counts_add_up(self) -> None:
        assert len(self.leases) + sum(self.leases.ended.values()) == len(self.num_blocks)

    def teardown(self) -> None:
        self.leases.cancel_all(LossReason.CACHE_LOST)
        self.clock.now += GRACE_S
        self.collect()
        assert not self.held


TestAnyLeases = AnyLeases.TestCase
