"""What one engine has computed of a prompt, another goes on from: what both do of it, over transfers in plain Python."""

import random

import pytest
from fake_transfers import LEASE_S, Connected, FakeTransfers, run
from scheduling import VOCAB, Loop, answer_alone

from stepgraph.engine import exchange
from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.sink import FetchReport
from stepgraph.errors import ConfigError, RequestError
from stepgraph.transfer.base import FetchFailure, FetchState
from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.messages import Lost, Message
from stepgraph.transfer.reference import Offer, Reference, read_params


def pair(**options) -> tuple[Connected, Connected]:
    network: dict[str, FakeTransfers] = {}
    options = {"num_kv_blocks": 65} | options
    return Connected("source", network, "prefill", **options), Connected("sink", network, "decode", **options)


@pytest.mark.parametrize(
    ("transfer", "role"), [(Offer(), "prefill"), (Reference("engine", "/tmp/socket", 0, "lease"), "decode")]
)
def test_an_engine_that_does_all_of_a_request_refuses_a_part_of_one_and_says_which_do(transfer, role) -> None:
    loop = Loop()
    with pytest.raises(RequestError, match=f"--splitwise-role {role}"):
        loop.engine.add_request("a", [1, 2, 3], SamplingParams(), transfer=transfer)
    loop.check_nothing_is_held()


@pytest.mark.parametrize("options", [{}, {"run_ahead": 2}, {"num_drafts": (2, 0, 3), "lookahead": 2}, {"window": 9}])
@pytest.mark.parametrize("prompt_len", [1, 4, 5, 8, 9, 33, 70])
def test_a_sink_goes_on_behind_all_full_blocks_whether_it_asks_at_once_or_with_the_answers_reference(
    options, prompt_len
) -> None:
    for at_once in (False, True):
        source, sink = pair(**options)
        first = source.add("a", prompt_len, 1, transfer=Offer("lease" if at_once else None))
        if not at_once:
            run_until_answered(source, first)
        reference = source.transfers.reference("lease") if at_once else read_params(first.kv_transfer_params)
        second = sink.add("a", prompt_len, 9, transfer=reference)
        run(source, sink)
        assert second.output_token_ids == answer_alone(second, sink.window)
        num_full = (prompt_len - max(1, sink.lookahead)) // 4
        assert second.num_cached_tokens == 4 * max(0, num_full)
        assert sink.sink.recomputed_tokens == 0
        source.check_nothing_is_left()
        sink.check_nothing_is_left()


def run_until_answered(source: Connected, *requests: Request) -> None:
    while any(request.finish_reason is None for request in requests):
        source.step()


def check_answers(*requests: Request) -> None:
    assert [r.output_token_ids for r in requests] == [answer_alone(r) for r in requests]


def check_nothing_is_left(*loops: Connected) -> None:
    run(*loops)
    for loop in loops:
        loop.check_nothing_is_left()
        loop.check_nothing_is_held()


# The source


def test_a_lease_grows_with_each_step_and_is_complete_when_the_results_have_been_read() -> None:
    source, _ = pair(max_tokens=8, run_ahead=1)
    messages: list[Message] = []
    request = source.add("a", 21, 1, transfer=Offer("lease"))
    source.transfers.leases.read("lease", messages.append)
    seen = []
    while request.finish_reason is None:
        source.step()
        seen.append([type(message).__name__ for message in messages])
    assert seen == [["Filled"], ["Filled"] * 2, ["Filled"] * 3, ["Filled"] * 3 + ["Complete"]]
    filled = messages[:-1]
    assert [message.start for message in filled] == [0, 2, 4]
    assert [message.step for message in filled] == [0, 1, 2]
    assert [bytes.fromhex(key) for message in filled for key in message.keys] == request.block_keys[:5]
    assert messages[-1].num_blocks == 5
    assert read_params(request.kv_transfer_params) == source.transfers.reference("lease")


def test_blocks_found_in_the_cache_are_leased_as_if_this_step_filled_them() -> None:
    source, _ = pair(max_tokens=8)
    source.add("before", list(range(1, 9)), 1)
    source.drain()
    messages: list[Message] = []
    request = source.add("a", [*range(1, 9), 3, 3, 3, 3, 3], 1, transfer=Offer("lease"))
    source.transfers.leases.read("lease", messages.append)
    source.drain()
    assert request.num_cached_tokens == 8
    assert [(message.start, len(message.blocks), message.step) for message in messages[:-1]] == [(0, 3, 1)]
    assert source.transfers.leases.confirm("lease", 3) is None
    check_nothing_is_left(source)


