"""What DraftDepth learns of how many proposals stand."""

import itertools

import pytest

from stepgraph.spec.depth import DraftDepth

ROWS = [(3, 3), (3, 0), (3, 1), (2, 2), (3, 3)]


def learned(steps: list[list[tuple[int, int]]]) -> list[float]:
    depth = DraftDepth(3, ())
    for accepted in steps:
        depth.observe(len(accepted), 3, accepted, None)
    return [depth.expected_tokens(num_drafts) for num_drafts in range(4)]


def test_the_share_that_stands_is_that_of_the_rows_that_reached_the_place() -> None:
    # Of 5 rows 4 stand at the first place, 3 of these at the second, and 2 of the two that had a third.
    assert learned([ROWS]) == pytest.approx([1, 1.8, 2.4, 3.0])


def test_few_rows_tell_the_same_whatever_their_order() -> None:
    assert all(learned([list(rows)]) == pytest.approx(learned([ROWS])) for rows in itertools.permutations(ROWS))


def test_many_rows_of_a_step_count_like_as_many_steps() -> None:
    assert learned([[(3, 3)] * 20, [(3, 0)] * 100])[1] == pytest.approx(
        learned([[(3, 3)]] * 20 + [[(3, 0)]] * 100)[1], rel=1e-9
    )


def test_old_steps_are_forgotten() -> None:
    assert learned([[(3, 0)] * 500] + [[(3, 3)]] * 300)[3] > 3.8
