"""The scheduler against a device in plain Python that computes tokens from the KV entries it is given."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import STOP, VOCAB, Loop, answer_alone, tokens_of

from stepgraph.engine.request import FinishReason, Request
from stepgraph.errors import RequestError
from stepgraph.step.plan import StepKind


class Life(RuleBasedStateMachine):
    """Random arrivals, forks, aborts and preemptions, under any limits; every answer is the one its request gets alone.

    Few different tokens and prompts that extend each other make prefix hits the rule, and little memory preemptions.
    """

    @initialize(
        max_num_seqs=st.integers(1, 5),
        spare_tokens=st.integers(0, 20),
        num_kv_blocks=st.integers(18, 60),
        block_size=st.sampled_from([4, 8]),
        run_ahead=st.integers(0, 2),
        prefix_caching=st.booleans(),
        captured=st.sampled_from([None, (1, 2, 4, 8, 16, 32)]),
        partial=st.integers(1, 4),
        long_partial=st.integers(1, 9),
        threshold=st.integers(0, 50),
        policy=st.sampled_from(["dynamic", "gather"]),
        gather_size=st.integers(1, 9),
        gather_ms=st.integers(0, 8),
        pure_steps=st.booleans(),
        num_drafts=st.just([0]) | st.lists(st.integers(0, 8), min_size=1, max_size=4),
        lookahead=st.integers(0, 2),
        accuracy=st.sampled_from([0.0, 0.7, 1.0]),
    )
    def start(
        self,
        max_num_seqs,
        spare_tokens,
        captured,
        partial,
        long_partial,
        threshold,
        policy,
        gather_size,
        gather_ms,
        **rest,
    ) -> None:
        self.loop = Loop(
            max_num_seqs=max_num_seqs,
            max_tokens=max_num_seqs + spare_tokens,
            token_sizes=captured
            and (*(size for size in captured if size < max_num_seqs + spare_tokens), max_num_seqs + spare_tokens),
            max_num_partial_prefills=partial,
            max_long_partial_prefills=long_partial,
            long_prefill_token_threshold=threshold,
            insertion_policy=policy,
            prefill_gather_size=gather_size,
            prefill_gather_ms=gather_ms,
            **rest,
        )
        self.requests: list[Request] = []
        self.aborted: set[str] = set()

    @rule(
        stem=st.sampled_from([0, 1]),
        prompt_len=st.integers(1, 45) | st.sampled_from([8, 16, 32]),
        max_tokens=st.integers(1, 20),
        stop=st.booleans(),
        seeds=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "a"]),
        max_num_drafts=st.sampled_from([0, 2, 8, 8]),
    )
    def arrive(self, stem, prompt_len, max_tokens, stop, seeds, priority, salt, max_num_drafts) -> None:
        prompt = [(5 * i * i + stem) % VOCAB for i in range(prompt_len)]
        for seed in seeds:  # several: the answers to one prompt
            self.requests.append(
                self.loop.add(
                    f"r{len(self.requests)}",
                    prompt,
                    max_tokens,
                    stop=stop,
                    seed=seed,
                    priority=priority,
                    salt=salt,
                    max_num_drafts=max_num_drafts,
                )
            )

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data) -> None:
        request = data.draw(st.sampled_from(self.requests))
        had_ended = request.finish_reason is not None
        update = self.loop.scheduler.abort(request.id)
        assert (update is None) == had_ended
        if update is not None:
            assert (update.request, update.finish_reason) == (request, FinishReason.ABORT)
            self.aborted.add(request.id)

    @rule(count=st.integers(1, 12))
    def run(self, count) -> None:
        for _ in range(count):
            self.loop.step()

    @precondition(lambda self: not self.loop.in_flight)
    @rule()
    def lose_the_cache(self) -> None:
        self.loop.scheduler.preempt_all()
        self.loop.device.forget()

    @rule()
    def forget_what_nobody_holds(self) -> None:
        kept = self.loop.scheduler.forget_free()
        assert kept == 0 or self.loop.scheduler.num_running

    @invariant()
    def tokens_so_far_are_right(self) -> None:
        for request in getattr(self, "requests", ()):
            expected = answer_alone(request)
            assert request.output_token_ids == expected[: len(request.output_token_ids)]

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.loop.drain()
        for request in self.requests:
            tokens = request.output_token_ids
            assert [t for u in self.loop.updates if u.request is request for t in u.new_token_ids] == tokens
            if request.id in self.aborted:
                assert request.finish_reason is FinishReason.ABORT
                continue
            assert tokens == answer_alone(request)
            stopped = bool(request.sampling.stop_token_ids) and tokens[-1] == STOP
            assert request.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert request.stop_token == (STOP if stopped else None)
        self.loop.check_nothing_is_held()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=90, stateful_step_count=25)


def test_a_prompt_longer_than_a_step_is_cut_and_several_prompts_share_a_step() -> None:
    loop = Loop(max_tokens=16)
    loop.add("long", 37, 2)
    loop.add("short", 6, 4)
    loop.drain()
    assert tokens_of(loop.plans[:4]) == [[16], [16], [5, 6], [1, 1]]
    assert [plan.kind for plan in loop.plans[:4]] == [StepKind.PREFILL] * 3 + [StepKind.DECODE]


def test_every_decode_gets_its_token_and_prompts_fill_what_is_left_of_the_step() -> None:
    loop = Loop(max_tokens=16)
    loop.add("running", 3, 20)
    loop.step()
    loop.add("long", 40, 2)
    for _ in range(2):
        loop.step()
    assert tokens_of(loop.plans[1:]) == [[15, 1], [15, 1]]
    assert loop.plans[1].kind is StepKind.MIXED


# KV blocks


def test_a_prompt_that_starts_like_an_earlier_one_computes_only_the_rest() -> None:
    loop = Loop(max_tokens=64, block_size=4)
    loop.add("a", [*range(10), 1, 2], 3)
    loop.drain()
    same, longer, other = (
        loop.add(id, prompt, 3)
        for id, prompt in [
            ("same", [*range(10), 1, 2]),
            ("longer", [*range(10), 1, 2, 3, 4]),
            ("other", [9, *range(1, 12)]),
        ]
    )
    loop.step()
    assert [same.num_cached_tokens, longer.num_cached_tokens, other.num_cached_tokens] == [8, 12, 0]
    assert tokens_of(loop.plans[-1:]) == [[4, 2, 12]]  # the last token of a prompt is computed in any case
    loop.drain()
    for request in (same, longer, other):
        assert request.output_token_ids == answer_alone(request)
    assert loop.scheduler.statistics.cached_prompt_tokens == 20
    assert loop.scheduler.statistics.prompt_tokens == 12 + 12 + 14 + 12


def test_several_answers_to_one_prompt_share_it_within_one_step() -> None:
    loop = Loop(max_tokens=64, block_size=4)
    requests = [loop.add(f"r{seed}", list(range(10)), 4, seed=seed) for seed in range(4)]
    loop.step()
    assert tokens_of(loop.plans) == [[10, 2, 2, 2]]
    assert [request.num_cached_tokens for request in requests] == [0, 8, 8, 8]
    loop.drain()
    assert [request.output_token_ids for request in requests] == [answer_alone(request) for request in requests]
    assert len({tuple(request.output_token_ids) for request in requests}) > 1


def test_answers_are_found_as_prefixes_of_later_prompts() -> None:
    loop = Loop(max_tokens=64, block_size=4)
    first = loop.add("turn 1", list(range(6)), 8)
    loop.drain()
    second = loop.add("turn 2", [*range(6), *first.output_token_ids, 1, 2], 4)
    loop.drain()
    assert second.num_cached_tokens == 12  # of the 14 tokens of turn 1, the last was never computed
    assert second.output_token_ids == answer_alone(second)


def test_prefixes_are_not_shared_between_salts_nor_without_prefix_caching() -> None:
    loop = Loop(max_tokens=64)
    for id, salt in [("a", None), ("b", "x"), ("c", "y"), ("d", "x")]:
        loop.add(id, list(range(9)), 2, salt=salt)
        loop.drain()
    assert loop.scheduler.statistics.cached_prompt_tokens == 8  # d's, from b
    loop = Loop(max_tokens=64, prefix_caching=False)
    for id in "ab":
        loop.add(id, list(range(9)), 2)
        loop.drain()
    assert loop.scheduler.statistics.cached_prompt_tokens == 0


def test_the_prefix_used_longest_ago_makes_room_first() -> None:
    loop = Loop(max_tokens=64, block_size=4, num_kv_blocks=9)  # 8 blocks
    for id, stem in [("a", 1), ("b", 2), ("a again", 1)]:
        loop.add(id, [stem] * 9, 2)
        loop.drain()
    loop.add("large", [3] * 16, 2)  # takes what a and b leave free: 3 blocks, 2 of them b's partly filled ones
    loop.drain()
    a, b = loop.add("a at last", [1] * 9, 2), loop.add("b at last", [2] * 9, 2)
    loop.drain()
    assert a.num_cached_tokens == 8
    assert b.num_cached_tokens < 8


def test_when_blocks_run_out_the_youngest_is_preempted_and_its_answer_is_the_same() -> None:
    loop = Loop(num_kv_blocks=13, block_size=4, max_tokens=32)
    old, young = (loop.add(id, 12, 24) for id in ("old", "young"))  # 9 blocks each, of 12
    loop.drain()
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert loop.scheduler.statistics.preemptions == 1
    for request in (old, young):
        assert request.output_token_ids == answer_alone(request)


def test_a_lower_priority_is_preempted_before_a_younger_request() -> None:
    loop = Loop(num_kv_blocks=13, block_size=4, max_tokens=32)
    low = loop.add("low", 12, 24, priority=5)
    loop.step()
    high = loop.add("high", 12, 24, priority=1)
    loop.drain()
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)
    for request in (low, high):
        assert request.output_token_ids == answer_alone(request)


def test_a_request_that_must_wait_for_memory_is_not_overtaken() -> None:
    loop = Loop(num_kv_blocks=11, block_size=4)  # 10 blocks
    loop.add("a", 32, 2)  # 8 of them
    loop.add("b", 12, 2)  # 3
    loop.add("c", 1, 2)  # would fit at once
    loop.step()
    loop.step()
    assert loop.admitted == ["a"]
    assert (loop.scheduler.num_running, loop.scheduler.num_waiting) == (1, 2)
    loop.drain()
    assert loop.admitted == ["a", "b", "c"]


def test_a_new_request_leaves_a_watermark_of_blocks_to_those_that_run() -> None:
    loop = Loop(num_kv_blocks=301, block_size=4, max_tokens=2000, max_num_seqs=3)  # 300 blocks, a watermark of 3
    loop.add("large", 296 * 4 - 1, 3)
    loop.add("small", 3, 2)
    loop.add("too much", 8, 2)  # needs 2 of the last 3
    loop.step()
    assert loop.admitted == ["large", "small"]
    loop.drain()
    assert loop.admitted == ["large", "small", "too much"]
    assert loop.scheduler.statistics.preemptions == 0


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    loop = Loop(num_kv_blocks=9, block_size=4)
    loop.add("fits", 20, 13)  # the last token is never cached: 32 entries
    with pytest.raises(
        RequestError, match=r"KV blocks for 33 tokens \(9 blocks of 4\), and the cache has 8; lower max_tokens"
    ):
        loop.add("too large", 20, 14)
    assert loop.scheduler.num_waiting == 1


def test_steady_decoding_plans_the_same_rows_and_asks_for_no_block_but_at_borders() -> None:
    loop = Loop(block_size=16)
    loop.add("a", 3, 12)
    loop.drain()
    assert {plan.rows for plan in loop.plans[1:]} == {((1, 1),)}
    assert [len(plan.deltas) for plan in loop.plans] == [1] + [0] * 11


# Proposals


@given(
    num_kv_blocks=st.integers(9, 14),
    max_tokens=st.integers(4, 24),
    run_ahead=st.integers(0, 2),
    requests=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(0, 8)), min_size=2, max_size=6),
    num_drafts=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    accuracy=st.sampled_from([0.0, 0.7, 1.0]),
)
@settings(max_examples=150)
def test_requests_that_take_proposals_and_blocks_from_each_other_get_their_answers(
    num_kv_blocks, max_tokens, run_ahead, requests, num_drafts, accuracy
) -> None:
    """There is room for one or two of them, and chunks of prompts are small."""
    loop = Loop(
        num_kv_blocks=num_kv_blocks,
        block_size=4,
        max_tokens=max_tokens,
        max_num_partial_prefills=3,
        run_ahead=run_ahead,
        num_drafts=num_drafts,
        lookahead=1,
        accuracy=accuracy,
    )
    added = [
        loop.add(f"r{i}", prompt_len, answer_len, max_num_drafts=most)
        for i, (prompt_len, answer_len, most) in enumerate(requests)
    ]
    loop.drain()
    assert [request.output_token_ids for request in added] == [answer_alone(request) for request in added]
    loop.check_nothing_is_held()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_right_proposals_save_steps(run_ahead) -> None:
    """With 3 of them each step gives 4 tokens, but for the first two: the prompt's, which verifies none, and the last."""
    loop = Loop(num_drafts=(3,), run_ahead=run_ahead, accuracy=1.0)
    request = loop.add("a", 3, 22)
    loop.drain()
    assert request.output_token_ids == answer_alone(request)
    lengths = [len(update.new_token_ids) for update in loop.updates]
    assert lengths == [1, 4, 4, 4, 4, 4, 1]
    assert request.num_draft_tokens == len(request.accepted) == 15