def test_a_preempted_prompt_goes_on_behind_what_it_has_leased() -> None:
    source, _ = pair(max_tokens=8)
    messages: list[Message] = []
    request = source.add("a", 30, 1, transfer=Offer("lease"))
    source.transfers.leases.read("lease", messages.append)
    source.step()
    source.step()
    source.scheduler._preempt(request)
    source.drain()
    assert request.num_preemptions == 1
    assert [index for m in messages[:-1] for index in range(m.start, m.start + len(m.blocks))] == list(range(7))
    assert [bytes.fromhex(key) for m in messages[:-1] for key in m.keys] == request.block_keys[:7]
    assert source.transfers.leases.confirm("lease", 7) is None
    check_nothing_is_left(source)


@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_aborted_prompt_gives_all_of_its_blocks_back(when) -> None:
    source, _ = pair(max_tokens=8)
    messages: list[Message] = []
    source.add("a", 30, 1, transfer=Offer("lease"))
    source.transfers.leases.read("lease", messages.append)
    for _ in range(when):
        source.step()
    source.engine.abort("a")
    assert messages[-1] == Lost("lease", LossReason.CANCELLED)
    check_nothing_is_left(source)


def test_a_lease_that_nobody_renews_expires_without_traffic() -> None:
    source, _ = pair()
    source.add("a", 30, 1, transfer=Offer())
    source.drain()
    assert source.scheduler.num_free_blocks == 64 - 7
    assert not source.engine.has_work
    assert source.engine.seconds_until_work < LEASE_S
    check_nothing_is_left(source)
    assert source.transfers.leases.ended == {LossReason.EXPIRED: 1}


def test_blocks_of_a_lease_that_is_over_can_be_forgotten_at_once() -> None:
    source, _ = pair()
    source.add("a", 30, 1, transfer=Offer("lease"))
    source.drain()
    assert source.engine.reset_prefix_cache() == 7
    source.transfers.leases.read("lease", lambda message: None)
    assert source.transfers.leases.confirm("lease", 7) is None
    assert source.engine.reset_prefix_cache() == 0
    check_nothing_is_left(source)


def test_what_the_cache_has_lost_is_lost_to_those_who_read_it() -> None:
    source, _ = pair(max_tokens=8)
    messages: dict[str, list[Message]] = {"growing": [], "complete": []}
    source.add("complete", 9, 1, transfer=Offer("complete"))
    source.drain()
    growing = source.add("growing", 30, 1, transfer=Offer("growing"))
    for name, received in messages.items():
        source.transfers.leases.read(name, received.append)
    source.step()
    source.engine.reset_prefix_cache(preempt=True)
    assert [received[-1] for received in messages.values()] == [Lost(name, LossReason.CACHE_LOST) for name in messages]
    assert source.scheduler.num_free_blocks == 64
    source.drain()
    check_answers(growing)
    assert read_params(growing.kv_transfer_params) is None
    check_nothing_is_left(source)


def test_leases_never_hold_more_than_their_share_and_the_others_are_computed_all_the_same() -> None:
    source, _ = pair()
    requests = [source.add(f"{i}", 33, 1, transfer=Offer(f"{i}")) for i in range(6)]
    source.drain()
    check_answers(*requests)
    given = [read_params(request.kv_transfer_params) is not None for request in requests]
    assert given == [True] * 4 + [False] * 2  # of eight blocks each, and half of 64 may be leased
    assert source.transfers.leases.confirm("5", 0) is LossReason.CANCELLED
    check_nothing_is_left(source)


def test_a_lease_that_is_dropped_before_it_has_a_block_leaves_its_prompt_to_itself() -> None:
    source, _ = pair(max_tokens=8)
    request = source.add("a", 30, 1, transfer=Offer("lease"))
    source.transfers.leases.drop("lease")
    source.step()
    other = source.add("b", 30, 1, transfer=Offer("other"))
    source.drain()
    check_answers(request, other)
    assert source.transfers.leases.confirm("other", 7) is None
    check_nothing_is_left(source)


