"""StepShape and the ladders of sizes."""

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from stepgraph.step.shape import StepShape, Variant, row_sizes, token_sizes


@given(
    rows=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 300)), min_size=1, max_size=20), log=st.integers(0, 7)
)
def test_a_step_needs_no_more_new_blocks_than_its_shape_provides_for(rows, log) -> None:
    """Rows (tokens cached, tokens added); a row newly needs the blocks that its added tokens are the first to touch."""
    block_size = 1 << log
    needed = sum(-(-(computed + n) // block_size) - -(-computed // block_size) for computed, n in rows)
    shape = StepShape(sum(n for _, n in rows), len(rows))
    assert needed <= shape.num_deltas(block_size)


def test_the_packed_plan_is_rows_of_two_and_deltas_of_three() -> None:
    assert StepShape(160, 8).num_deltas(16) == 18
    assert StepShape(160, 8).plan_length(16) == 2 * 8 + 3 * 18


def test_shapes_order_by_tokens_and_print_as_tokens_by_rows() -> None:
    assert StepShape(8, 8) < StepShape(16, 2) < StepShape(16, 8)
    assert str(StepShape(160, 8)) == "160x8"


def test_token_sizes_are_two_to_a_doubling_up_to_32_and_then_four() -> None:
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160]
    assert list(token_sizes(160)) == sizes
    assert list(token_sizes(100))[-2:] == [96, 100]
    assert list(token_sizes(1)) == [1]


@given(st.integers(1, 20000))
def test_token_sizes_rise_to_the_largest_step_with_gaps_of_at_most_a_quarter_or_8_tokens(largest) -> None:
    sizes = list(token_sizes(largest))
    assert sizes[-1] == largest
    assert sizes == sorted(set(sizes))
    assert all(b - a <= max(8, a / 4) for a, b in itertools.pairwise(sizes))


@given(st.integers(1, 5000), st.integers(1, 1024))
def test_row_sizes_rise_to_the_most_rows_that_the_tokens_can_have(tokens, max_rows) -> None:
    sizes = list(row_sizes(tokens, max_rows))
    assert sizes[-1] == min(tokens, max_rows)
    assert sizes == sorted(set(sizes))
    assert all(b <= 8 * a for a, b in itertools.pairwise(sizes))
    assert len(sizes) <= 4


def test_a_shape_holds_what_is_no_larger_and_no_more_special_with_as_many_proposals() -> None:
    shape = StepShape(16, 4, Variant.EXTENDED, 2)
    held = [shape, replace(shape, num_tokens=8), replace(shape, num_rows=1), replace(shape, variant=Variant.PLAIN)]
    assert all(shape.holds(other) for other in held)
    others = [
        replace(shape, num_tokens=17),
        replace(shape, num_rows=5),
        replace(shape, variant=Variant.PROMPT_LOGPROBS),
        replace(shape, num_drafts=3),
        replace(shape, num_drafts=1),
    ]
    assert not any(shape.holds(other) for other in others)