def test_a_row_verifies_no_more_than_it_asked_for_and_leaves_every_other_decode_a_token() -> None:
    loop = Loop(max_tokens=6, num_drafts=(8,), accuracy=1.0, max_num_partial_prefills=4)
    for id, most in [("a", 8), ("b", 2), ("c", 0), ("d", 8)]:
        loop.add(id, 1, 20, max_num_drafts=most)
    loop.drain()
    assert tokens_of(loop.plans[:2]) == [[1, 1, 1, 1], [3, 1, 1, 1]]


@pytest.mark.parametrize(("lookahead", "found"), [(0, [8, 8, 8]), (1, [4, 8, 8]), (2, [4, 4, 8])])
def test_a_block_is_found_where_the_tokens_after_it_that_it_depends_on_are_the_same(lookahead, found) -> None:
    loop = Loop(max_tokens=64, block_size=4, num_drafts=(2,), lookahead=lookahead)
    loop.add("a", list(range(10)), 2)
    loop.drain()
    prompts = [[*range(8), 10, 10, 10], [*range(9), 10, 10], [*range(10), 10]]
    requests = [loop.add(f"r{i}", prompt, 9) for i, prompt in enumerate(prompts)]
    loop.drain()
    assert [request.num_cached_tokens for request in requests] == found
    assert [request.output_token_ids for request in requests] == [answer_alone(request) for request in requests]