def test_a_name_of_a_lease_that_was_used_is_refused_and_leaves_nothing() -> None:
    source, _ = pair()
    source.add("a", 9, 1, transfer=Offer("lease"))
    with pytest.raises(RequestError, match="remote_request_id='lease'"):
        source.add("b", 9, 1, transfer=Offer("lease"))
    source.drain()
    assert not source.scheduler.has("b")
    check_nothing_is_left(source)


# The sink


def offered(source: Connected, id: str = "a", prompt_len: int = 33, **options) -> Reference:
    """Of a prompt that the source has computed."""
    request = source.add(id, prompt_len, 1, transfer=Offer(), **options)
    run_until_answered(source, request)
    reference = read_params(request.kv_transfer_params)
    assert isinstance(reference, Reference)
    return reference


def test_a_reference_to_a_place_that_nothing_is_taken_from_is_refused_and_leaves_nothing() -> None:
    _, sink = pair()
    with pytest.raises(RequestError, match="not from there"):
        sink.add("a", 9, 1, transfer=Reference("engine", "/tmp/forbidden", 0, "lease"))
    check_nothing_is_left(sink)


def test_bytes_wait_for_the_results_of_steps_that_may_read_what_their_blocks_held() -> None:
    source, sink = pair(run_ahead=2)
    reference = offered(source)
    other = sink.add("other", 5, 30)
    for _ in range(4):
        sink.step()
    before = len(sink.plans)
    request = sink.add("a", 33, 5, transfer=reference)
    while not sink.transfers.fetches:
        sink.step()
    assert len(sink.plans) - len(sink.in_flight) >= before
    run(source, sink)
    check_answers(other, request)
    check_nothing_is_left(source, sink)


def test_a_fetch_that_fails_is_computed_here_and_what_comes_late_harms_nobody() -> None:
    source, sink = pair(num_kv_blocks=17)
    request = sink.add("a", 33, 5, transfer=Reference("gone", "/tmp/gone", 0, "lease"))
    sink.drain()
    check_answers(request)
    assert sink.transfers.failures == {FetchFailure.STALE: 1}
    assert sink.sink.recomputed_tokens == 32
    held = sink.add("b", 30, 5, transfer=offered(source, "b", 30))
    sink.step()
    [fetch] = sink.transfers.fetches[1:]
    source.engine.reset_prefix_cache(preempt=True)
    fetch.messages[:] = fetch.messages[-1:]
    fetch.advance()
    for _ in range(60):  # the fetch may still write seven blocks
        sink.step()
    assert sink.scheduler.blocks.num_quarantined == 7
    others = [sink.add(f"{i}", 20, 4) for i in range(4)]
    sink.drain()
    fetch.advance()
    check_answers(held, *others)
    assert sink.transfers.failures[LossReason.CACHE_LOST] == 1
    check_nothing_is_left(source, sink)


def test_a_request_fails_where_that_is_wanted_and_says_why() -> None:
    network: dict[str, FakeTransfers] = {}
    sink = Connected("sink", network, "decode", fails=True)
    request = sink.add("a", 33, 5, transfer=Reference("gone", "/tmp/gone", 0, "lease"))
    sink.drain()
    assert request.finish_reason is FinishReason.ERROR
    assert "stale" in str(request.error)
    assert "--kv-load-failure recompute" in str(request.error)
    check_nothing_is_left(sink)


def test_a_request_fails_where_that_is_wanted_for_what_is_missing_or_has_no_room() -> None:
    source, sink = pair(fails=True, num_kv_blocks=33)
    prompt = [3] * 41
    short = sink.add("short", prompt, 5, transfer=offered(source, "short", prompt[:17]))
    run(source, sink)
    hog = sink.add("hog", 5, 120)
    for _ in range(90):
        sink.step()
    late = sink.add("late", 40, 5, transfer=offered(source, "late", 40))
    sink.clock.now += 31
    run(source, sink)
    check_answers(hog)
    for request, reason in ((short, "short"), (late, "no_blocks")):
        assert request.finish_reason is FinishReason.ERROR
        assert reason in str(request.error)
    assert sink.sink.failures == {"short": 1, "no_blocks": 1}
    check_nothing_is_left(source, sink)


