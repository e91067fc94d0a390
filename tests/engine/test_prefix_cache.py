"""PrefixCache: what an answer fills can be found, and is named only when somebody may find it."""

import pytest
from scheduling import Loop


def known(request) -> list[int]:
    return list(request.tokens(0, request.num_known))


@pytest.mark.parametrize("prompt_len", [2, 9], ids=["no whole block", "two blocks"])
def test_blocks_that_an_answer_fills_are_found_while_it_runs(prompt_len) -> None:
    loop = Loop(num_kv_blocks=100)
    first = loop.add("first", prompt_len, 40)
    for _ in range(22):
        loop.step()
    num_prompt_keys = prompt_len // loop.block_size
    assert len(first.block_keys) == num_prompt_keys  # nobody has looked
    other = loop.add("other", [10] * 12, 1)
    fork = loop.add("fork", [*known(first), 3], 5)
    num_computed = first.num_known - 1
    loop.step()
    assert other.num_cached_tokens == 0
    assert fork.num_cached_tokens == num_computed // loop.block_size * loop.block_size > 8
    loop.drain()
    loop.check_nothing_is_held()


def test_a_look_names_no_more_blocks_than_it_finds_and_one() -> None:
    loop = Loop(num_kv_blocks=100)
    first = loop.add("first", 9, 60)
    for _ in range(40):
        loop.step()
    loop.add("fork", [*known(first)[:14], 3, 3, 3], 1)
    loop.step()
    assert len(first.block_keys) == 4  # two of the prompt, one that is found, and the next


def test_a_look_names_no_block_before_its_tokens_are_known() -> None:
    loop = Loop(num_kv_blocks=100)
    first = loop.add("first", 41, 1)
    loop.drain()
    fork = loop.add("fork", [*known(first)[:24], 3, 3, 3], 9)  # the look ends in the block that the answer fills
    loop.drain()
    again = loop.add("again", [*known(fork), 3], 1)
    loop.drain()
    assert (fork.num_cached_tokens, again.num_cached_tokens) == (24, 32)


def test_a_prompt_unlike_others_names_one_block_before_its_step_and_the_rest_with_the_next() -> None:
    loop = Loop(num_kv_blocks=100, max_tokens=48)
    first = loop.add("first", 33, 5)
    for num_named in (1, 8):
        loop.step()
        assert len(first.block_keys) == num_named


def test_blocks_of_a_request_that_ended_are_found() -> None:
    loop = Loop(num_kv_blocks=100)
    first = loop.add("first", 5, 20)
    loop.drain()
    fork = loop.add("fork", [*known(first), 3], 1)
    loop.drain()
    assert fork.num_cached_tokens == 24  # 25 tokens, the last of which was never computed


def test_a_request_aborted_before_its_prompt_ran_leaves_only_what_was_planned_of_it() -> None:
    loop = Loop(num_kv_blocks=100, max_tokens=8)
    first = loop.add("first", 20, 5)
    loop.step()  # two blocks
    loop.scheduler.abort("first")
    again = loop.add("again", known(first), 5)
    loop.drain()
    assert again.num_cached_tokens == 8


def test_switched_off_it_finds_nothing_and_names_nothing() -> None:
    loop = Loop(num_kv_blocks=100, prefix_caching=False)
    first = loop.add("first", 9, 20)
    loop.drain()
    again = loop.add("again", known(first), 1)
    loop.drain()
    assert (again.num_cached_tokens, first.block_keys) == (0, [])