# Requests


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_rows_planned_before_the_end_of_their_request_was_known_are_dropped(run_ahead) -> None:
    """The next user of the slot gets its own tokens only, though steps of the one before are still in flight."""
    loop = Loop(max_num_seqs=1, run_ahead=run_ahead)
    requests = [loop.add(f"r{i}", 3, 12, stop=True) for i in range(12)]
    assert any(len(answer_alone(request)) < 12 for request in requests)
    loop.drain()
    for request in requests:
        assert request.output_token_ids == answer_alone(request)
        assert request.generation == requests.index(request) + 1


def test_requests_that_come_first_are_served_first_and_a_priority_goes_before() -> None:
    loop = Loop(max_num_seqs=1)
    for id, priority in [("a", 0), ("b", 0), ("c", -1), ("d", 1), ("e", 0)]:
        loop.add(id, 3, 2, priority=priority)
    loop.drain()
    assert loop.admitted == ["c", "a", "b", "e", "d"]


def test_an_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    loop = Loop()
    loop.add("a")
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        loop.add("a")
    loop.drain()
    loop.add("a")


def test_abort_of_a_request_that_is_unknown_or_has_ended_does_nothing() -> None:
    loop = Loop()
    loop.add("a")
    assert loop.scheduler.abort("b") is None
    loop.drain()
    assert loop.scheduler.abort("a") is None
    assert loop.scheduler.schedule() is None