def test_blocks_of_another_prompt_are_never_found() -> None:
    source, sink = pair()
    reference = offered(source, salt="theirs")
    request = sink.add("a", 33, 5, transfer=reference, salt="ours")
    reports: list[FetchReport] = []
    sink.sink.on_end = reports.append
    run(source, sink)
    check_answers(request)
    assert sink.transfers.failures == {FetchFailure.OTHER_BLOCKS: 1}
    assert [(report.num_blocks, report.reason) for report in reports] == [(0, "other_blocks")]
    check_nothing_is_left(source, sink)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_aborted_request_gives_its_lease_and_blocks_up(steps) -> None:
    source, sink = pair()
    sink.add("a", 33, 5, transfer=offered(source))
    for _ in range(steps):
        sink.step()
    sink.engine.abort("a")
    assert sink.scheduler.blocks.num_quarantined == (8 if steps else 0)
    assert source.transfers.leases.ended == {LossReason.DROPPED: 1}
    check_nothing_is_left(source, sink)


def test_a_lease_of_which_nothing_is_needed_ends_once_nobody_waits_for_it() -> None:
    source, sink = pair()
    prompt, other = list(range(1, 34)), [3] * 33
    sink.add("before", prompt, 1)
    sink.drain()
    request = sink.add("a", prompt, 5, transfer=offered(source, "a", prompt))
    sink.step()
    assert source.transfers.leases.ended == {LossReason.DROPPED: 1}
    others = [
        sink.add(f"{i}", other, 5, seed=i, transfer=reference)
        for i, reference in enumerate([offered(source, "b", other)] * 2)
    ]
    sink.engine.abort("0")
    assert source.transfers.leases.ended == {LossReason.DROPPED: 1}
    run(source, sink)
    check_answers(request, others[1])
    assert not sink.transfers.failures
    assert source.transfers.leases.ended == {LossReason.DROPPED: 1, LossReason.CONFIRMED: 1}
    check_nothing_is_left(source, sink)


def test_what_is_on_its_way_is_given_up_when_the_cache_is_lost_and_what_is_queued_comes_later() -> None:
    source, sink = pair(max_num_seqs=1)
    references = {id: offered(source, id) for id in "ab"}
    requests = [sink.add(id, 33, 5, transfer=reference) for id, reference in references.items()]
    sink.step()
    sink.engine.reset_prefix_cache(preempt=True)
    run(source, sink)
    check_answers(*requests)
    assert [request.num_cached_tokens for request in requests] == [0, 32]
    check_nothing_is_left(source, sink)


def test_only_what_is_not_here_is_fetched_and_several_requests_of_one_lease_share_it() -> None:
    source, sink = pair()
    sink.add("before", list(range(1, 9)), 1)
    sink.drain()
    prompt = [*range(1, 9), *[3] * 20]
    reference = offered(source, "a", prompt)
    requests = [sink.add(f"{i}", prompt, 5, seed=i, transfer=reference) for i in range(3)]
    run(source, sink)
    check_answers(*requests)
    assert [(fetch.first, len(fetch.blocks)) for fetch in sink.transfers.fetches] == [(2, 4)]
    assert [request.num_cached_tokens for request in requests] == [24] * 3
    assert sink.sink.recomputed_tokens == 0
    check_nothing_is_left(source, sink)


def test_fetches_begin_as_slots_and_blocks_allow_and_leases_of_the_others_are_renewed() -> None:
    source, sink = pair(max_num_seqs=2)
    ids = "abcd"
    references = [offered(source, id, 29) for id in ids]
    requests = [sink.add(id, 29, 40, transfer=reference) for id, reference in zip(ids, references, strict=True)]
    sink.step()
    assert len(sink.transfers.fetches) == 2
    assert sink.transfers.renewed == references[2:]
    source.clock.now += 0.6 * LEASE_S
    sink.step()
    source.clock.now += 0.6 * LEASE_S
    run(source, sink)
    check_answers(*requests)
    assert [request.num_cached_tokens for request in requests] == [28] * 4
    check_nothing_is_left(source, sink)


def test_a_prompt_for_whose_blocks_there_is_no_room_for_long_is_computed_here() -> None:
    source, sink = pair(num_kv_blocks=33)
    hog = sink.add("hog", 5, 120)
    for _ in range(90):
        sink.step()
    request = sink.add("a", 40, 5, transfer=offered(source, "a", 40))
    assert not sink.transfers.fetches
    sink.clock.now += 31
    for _ in range(3):
        sink.step()
    assert sink.sink.failures == {"no_blocks": 1}
    assert source.transfers.leases.ended == {LossReason.DROPPED: 1}
    sink.drain()
    check_answers(hog, request)
    check_nothing_is_left(source, sink)


