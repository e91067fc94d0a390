"""The choice of a replica: bounds, affinity, memory, and what several fronts make of it."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.errors import EngineDeadError
from stepgraph.server import routing
from stepgraph.server.routing import (
    ADAPTER_TOKENS,
    MAX_EXCESS_TOKENS,
    REQUEST_TOKENS,
    TOLERANCE_TOKENS,
    LoadEstimate,
    Router,
    choose,
)

BLOCK, SPAN = 16, 64

LOADS = st.lists(st.none() | st.integers(0, 4 * MAX_EXCESS_TOKENS), min_size=1, max_size=8).filter(
    lambda loads: any(load is not None for load in loads)
)
STATES = LOADS.flatmap(
    lambda loads: st.tuples(
        st.just(loads),
        st.lists(st.integers(0, 2 * MAX_EXCESS_TOKENS), min_size=len(loads), max_size=len(loads)),
        st.binary(min_size=32, max_size=32),
    )
)


def to(router, *prompt, **options):
    return router.route(*prompt, **options).replica


def tolerance(least):
    return max(TOLERANCE_TOKENS, least // 16)


def new_router(num_replicas=2, **limits):
    return Router(num_replicas, **{"block_size": BLOCK, "num_kv_blocks": 1024, "max_adapters": 2, **limits})


def prompt(seed, length):
    return random.Random(str(seed)).choices(range(50_000), k=length)


@given(STATES)
def test_a_replica_that_is_chosen_is_up_and_within_both_bounds(state):
    loads, saved, key = state
    chosen = choose(loads, saved, key)
    assert loads[chosen] is not None
    least = min(load for load in loads if load is not None)
    assert loads[chosen] <= least + max(MAX_EXCESS_TOKENS, least // 2)
    for replica, load in enumerate(loads):
        if load == least:
            assert loads[chosen] - least <= saved[chosen] - saved[replica] + tolerance(least)


@given(STATES, st.data())
def test_a_replica_that_alone_saves_what_it_is_busier_is_chosen_whatever_the_key(state, data):
    loads, _, key = state
    holder = data.draw(st.sampled_from([replica for replica, load in enumerate(loads) if load is not None]))
    least = min(load for load in loads if load is not None)
    loads[holder] = least + data.draw(st.integers(0, max(MAX_EXCESS_TOKENS, least // 2)))
    least = min(load for load in loads if load is not None)
    saved = [0] * len(loads)
    saved[holder] = max(1, loads[holder] - least - data.draw(st.integers(0, tolerance(least))))
    assert loads[holder] > least + max(MAX_EXCESS_TOKENS, least // 2) or choose(loads, saved, key) == holder


def test_both_bounds_grow_with_the_least_load():
    least = 4 * MAX_EXCESS_TOKENS
    assert choose([least, least + least // 2], [0, 2 * least], b"") == 1
    assert choose([least, least + least // 2 + 1], [0, 2 * least], b"") == 0
    assert {choose([least, least + least // 16], [0, 0], b"%d" % key) for key in range(16)} == {0, 1}
    assert {choose([least, least + least // 16 + 1], [0, 0], b"%d" % key) for key in range(16)} == {0}


def test_without_a_replica_there_is_an_error_that_is_no_fault_of_the_request():
    with pytest.raises(EngineDeadError, match="no replica"):
        to(new_router(), [1, 2, 3], [None, None])


@given(STATES)
def test_keys_of_a_replica_that_goes_spread_and_the_others_stay(state):
    _, _, key = state
    before = choose([0] * 5, [0] * 5, key)
    for gone in range(5):
        after = choose([None if replica == gone else 0 for replica in range(5)], [0] * 5, key)
        assert after == before or gone == before


def test_the_same_prefix_goes_to_the_same_replica_until_the_bound():
    router = new_router()
    shared = prompt(0, 1024)
    first = to(router, shared + prompt(0, 64), [0, 0])
    loads = [0, 0]
    for excess in range(0, 1024 + TOLERANCE_TOKENS + 1, BLOCK):
        loads[first] = excess
        assert to(router, shared + prompt(2 + excess, 64), loads) == first
    loads[first] = 1024 + TOLERANCE_TOKENS + 1
    assert to(router, shared + prompt(1, 64), loads) == 1 - first


def test_a_prefix_that_saves_much_does_not_outweigh_the_bound_on_the_imbalance():
    router = new_router(num_kv_blocks=8192)
    long = prompt(0, 4 * MAX_EXCESS_TOKENS)
    first = to(router, long, [0, 0])
    loads = [0, 0]
    loads[first] = MAX_EXCESS_TOKENS
    assert to(router, long, loads) == first
    loads[first] += 1
    assert to(router, long, loads) == 1 - first


def test_fronts_that_know_nothing_of_each_other_send_new_prefixes_to_the_same_replica():
    fronts = [new_router(4) for _ in range(3)]
    loads = random.Random(0)
    homes = Counter()
    for system in range(40):
        shared = prompt(f"system {system}", 200)
        chosen = set()
        for number, front in enumerate(fronts):
            seen = [1000 + loads.randrange(TOLERANCE_TOKENS) for _ in range(4)]
            chosen.add(to(front, shared + prompt((system, number), 100), seen))
        assert len(chosen) == 1, system
        homes.update(chosen)
    assert set(homes) == {0, 1, 2, 3}


def test_new_prompts_after_a_beginning_that_all_replicas_have_are_spread():
    router = new_router()
    template = prompt("template", SPAN)
    for loads in ([0, 10_000], [10_000, 0]):
        to(router, template + prompt("first", 100), loads)
    chosen = Counter(to(router, template + prompt(seed, 100), [0, 0]) for seed in range(64))
    assert min(chosen[0], chosen[1]) > 16


def test_prompts_shorter_than_a_span_are_spread_too():
    router = new_router()
    assert {to(router, [token], [0, 0]) for token in range(16)} == {0, 1}


@pytest.mark.parametrize("other", [{"salt": "b"}, {"adapter": "/a"}, {"salt": "a", "adapter": "/a"}, {}])
def test_prompts_of_another_salt_or_adapter_save_nothing(other):
    router = new_router()
    text = prompt(0, 4096)
    first = to(router, text, [0, 0], salt="a")
    loads = [0, 0]
    loads[first] = TOLERANCE_TOKENS + 1
    assert to(router, text, loads, salt="a") == first
    assert to(router, text, loads, **other) != first


def test_an_adapter_stays_where_it_was_read_until_others_displace_it():
    router = new_router(num_kv_blocks=0)
    first = to(router, prompt(0, 50), [0, 0], adapter="/adapters/a")
    busy = [0, 0]
    busy[first] = ADAPTER_TOKENS
    assert to(router, prompt(1, 50), busy, adapter="/adapters/a") == first
    assert to(router, prompt(1, 50), busy) == 1 - first
    only = [None, None]
    only[first] = 0
    for other in ("/adapters/b", "/adapters/c"):
        to(router, prompt(2, 50), only, adapter=other)
    assert to(router, prompt(3, 50), busy, adapter="/adapters/a") == 1 - first


def test_fronts_read_an_adapter_into_the_same_replica():
    for name in "abcdefgh":
        routes = {to(new_router(4), prompt(seed, 200), [0] * 4, adapter=name) for seed in range(4)}
        assert len(routes) == 1, name


def test_requests_of_a_session_meet_though_their_prompts_differ_from_the_first_token_on():
    for name in "abcdefgh":
        assert len({to(new_router(4), prompt(seed, 200), [0] * 4, session=name) for seed in range(4)}) == 1, name
    assert {to(new_router(4), [1], [0] * 4, session=name) for name in "abcdefghijklmnop"} == {0, 1, 2, 3}


def test_memory_is_bounded_and_the_ends_of_old_prompts_go_first(monkeypatch):
    monkeypatch.setattr(routing, "MAX_SPANS", 100)
    router = new_router(1, num_kv_blocks=2**20)
    shared = prompt("shared", 40 * SPAN)
    for seed in range(50):
        to(router, shared + prompt(seed, 30 * SPAN), [0])
        to(router, prompt(("lone", seed), 300 * SPAN), [0])
        to(router, shared, [0])
    (held,) = router._prefixes
    assert len(held._keys) == 100
    keys, _ = router._keys(shared, None)
    assert held.prefix_len(keys) == 40


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 12)), max_size=60), st.integers(0, 9))
def test_whatever_was_sent_a_block_is_held_with_all_before_it(sent, capacity):
    """Which the search by halves relies on."""
    router = new_router(1, num_kv_blocks=capacity * SPAN // BLOCK)
    stems = [prompt(stem, 6 * SPAN) for stem in range(4)]
    chains = []
    for stem, branch, length in sent:
        text = (stems[stem][: 3 * SPAN] + stems[branch])[: length * SPAN]
        to(router, text, [0])
        chains.append(router._keys(text, None)[0])
    (held,) = router._prefixes
    assert len(held._keys) <= capacity
    for chain in chains:
        here = [key in held._keys for key in chain]
        assert here == sorted(here, reverse=True)
        assert held.prefix_len(chain) == sum(here)


def test_a_replica_started_anew_has_nothing():
    router = new_router()
    text = prompt(0, 8192)
    first = to(router, text, [0, 0], adapter="/a")
    loads = [0, 0]
    loads[first] = TOLERANCE_TOKENS + 1
    assert to(router, text, loads, adapter="/a") == first
    router.forget(first)
    assert to(router, text, loads, adapter="/a") != first


@pytest.mark.parametrize("token_ids", [[2**64], [7] * 200 + [-(2**70)], [-1], []])
def test_prompts_that_the_engine_will_refuse_go_somewhere(token_ids):
    assert to(new_router(), token_ids, [None, 0]) == 1


def test_longer_kv_blocks_are_compared_as_wholes():
    router = new_router(block_size=256)
    text = prompt(0, 256)
    first = to(router, text, [0, 0])
    loads = [0, 0]
    loads[first] = TOLERANCE_TOKENS + 64
    assert to(router, [*text[:255], 7, 7], loads) != first
    router = new_router(block_size=256)
    to(router, text, [None if replica != first else 0 for replica in range(2)])
    assert to(router, [*text, 7, 7], loads) == first


def test_a_load_is_what_the_report_counts_and_what_it_cannot_count_yet():
    load = LoadEstimate()
    load.reported(3)
    assert load.tokens == 3 * REQUEST_TOKENS
    load.sent("a", 2, 100)
    load.sent("b", 1, 10)
    assert load.tokens == 6 * REQUEST_TOKENS + 110
    load.accepted("a")
    assert load.tokens == 6 * REQUEST_TOKENS + 110
    load.reported(5)  # counts a, cannot count b
    assert load.tokens == 6 * REQUEST_TOKENS + 110
    load.began("a")
    load.began("a")
    assert load.tokens == 6 * REQUEST_TOKENS + 10
    load.ended("a")
    load.reported(3)
    assert load.tokens == 4 * REQUEST_TOKENS + 10
    load.ended("b")  # refused
    load.ended("b")
    assert load.tokens == 3 * REQUEST_TOKENS


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["sent", "accepted", "began", "ended", "reported"])), max_size=80
    )
)
def test_a_load_that_all_has_ended_of_is_none(events):
    load, stage, counted = LoadEstimate(), {}, {}
    order = ["sent", "accepted", "began"]
    for number, event in events:
        group = str(number)
        if event == "reported":
            load.reported(sum(counts for counts in counted.values()))
        elif event == "ended":
            load.ended(group)
            stage.pop(group, None)
            counted.pop(group, None)
        elif stage.get(group) == (order.index(event) - 1 if event != "sent" else None):
            stage[group] = order.index(event)
            if event == "sent":
                load.sent(group, 1 + number, 7 * number)
            elif event == "accepted":
                load.accepted(group)
                counted[group] = 1 + number
            else:
                load.began(group)
        unfinished = sum(1 + int(group) for group in stage)
        assert load.tokens >= REQUEST_TOKENS * unfinished
    for group in list(stage):
        load.ended(group)
    load.reported(0)
    assert load.tokens == 0
