"""Which prompts share a step, wait for others, or are cut: limits of prompts, captured sizes, gathering."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import Loop, answer_alone, tokens_of

from stepgraph.engine import waiting
from stepgraph.engine.waiting import MAX_OVERTAKEN
from stepgraph.step.plan import StepKind


def test_partial_prompts_share_a_step_and_short_ones_leave_their_rest_to_the_others() -> None:
    loop = Loop(max_tokens=16, max_num_partial_prefills=3, num_kv_blocks=60)
    for id, prompt_len in [("a", 40), ("b", 3), ("c", 40)]:
        loop.add(id, prompt_len, 2)
    loop.step()
    assert tokens_of(loop.plans) == [[6, 3, 7]]
    loop.drain()


def test_one_partial_prompt_at_a_time_is_the_default_and_whole_prompts_fill_its_step() -> None:
    loop = Loop(max_tokens=16, num_kv_blocks=60)
    for id, prompt_len in [("a", 20), ("b", 3), ("c", 40), ("d", 2)]:
        loop.add(id, prompt_len, 1)
    loop.drain()
    assert tokens_of(loop.plans)[:3] == [[16], [4, 3, 9], [16]]


def test_a_long_prompt_waits_for_another_long_one_and_short_ones_overtake_it() -> None:
    loop = Loop(
        max_tokens=16,
        max_num_partial_prefills=2,
        max_long_partial_prefills=1,
        long_prefill_token_threshold=20,
        num_kv_blocks=60,
    )
    for id, prompt_len in [("long 1", 40), ("long 2", 40), ("short 1", 3), ("short 2", 3)]:
        loop.add(id, prompt_len, 1)
    loop.drain()
    assert loop.admitted == ["long 1", "short 1", "short 2", "long 2"]


@given(
    stream=st.sampled_from(["priorities", "short prompts"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
)
@settings(max_examples=8)
def test_no_request_is_overtaken_more_often_than_the_bound(stream, lengths) -> None:
    """An endless stream of requests that may pass it, faster than the engine can serve."""
    loop = Loop(
        max_num_seqs=2, max_tokens=16, num_kv_blocks=40, max_num_partial_prefills=2, long_prefill_token_threshold=20
    )
    if stream == "short prompts":
        loop.add("another long one", 100, 1)
        loop.step()
    victim = loop.add("victim", 30, 2, priority=1 if stream == "priorities" else 0)
    count = 0
    while victim.slot is None and victim.finish_reason is None:
        while loop.scheduler.num_waiting < 4:
            count += 1
            loop.add(f"r{count}", lengths[count % len(lengths)], 1)
        if stream == "short prompts" and not any(request.prompt_len > 20 for request in loop.scheduler.running()):
            loop.add(f"long {count}", 100, 1, priority=-1)
        loop.step()
        assert count < 2 * MAX_OVERTAKEN, "it starves"
    assert victim.overtaken <= MAX_OVERTAKEN
    if stream == "priorities":
        assert victim.overtaken == MAX_OVERTAKEN


def test_a_request_whose_blocks_are_taken_by_later_arrivals_again_and_again_ends(monkeypatch) -> None:
    """Each rival arrives while the victim runs, and has a higher priority and needs its blocks."""
    monkeypatch.setattr(waiting, "MAX_OVERTAKEN", 8)
    loop = Loop(max_num_seqs=2, max_num_partial_prefills=2, prefix_caching=False)
    victim = loop.add("victim", 110, 2, priority=1)
    rival, count = None, 0
    while victim.finish_reason is None:
        if victim.slot is not None and (rival is None or rival.finish_reason is not None):
            count += 1
            rival = loop.add(f"r{count}", 24, 24)
        loop.step()
        assert count < 30, "it starves"
    assert victim.output_token_ids == answer_alone(victim)
    assert 8 <= victim.num_preemptions <= 9


def test_no_salt_and_tokens_imitate_another_chain_of_blocks() -> None:
    """A salt whose bytes are those of a block of tokens must not make its chain that of the unsalted tokens."""
    loop = Loop(max_tokens=64, block_size=4)
    tokens = [65, 66, 67, 68]
    salt = np.array(tokens, dtype=np.int32).tobytes().decode()
    loop.add("salted", [1, 2, 3, 4, 5], 2, salt=salt)
    loop.drain()
    plain = loop.add("plain", [*tokens, 1, 2, 3, 4, 5], 2)
    loop.drain()
    assert plain.num_cached_tokens == 0
    assert plain.output_token_ids == answer_alone(plain)


def test_a_salt_of_any_text_is_taken() -> None:
    loop = Loop()
    request = loop.add("r", 9, 2, salt="\ud800")
    loop.drain()
    assert request.output_token_ids == answer_alone(request)


# Captured sizes


def test_a_chunk_is_cut_to_a_captured_size_where_that_saves_padding_and_only_once() -> None:
    loop = Loop(max_tokens=64, token_sizes=(1, 2, 4, 8, 16, 32, 64), num_kv_blocks=200, max_num_seqs=8)
    for id in ("a", "b"):
        loop.add(id, 2, 30)
    loop.step()
    loop.add("c", 36, 4)
    for _ in range(3):
        loop.step()
    # 2 decodes and 36 tokens would pad 38 to 64; 30 of them make 32, the other 6 fill the next decode step to 8.
    assert tokens_of(loop.plans[1:]) == [[30, 1, 1], [6, 1, 1], [1, 1, 1]]
    loop.drain()


def test_a_lone_prompt_is_not_cut() -> None:
    loop = Loop(max_tokens=64, token_sizes=(1, 2, 4, 8, 16, 32, 64), num_kv_blocks=200)
    loop.add("a", 36, 4)
    loop.step()
    assert tokens_of(loop.plans) == [[36]]


# Gathering


def test_gathered_prompts_enter_together_when_there_are_enough() -> None:
    loop = Loop(insertion_policy="gather", prefill_gather_size=3, prefill_gather_ms=1000, max_tokens=64)
    for id in "ab":
        loop.add(id, 5, 4)
    loop.step()
    assert not loop.plans
    assert loop.scheduler.seconds_until_work() == pytest.approx(0.999)
    loop.add("c", 5, 4)
    assert loop.scheduler.seconds_until_work() is None
    loop.step()
    assert tokens_of(loop.plans) == [[5, 5, 5]]


def test_a_lone_prompt_enters_after_the_gathering_time_since_the_last_arrival() -> None:
    loop = Loop(insertion_policy="gather", prefill_gather_size=3, prefill_gather_ms=10)
    loop.add("a", 5, 4)
    for _ in range(5):
        loop.step()
    loop.add("b", 5, 4)  # starts the time anew
    for _ in range(10):
        loop.step()
    assert not loop.plans
    loop.step()
    assert tokens_of(loop.plans) == [[5, 5]]


def test_decodes_go_on_while_prompts_gather() -> None:
    loop = Loop(insertion_policy="gather", prefill_gather_size=2, prefill_gather_ms=100)
    loop.add("a", 5, 8)
    loop.clock.now = 1.0
    loop.step()
    loop.add("b", 5, 8)
    for _ in range(3):
        loop.step()
    assert tokens_of(loop.plans) == [[5], [1], [1], [1]]


def test_pure_steps_never_mix_and_prompts_and_decodes_take_turns() -> None:
    loop = Loop(pure_steps=True, max_tokens=16, num_kv_blocks=200)
    loop.add("a", 5, 8)
    loop.step()
    loop.add("b", 40, 3)
    loop.drain()
    assert tokens_of(loop.plans[:8]) == [[5], [1], [16], [1], [16], [1], [8], [1, 1]]
    assert {plan.kind for plan in loop.plans} == {StepKind.PREFILL, StepKind.DECODE}