def test_prompt_logprobs_are_computed_where_they_are_asked_for() -> None:
    source, sink = pair()
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    source.transfers.leases.open("lease")
    sink.engine.add_request("a", list(range(1, 9)), params, transfer=source.transfers.reference("lease"))
    assert sink.sink.failures == {"prompt_logprobs": 1}
    assert source.transfers.leases.ended == {LossReason.DROPPED: 1}
    sink.engine.abort("a")
    check_nothing_is_left(sink)


def test_an_engine_that_rests_has_no_fetch_and_waits_for_those_who_may_write() -> None:
    source, sink = pair()
    sink.add("a", 33, 5, transfer=offered(source))
    sink.step()
    sink.engine.exchange.lost()
    sink.scheduler.preempt_all()
    [fetch] = sink.transfers.fetches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_PATIENCE_S", 0.01)
        with pytest.raises(ConfigError, match="8 KV blocks may still be"):
            sink.engine.exchange.rest()
    assert not sink.transfers.is_resting
    fetch.advance()
    sink.engine.exchange.rest()
    assert sink.transfers.is_resting
    sink.engine.exchange.go_on()
    check_nothing_is_left(source, sink)
    sink.engine.shutdown()
    assert sink.transfers.is_closed


# Anything


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_answers_are_right_and_nothing_is_left(seed) -> None:
    chance = random.Random(seed)
    options = {
        "max_num_seqs": 3,
        "num_kv_blocks": chance.choice([33, 49]),
        "run_ahead": chance.randrange(3),
        **chance.choice([{}, {"num_drafts": (2, 0, 3), "lookahead": 2}, {"window": 9}]),
    }
    network: dict[str, FakeTransfers] = {}
    source = Connected("source", network, "prefill", **options | {"num_kv_blocks": 97})
    other = Connected("other", network, **options)
    sink = Connected("sink", network, "decode", **options)
    answered: list[tuple[Loop, Request]] = []
    alive: list[tuple[Connected, str]] = []
    for number in range(60):
        for _ in range(chance.randrange(4)):
            for loop in (source, other, sink):
                if loop.engine.has_work and chance.random() < 0.8:
                    loop.step()
                loop.advance(lambda: chance.random() < 0.3)
        event = chance.random()
        if event < 0.75:
            id, where = f"{number}", chance.choice([source, source, other])
            prompt = [chance.randrange(1, VOCAB) for _ in range(chance.choice([3, 9, 30]))]
            if chance.random() < 0.4:
                prompt = [*([1, 2, 3] * 7), *prompt]
            where.add(id, prompt, 1, transfer=Offer(id))
            alive.append((where, id))
            lease = chance.choice([id, id, id, id, "never", str(chance.randrange(1 + number))])
            reference = where.transfers.reference(lease)
            if chance.random() < 0.1:
                reference = Reference("restarted", "/tmp/restarted", 0, lease)
            request = sink.add(id, prompt, chance.randrange(1, 20), seed=number, transfer=reference)
            answered.append((sink, request))
            alive.append((sink, id))
        elif event < 0.85 and alive:
            loop, id = chance.choice(alive)
            loop.engine.abort(id)
        elif event < 0.92:
            chance.choice([source, other, sink]).engine.reset_prefix_cache(preempt=True)
        else:
            chance.choice([source, other, sink]).clock.now += chance.choice([0.1, LEASE_S, 2 * LEASE_S])
    run(source, other, sink, chance=lambda: chance.random() < 0.3)
    for loop, request in answered:
        expected = answer_alone(request, loop.window)
        ended = request.finish_reason is not FinishReason.ABORT
        assert request.output_token_ids == (expected if ended else expected[: len(request.output_token_ids)])
    assert sum(request.num_cached_tokens for _, request in answered) > 0
    assert set(sink.transfers.failures) & set(LossReason)
    assert sum(fetch.state is FetchState.DONE for fetch in sink.transfers.fetches) > 3
    check_nothing_is_left(source, other, sink)
