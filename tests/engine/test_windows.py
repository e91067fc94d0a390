"""KV blocks behind a sliding window are released, and that changes no answer."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scheduling import VOCAB, Loop, answer_alone

from stepgraph.engine.request import Request
from stepgraph.errors import RequestError

BLOCK_SIZE = 4


def num_held(request: Request) -> int:
    return len(request.blocks) - request.num_unseen


def most_held(loop: Loop, run) -> int:
    """Most blocks that any request holds while `run` steps the loop."""
    most = 0
    step = loop.step

    def watched() -> None:
        nonlocal most
        step()
        most = max(most, *map(num_held, loop.scheduler.running()), 0)

    loop.step = watched
    run()
    return most


def assert_right(loop: Loop, requests: list[Request]) -> None:
    assert [r.output_token_ids for r in requests] == [answer_alone(r, loop.window) for r in requests]


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize("window", [1, 3, 4, 9, 16])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_request_holds_its_window_and_what_is_under_way(window, run_ahead, prefix_caching) -> None:
    loop = Loop(window=window, run_ahead=run_ahead, max_tokens=8, num_kv_blocks=60, prefix_caching=prefix_caching)
    requests = [loop.add("a", 50, 60), loop.add("b", 3, 70)]
    in_flight = 8 + run_ahead  # a chunk of a prompt, or a token in each step
    assert most_held(loop, loop.drain) <= -(-(window + in_flight) // BLOCK_SIZE) + 1
    assert_right(loop, requests)
    loop.check_nothing_is_held()


@given(
    window=st.integers(1, 14),
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.sampled_from([0, 2, 8])),
        min_size=1,
        max_size=7,
    ),
    num_drafts=st.sampled_from([0, 0, 1, 3]),
    lookahead=st.integers(0, 2),
    run_ahead=st.integers(0, 2),
    num_kv_blocks=st.integers(12, 40),
    prefix_caching=st.booleans(),
    aborts=st.sets(st.integers(1, 40), max_size=2),
)
@example(  # it ends on the device, which the host does not know yet
    window=4,
    requests=[
        (1, 1, False, 0),
        (1, 1, False, 0),
        (1, 5, False, 0),
        (1, 4, False, 0),
        (1, 3, False, 0),
        (1, 26, True, 8),
    ],
    num_drafts=3,
    lookahead=1,
    run_ahead=2,
    num_kv_blocks=31,
    prefix_caching=False,
    aborts=set(),
)
@settings(max_examples=150)
def test_answers_are_those_of_requests_that_keep_all_blocks(
    window, requests, num_drafts, lookahead, run_ahead, num_kv_blocks, prefix_caching, aborts
) -> None:
    """Under pressure: long answers do not fit beside each other, and requests share prefixes with those that have ended."""
    loop = Loop(
        window=window,
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


def test_a_request_longer_than_the_cache_runs_if_its_window_fits() -> None:
    loop = Loop(window=9, num_kv_blocks=10, max_tokens=16)
    request = loop.add("long", 100, 100, max_num_drafts=0)
    assert most_held(loop, loop.drain) <= 9
    assert_right(loop, [request])
    with pytest.raises(RequestError, match=r"11 blocks of 4"):
        Loop(window=39, num_kv_blocks=10).add("wide", 100, 100, max_num_drafts=0)
    with pytest.raises(RequestError, match=r"50 blocks of 4"):
        Loop(num_kv_blocks=10).add("full attention", 100, 100, max_num_drafts=0)


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize(("num_drafts", "lookahead"), [(0, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("window", [1, 6, 8, 9])
def test_the_fewest_blocks_that_are_not_refused_suffice(window, num_drafts, lookahead, run_ahead) -> None:
    options = {"window": window, "num_drafts": (num_drafts,), "lookahead": lookahead, "run_ahead": run_ahead}
    for num_kv_blocks in range(2, 20):
        loop = Loop(num_kv_blocks=num_kv_blocks, accuracy=1.0, **options)
        try:
            requests = [loop.add(id, 30, 40, max_num_drafts=num_drafts) for id in "ab"]
            break
        except RequestError:
            pass
    loop.drain()
    assert_right(loop, requests)
    assert num_kv_blocks - 1 <= -(-(window + 1 + 2 * num_drafts) // BLOCK_SIZE) + 1


def test_many_long_requests_run_beside_each_other() -> None:
    """Without a window, two of them would not fit."""
    loop = Loop(window=6, num_kv_blocks=33, max_tokens=16, prefix_caching=False)
    requests = [loop.add(id, 2, 90, max_num_drafts=0) for id in "abcd"]
    for _ in range(40):
        loop.step()
    assert loop.scheduler.num_running == 4
    loop.drain()
    assert loop.scheduler.statistics.preemptions == 0
    assert_right(loop, requests)


@pytest.mark.parametrize("num_evicted", [0, 3, 6, 8])
def test_a_prefix_is_reused_if_the_blocks_are_there_that_its_next_token_sees(num_evicted) -> None:
    """Released blocks are evicted first: those behind the window, from the last one of its chain on."""
    loop = Loop(window=9, num_kv_blocks=14, max_tokens=16)
    first = loop.add("first", 33, 1, max_num_drafts=0)
    loop.drain()
    assert loop.scheduler.num_free_blocks == 13
    blocks: list[int] = []
    loop.scheduler.blocks.extend(blocks, 5 + num_evicted, 1)  # five have never held anything that can be found
    loop.scheduler.blocks.release(blocks)
    again = loop.add("again", list(first.prompt_token_ids), 4, max_num_drafts=0)
    loop.drain()
    assert again.num_cached_tokens == (32 if num_evicted <= 6 else 0)
    assert_right(loop, [first, again])


def test_early_blocks_that_are_there_do_not_help_where_later_ones_are_gone() -> None:
    loop = Loop(window=9, num_kv_blocks=40, max_tokens=64)
    first = loop.add("first", 17, 1, max_num_drafts=0)
    loop.drain()
    other = loop.add("other", [*first.prompt_token_ids, *[1] * 16], 1, max_num_drafts=0)
    loop.drain()
    assert other.num_cached_tokens == 16
    assert_right(loop, [first, other])


def test_steady_steps_release_what_steps_row_by_row_do() -> None:
    def run(*, steadily: bool) -> tuple:
        loop = Loop(window=7, run_ahead=1, num_kv_blocks=60)
        if not steadily:
            guide_all(loop)
        requests = [loop.add(id, 2 + index, 60, max_num_drafts=0) for index, id in enumerate("abc")]
        held = []
        while loop.scheduler.has_requests:
            loop.step()
            held.append((loop.scheduler.num_free_blocks, [list(r.blocks) for r in requests]))
        return held, [replace(plan, epoch=None) for plan in loop.plans]

    assert run(steadily=True) == run(steadily=False)


def guide_all(loop: Loop) -> None:
    """Let nothing be planned steadily."""
    schedule = loop.scheduler.schedule

    def row_by_row():
        loop.scheduler._steady = None
        return schedule()

    loop.scheduler.schedule = row_by_row
