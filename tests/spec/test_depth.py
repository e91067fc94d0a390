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


def chosen(depth: DraftDepth, steps: int, seconds: dict[int, float], stood: int) -> list[int]:
    """The K of each of so many steps of one row, which take `seconds` by K and whose first `stood` proposals stand."""
    ks = []
    for _ in range(steps):
        ks.append(k := depth.choose(1))
        depth.observe(1, k, [(k, min(k, stood))], seconds[k])
    return ks


@pytest.mark.parametrize("costs_when_idle", [True, False])
def test_proposals_that_make_steps_slower_are_switched_off_and_come_back_when_they_pay(costs_when_idle) -> None:
    depth = DraftDepth(3, (0,), costs_when_idle=costs_when_idle)
    chosen(depth, 100, {0: 1.0, 3: 1.5}, stood=0)
    assert chosen(depth, 600, {0: 1.0, 3: 1.5}, stood=0).count(0) > 500
    chosen(depth, 20_000, {0: 1.0, 3: 1.5}, stood=3)
    assert chosen(depth, 600, {0: 1.0, 3: 1.5}, stood=3).count(3) > 500


def test_proposals_that_cost_nothing_where_there_are_none_stay_on_where_they_hardly_cost() -> None:
    seconds = {0: 1.0, 3: 1.05}
    for costs_when_idle, on in ((True, False), (False, True)):
        depth = DraftDepth(3, (0,), costs_when_idle=costs_when_idle)
        chosen(depth, 200, seconds, stood=0)
        assert (chosen(depth, 1000, seconds, stood=0).count(3) > 500) is on, costs_when_idle


def test_while_nothing_is_proposed_though_that_costs_nothing_proposals_are_tried_as_often_as_at_first() -> None:
    trials = {}
    for costs_when_idle in (True, False):
        depth = DraftDepth(3, (0,), costs_when_idle=costs_when_idle)
        ks = chosen(depth, 5000, {0: 1.0, 3: 1.5}, stood=0)
        trials[costs_when_idle] = sum(a == 0 < b for a, b in itertools.pairwise(ks[1000:]))
    assert trials[False] > 4 * trials[True] > 0


def test_where_proposals_pay_others_are_tried_more_and_more_rarely() -> None:
    depth = DraftDepth(3, (0,), costs_when_idle=False)
    chosen(depth, 2000, {0: 1.0, 3: 1.5}, stood=3)
    assert chosen(depth, 2000, {0: 1.0, 3: 1.5}, stood=3).count(0) <= 2000 / 512 * 4 + 4
