"""Checkpoints of states: who starts where, which line each row reads and writes, and that there are never too many.

The device of `scheduling` asserts of every row that it reads the state of the very tokens before it, and that nobody writes what
somebody reads."""

import random

import pytest
from scheduling import Loop, answer_alone

from stepgraph.engine import state_lines


@pytest.fixture(autouse=True)
def _few_tokens_are_worth_it(monkeypatch):
    monkeypatch.setattr(state_lines, "SHARED_TOKENS", 8)
    monkeypatch.setattr(state_lines, "PROMPT_TOKENS", 16)


def prompt(*parts: tuple[int, int]) -> list[int]:
    """Tokens: of each part, its seed and length."""
    return [random.Random(f"{seed} {place}").randrange(11) for seed, length in parts for place in range(length)]


def run(loop: Loop, id: str, tokens: list[int], **options):
    request = loop.add(id, tokens, 3, **options)
    loop.drain()
    assert request.output_token_ids == answer_alone(request)
    return request


def rows_of_prompts(loop: Loop) -> list[int]:
    return [bound for plan in loop.plans for _, bound in plan.rows[: plan.num_prefill_rows]]


def test_the_third_prompt_that_begins_alike_starts_behind_what_they_share() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=64)
    found = [run(loop, f"{n}", prompt((0, 10), (n + 1, 5))).num_cached_tokens for n in range(4)]
    assert found == [0, 0, 8, 8]
    assert rows_of_prompts(loop) == [15, 8, 7, 7, 7]


def test_a_conversation_goes_on_behind_the_last_border_of_its_prompt() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=64)
    first = run(loop, "first", prompt((0, 21)))
    second = run(loop, "second", [*first.tokens(0, first.num_known), *prompt((1, 12))])
    third = run(loop, "third", [*second.tokens(0, second.num_known), 5])
    assert [r.num_cached_tokens for r in (first, second, third)] == [0, 16, 32]
    assert rows_of_prompts(loop) == [16, 5, 16, 4, 8]


def test_a_short_prompt_that_nobody_shares_takes_one_step() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=64)
    run(loop, "first", prompt((0, 13)))
    assert rows_of_prompts(loop) == [13]


def test_the_same_prompt_again_at_once_waits_for_no_state() -> None:
    """In one step, no row reads what another writes."""
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=64)
    requests = [loop.add(f"{n}", prompt((0, 15)), 3) for n in range(3)]
    loop.drain()
    assert [request.num_cached_tokens for request in requests] == [0, 0, 0]
    assert rows_of_prompts(loop) == [15, 12, 15, 3]  # one of them leaves it for later ones
    assert run(loop, "later", prompt((0, 15))).num_cached_tokens == 12


def test_of_long_prompts_that_are_alike_one_leaves_its_last_state() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=128)
    requests = [loop.add(f"{n}", prompt((0, 33)), 3) for n in range(3)]
    loop.step()
    loop.engine.abort("0")  # before its state can be read by itself
    loop.drain()
    assert [len(request.output_token_ids) for request in requests] == [0, 3, 3]
    assert rows_of_prompts(loop) == [28, 33, 33]
    assert run(loop, "later", prompt((0, 33))).num_cached_tokens == 28


def test_what_another_was_to_keep_and_did_not_is_kept_by_the_next() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=16)
    loop.add("first", prompt((0, 37)), 3)
    loop.step()
    loop.engine.abort("first")
    assert run(loop, "second", prompt((0, 37))).num_cached_tokens == 0
    assert run(loop, "third", prompt((0, 37))).num_cached_tokens == 32


def test_salts_keep_states_apart() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=64)
    found = [run(loop, f"{n}", prompt((0, 21)), salt=salt).num_cached_tokens for n, salt in enumerate("aabba")]
    assert found == [0, 16, 0, 16, 16]


def test_the_checkpoint_that_was_used_least_recently_gives_way() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=2, max_tokens=64)
    a, b, c = (prompt((n, 21)) for n in range(3))
    found = [run(loop, f"{n}", tokens).num_cached_tokens for n, tokens in enumerate((a, b, a, c, a, b))]
    assert found == [0, 0, 16, 0, 16, 0]
    loop.check_nothing_is_held()


def test_what_a_conversation_has_left_behind_gives_way_first() -> None:
    loop = Loop(num_kv_blocks=200, num_checkpoints=3, max_tokens=64)
    other = run(loop, "other", prompt((1, 21)))
    first = run(loop, "first", prompt((0, 21)))
    second = run(loop, "second", [*first.tokens(0, first.num_known), *prompt((2, 12))])
    run(loop, "one more", prompt((3, 21)))
    third = run(loop, "third", [*second.tokens(0, second.num_known), *prompt((4, 5))])
    again = run(loop, "again", prompt((1, 21)))
    assert [r.num_cached_tokens for r in (other, first, second, third, again)] == [0, 0, 16, 32, 16]
    assert run(loop, "first again", prompt((0, 21))).num_cached_tokens == 0


def test_a_reset_forgets_states() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=4, max_tokens=64)
    run(loop, "first", prompt((0, 21)))
    loop.add("running", prompt((0, 30)), 20)
    loop.step()
    loop.engine.reset_prefix_cache()
    loop.drain()
    assert run(loop, "anew", prompt((0, 21))).num_cached_tokens == 0
    loop.check_nothing_is_held()


def test_a_reader_of_a_checkpoint_that_is_aborted_lets_it_go() -> None:
    loop = Loop(num_kv_blocks=100, num_checkpoints=1, max_tokens=64, run_ahead=1)
    run(loop, "first", prompt((0, 21)))
    for n in range(3):
        loop.add(f"aborted {n}", prompt((0, 21)), 20)
        loop.step()
        loop.engine.abort(f"aborted {n}")
    assert run(loop, "other", prompt((1, 21))).num_cached_tokens == 0
    assert run(loop, "other again", prompt((1, 21))).num_cached_tokens == 16
    loop.check_nothing_is_held()


@pytest.mark.parametrize("num_drafts", [(0,), (0, 3, 1)], ids=["one by one", "with proposals"])
@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("num_checkpoints", [1, 3])
def test_every_row_reads_the_state_of_the_tokens_before_it(num_checkpoints, run_ahead, num_drafts) -> None:
    """Prompts that share parts, of more tokens than a step has, with preemptions, aborts and resets between."""
    rng = random.Random(num_checkpoints)
    loop = Loop(
        num_kv_blocks=30,
        num_checkpoints=num_checkpoints,
        run_ahead=run_ahead,
        num_drafts=num_drafts,
        lookahead=int(max(num_drafts) > 0),
        max_num_partial_prefills=2,
    )
    requests, ends = [], []
    for number in range(120):
        parts = [(0, rng.choice((12, 20))), (rng.randrange(5), rng.randrange(1, 20))]
        requests.append(loop.add(f"{number}", prompt(*parts), rng.randrange(1, 20)))
        for _ in range(rng.randrange(8)):
            loop.step()
        if rng.random() < 0.1 and (running := loop.scheduler.running()):
            ends.append(rng.choice(running))
            loop.engine.abort(ends[-1].id)
        if rng.random() < 0.03:
            loop.engine.reset_prefix_cache(preempt=rng.random() < 0.5)
        assert len(loop.scheduler._lines._keys) <= num_checkpoints
    loop.drain()
    assert all(r.output_token_ids == answer_alone(r) for r in requests if r not in ends)
    assert sum(request.num_cached_tokens > 0 for request in requests) > 8
    assert loop.scheduler.statistics.preemptions > 5
    loop.check_nothing_is_held()
