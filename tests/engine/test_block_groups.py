"""Layers with a window and layers that see all tokens have blocks of their own, and that changes no answer."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import VOCAB, Loop, answer_alone
from test_windows import guide_all

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.engine.blocks import numbered_key
from stepgraph.engine.kv_events import KVEvents
from stepgraph.engine.request import Request
from stepgraph.errors import RequestError

BLOCK_SIZE = 4


def create(window: int, *, num_full: int = 1, num_windowed: int = 2, **options) -> Loop:
    return Loop(window=window, num_full=num_full, num_windowed=num_windowed, **options)


def assert_right(loop: Loop, requests: list[Request]) -> None:
    assert [r.output_token_ids for r in requests] == [answer_alone(r, loop.window) for r in requests]


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_request_keeps_all_blocks_of_full_groups_and_those_of_its_window(window, run_ahead, prefix_caching) -> None:
    loop = create(window, run_ahead=run_ahead, max_tokens=8, num_kv_blocks=60, prefix_caching=prefix_caching)
    requests = [loop.add("a", 50, 60), loop.add("b", 3, 70)]
    most = -(-(window + 8 + run_ahead) // BLOCK_SIZE) + 1
    while loop.scheduler.has_requests:
        loop.step()
        for request in loop.scheduler.running():
            groups = [[block for block in request.blocks[group::3] if block] for group in range(3)]
            assert len(groups[0]) * 3 == len(request.blocks)
            assert len(groups[1]) == len(groups[2]) <= most
    assert_right(loop, requests)
    loop.check_nothing_is_held()


@given(
    window=st.integers(1, 14),
    groups=st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)]),
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.sampled_from([0, 2, 8])),
        min_size=1,
        max_size=7,
    ),
    num_drafts=st.sampled_from([0, 0, 1, 3]),
    lookahead=st.integers(0, 2),
    run_ahead=st.integers(0, 2),
    num_kv_blocks=st.integers(21, 40),
    prefix_caching=st.booleans(),
    aborts=st.sets(st.integers(1, 40), max_size=2),
)
@settings(max_examples=80)
def test_answers_under_pressure_are_those_of_requests_alone(
    window, groups, requests, num_drafts, lookahead, run_ahead, num_kv_blocks, prefix_caching, aborts
) -> None:
    """Long answers do not fit beside each other, and requests share prefixes with those that have ended."""
    num_full, num_windowed = groups
    loop = create(
        window,
        num_full=num_full,
        num_windowed=num_windowed,
        max_tokens=20,
        num_kv_blocks=num_kv_blocks,
        run_ahead=run_ahead,
        num_drafts=(num_drafts,),
        lookahead=lookahead,
        prefix_caching=prefix_caching,
    )
    prompt = [(5 * i) % VOCAB for i in range(40)]
    added = []
    for index, (prompt_len, max_tokens, stop, most) in enumerate(requests):
        added.append(
            loop.add(f"r{index}", prompt[:prompt_len], max_tokens, stop=stop, max_num_drafts=most, seed=index % 2)
        )
    for step in range(40):
        if step in aborts:
            loop.engine.abort("r0")
        loop.step()
    again = [loop.add(f"again {r.id}", [*r.prompt_token_ids, *r.output_token_ids], 5, seed=1) for r in added]
    loop.drain()
    assert_right(loop, [*(added if not aborts else added[1:]), *again])
    loop.check_nothing_is_held()


def test_long_requests_run_beside_each_other_that_one_group_had_no_room_for() -> None:
    """Of 300 blocks, one request of 240 tokens takes 180 in one group of three."""
    loop = create(6, num_kv_blocks=101, max_tokens=16, prefix_caching=False)
    requests = [loop.add(id, 40, 200, max_num_drafts=0) for id in "abcd"]
    loop.drain()
    assert loop.scheduler.statistics.preemptions == 0
    assert_right(loop, requests)


@pytest.mark.parametrize(("num_drafts", "lookahead"), [(0, 0), (3, 1)])
@pytest.mark.parametrize("window", [1, 6, 8])
def test_the_fewest_blocks_that_are_not_refused_suffice(window, num_drafts, lookahead) -> None:
    for num_kv_blocks in range(2, 40):
        options = {"num_drafts": (num_drafts,), "lookahead": lookahead, "run_ahead": 2}
        loop = create(window, num_kv_blocks=num_kv_blocks, accuracy=1.0, **options)
        try:
            requests = [loop.add(id, 30, 40, max_num_drafts=num_drafts) for id in "ab"]
            break
        except RequestError:
            pass
    loop.drain()
    assert_right(loop, requests)
    seen = -(-(window + max(0, lookahead - 1) + 1 + 2 * num_drafts) // BLOCK_SIZE) + 1
    assert (num_kv_blocks - 1) * 3 < 18 + 2 * seen + 3  # 18 of the full group


@pytest.mark.parametrize(
    ("gone", "num_cached"),
    [
        ([], 32),
        ([(0, 0)], 0),
        ([(5, 0)], 20),
        ([(7, 0)], 28),
        ([(5, 1)], 32),
        ([(6, 1)], 24),
        ([(5, 1), (6, 2)], 20),
        ([(7, 2)], 28),
    ],
)
def test_a_prefix_ends_where_every_group_has_what_the_next_token_sees(gone, num_cached) -> None:
    """(place, group) of blocks that have been handed out again. A token sees 9 tokens in groups 1 and 2."""
    loop = create(9, num_kv_blocks=60, max_tokens=64)
    first = loop.add("first", 33, 1, max_num_drafts=0)
    loop.drain()
    pool = loop.scheduler.blocks
    for place, group in gone:
        block = pool.find(numbered_key(first.block_keys[place], group))
        assert block is not None
        pool._cached.move_to_end(block, last=False)
        assert pool._evict(1) == [block]
    again = loop.add("again", list(first.prompt_token_ids), 4, max_num_drafts=0)
    while again.slot is None:
        loop.scheduler.schedule()
    assert again.num_cached_tokens == num_cached


def test_what_is_far_before_the_window_is_not_looked_for() -> None:
    loop = create(9, num_kv_blocks=120, num_windowed=8, max_tokens=64)
    first = loop.add("first", 200, 1, max_num_drafts=0)
    loop.drain()
    pool, looked_for = loop.scheduler.blocks, []
    find = pool.find
    pool.find = lambda key: looked_for.append(key) or find(key)
    again = loop.add("again", [*first.prompt_token_ids, 3], 1, max_num_drafts=0)
    assert len(loop.scheduler.prefixes.find(again)) == 50 * 9
    assert len(looked_for) == 50 + 2 * 2 * 8  # two places are in the window of the next token


def test_steady_steps_release_what_steps_row_by_row_do() -> None:
    def run(*, steadily: bool) -> tuple:
        loop = create(7, run_ahead=1, num_kv_blocks=60)
        if not steadily:
            guide_all(loop)
        requests = [loop.add(id, 2 + index, 60, max_num_drafts=0) for index, id in enumerate("abc")]
        held = []
        while loop.scheduler.has_requests:
            loop.step()
            held.append((loop.scheduler.num_free_blocks, [list(r.blocks) for r in requests]))
        return held, [replace(plan, epoch=None) for plan in loop.plans]

    assert run(steadily=True) == run(steadily=False)


def test_others_hear_of_the_blocks_of_the_first_group() -> None:
    loop = create(6, num_kv_blocks=21, max_tokens=16)
    events = KVEvents(KVEventsConfig().kv_events_max_queue_size)
    loop.scheduler.prefixes.tell(events)
    for id in "abcdefgh":
        loop.add(id, 20, 20)
    loop.drain()
    told: set[bytes] = set()
    events.close()
    while (taken := events.take()) is not None:
        for event in taken:
            told = told - set(event.keys) if hasattr(event, "medium") else told | set(event.keys)
    pool = loop.scheduler.blocks
    assert told == {key for key in pool._blocks_by_key if len(key) == 32}
    assert len(pool._blocks_by_key) > len(told) > 0


def test_groups_count_what_a_request_holds() -> None:
    groups = BlockGroups(1, 5, 1024)
    assert groups.num_blocks(101) == 601
    assert groups.most_held(32768, 16, 16) == 2048 + 5 * 66
    assert groups.most_held(100, 16, 16) == 6 * 7
    assert BlockGroups.one(24).most_held(32768, 16, 16) == 4
    assert BlockGroups.one(0).most_held(33, 16, 16) == 3
