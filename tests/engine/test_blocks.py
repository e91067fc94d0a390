"""Who holds KV blocks, and that none is handed out while somebody may still touch it."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduling import Loop, answer_alone

from stepgraph.engine.blocks import BlockPool


@dataclass(eq=False)
class Work:
    """A transfer that ends when the test says so."""

    is_done: bool = False
    blocks: list[int] = field(default_factory=list)

    def done(self) -> bool:
        return self.is_done


class Pool(RuleBasedStateMachine):
    """Holders, fences and the prefix cache in any order, beside a model of sets."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(9)
        self.leases: list[list[int]] = []
        self.work: list[Work] = []
        self.content: dict[int, bytes] = {}  # of blocks that can be found
        self.num_keys = 0

    def held(self) -> list[int]:
        return [block for lease in self.leases for block in lease]

    def fenced(self) -> set[int]:
        return {block for work in self.work for block in work.blocks}

    @rule(data=st.data())
    def extend(self, data):
        if self.pool.num_free:
            blocks = self.pool.take(data.draw(st.integers(1, self.pool.num_free)))
            assert len(set(blocks)) == len(blocks)
            assert not set(blocks) & (set(self.held()) | self.fenced() | {0})
            for block in blocks:
                self.content.pop(block, None)
            self.leases.append(blocks)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def publish(self, data):
        block = data.draw(st.sampled_from(self.held()))
        if block not in self.content:
            self.num_keys += 1
            self.content[block] = b"key %d" % self.num_keys
            self.pool.publish(block, self.content[block])

    @precondition(lambda self: self.content or self.leases)
    @rule(data=st.data())
    def hold(self, data):
        known = sorted({*self.content, *self.held()})
        blocks = data.draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
        num_free, expected = self.pool.num_free, self.pool.count_free(blocks)
        self.pool.hold(blocks)
        assert self.pool.num_free == num_free - expected
        self.leases.append(blocks)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), kind=st.sampled_from(["stream", "new work", "old work"]))
    def release(self, data, kind):
        blocks = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        if kind == "stream":
            self.pool.release(blocks)
            return
        if kind == "new work" or not self.work:
            self.work.append(Work())
        self.work[-1].blocks += blocks
        self.pool.release(blocks, self.work[-1])

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def finish(self, data):
        done = self.work.pop(data.draw(st.integers(0, len(self.work) - 1)))
        done.is_done = True
        self.pool.reclaim()

    @rule()
    def reclaim(self):
        self.pool.reclaim()

    @rule()
    def forget_free(self):
        held = set(self.held())
        self.content = {block: key for block, key in self.content.items() if block in held}
        assert self.pool.forget_free() == len(self.content)

    @invariant()
    def nothing_is_lost(self):
        held, fenced = set(self.held()), self.fenced()
        assert self.pool.num_quarantined == len(fenced - held)
        assert self.pool.num_free == self.pool.num_usable - len(held | fenced)

    @invariant()
    def what_is_kept_is_found(self):
        assert {block: self.pool.find(key) for block, key in self.content.items()} == {b: b for b in self.content}

    def teardown(self):
        for lease in self.leases:
            self.pool.release(lease)
        for work in self.work:
            work.is_done = True
        self.pool.reclaim()
        assert (self.pool.num_free, self.pool.num_quarantined) == (self.pool.num_usable, 0)
        self.pool.forget()
        assert sorted(self.pool.take(self.pool.num_usable)) == list(range(1, self.pool.num_usable + 1))


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_blocks_are_never_reused_under_a_holder_or_an_open_fence_and_none_is_lost = Pool.TestCase


def test_a_block_waits_for_all_fences_whoever_released_it_last() -> None:
    pool, first, second = BlockPool(3), Work(), Work()
    blocks = pool.take(2)
    pool.hold(blocks)
    pool.release(blocks, first)
    pool.release(blocks, second)
    for work, num_free in ((first, 0), (second, 2)):
        work.is_done = True
        pool.reclaim()
        assert (pool.num_free, pool.num_quarantined) == (num_free, 2 - num_free)


def test_content_in_quarantine_is_found_and_its_next_holder_inherits_the_fence() -> None:
    pool, work = BlockPool(3), Work()
    blocks = pool.take(1)
    pool.publish(blocks[0], b"key")
    pool.release(blocks, work)
    assert (pool.find(b"key"), pool.count_free(blocks)) == (blocks[0], 0)
    pool.hold(blocks)
    assert (pool.num_free, pool.num_quarantined) == (1, 0)
    pool.release(blocks)
    assert (pool.num_free, pool.num_quarantined) == (1, 1)
    work.is_done = True
    pool.reclaim()
    assert (pool.num_free, pool.count_free(blocks)) == (2, 1)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_requests_wait_for_a_transfer_rather_than_take_its_blocks(run_ahead) -> None:
    loop = Loop(num_kv_blocks=9, run_ahead=run_ahead, prefix_caching=False)
    pool, work = loop.scheduler.blocks, Work()
    sent = pool.take(6)
    loop.held_elsewhere |= set(sent)
    requests = [loop.add(id, 5, 20) for id in "ab"]  # of seven blocks each
    for _ in range(30):
        loop.step()
    assert 0 < sum(len(request.output_token_ids) for request in requests) < 40
    pool.release(sent, work)
    for _ in range(30):
        loop.step()
    assert pool.num_quarantined == 6
    assert not all(request.finish_reason for request in requests)
    work.is_done = True
    loop.held_elsewhere.clear()
    loop.drain()
    assert [request.output_token_ids for request in requests] == [answer_alone(request) for request in requests]
    loop.check_nothing_is_held()


def test_a_requests_blocks_outlive_it_while_a_transfer_reads_them() -> None:
    loop = Loop(num_kv_blocks=9)
    first = loop.add("first", 9, 2)
    while not first.output_token_ids:
        loop.step()
    pool, work, sent = loop.scheduler.blocks, Work(), first.blocks[:2]
    pool.hold(sent)
    loop.held_elsewhere |= set(sent)
    content = {entry: value for entry, value in loop.device.kv[0].items() if entry[0] in sent}
    loop.drain()
    others = [loop.add(f"other {i}", 8, 14) for i in range(3)]
    loop.drain()
    pool.release(sent, work)
    others += [loop.add(f"more {i}", 7, 14) for i in range(3)]
    loop.drain()
    assert {entry: loop.device.kv[0][entry] for entry in content} == content
    assert [request.output_token_ids for request in others] == [answer_alone(request) for request in others]
    work.is_done = True
    loop.held_elsewhere.clear()
    loop.step()
    loop.check_nothing_is_held()
