"""StepPlan: its numbers, its kind, and its packed form."""

import numpy as np
import pytest

from stepgraph.step.plan import BlockTables, StepKind, StepPlan, idle_plan
from stepgraph.step.shape import StepShape, Variant

BLOCK_SIZE = 16


def packed(plan: StepPlan, shape: StepShape) -> list[int]:
    out = np.full(shape.plan_length(BLOCK_SIZE), 99, dtype=np.int32)
    plan.pack(shape, BlockTables(BLOCK_SIZE), out)
    return out.tolist()


@pytest.mark.parametrize(
    ("num_prefill_rows", "kind"), [(0, StepKind.DECODE), (1, StepKind.MIXED), (2, StepKind.PREFILL)]
)
def test_the_kind_follows_from_the_rows_that_compute_prompt_tokens(num_prefill_rows, kind) -> None:
    assert StepPlan(((3, 1), (1, 1)), (), num_prefill_rows).kind is kind


def test_a_plan_is_packed_as_rows_then_deltas_over_whatever_lay_there() -> None:
    shape = StepShape(16, 3)  # room for 4 deltas
    plan = StepPlan(((3, 1), (1, 15)), ((1, 0, 7), (1, 1, 9)), 1)
    assert plan.num_tokens == 16
    assert packed(plan, shape) == [3, 1, 1, 15, 0, 0] + [1, 0, 7, 1, 1, 9] + [0] * 6


def test_an_empty_plan_names_only_the_null_slot_and_the_null_block() -> None:
    assert not any(packed(StepPlan((), (), 0), StepShape(8, 2)))


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan(((1, 9),), (), 1),
        StepPlan(((1, 1), (2, 1), (3, 1)), (), 0),
        StepPlan(((1, 1),), tuple((1, i, i + 1) for i in range(3)), 0),
    ],
    ids=["tokens", "rows", "deltas"],
)
def test_a_plan_larger_than_its_shape_is_a_bug_and_says_so(plan) -> None:
    with pytest.raises(AssertionError):
        packed(plan, StepShape(8, 2))


def test_packing_at_another_shape_moves_the_deltas_behind_that_shapes_rows() -> None:
    plan = StepPlan(((2, 1),), ((2, 5, 8),), 0)
    for shape in (StepShape(8, 2), StepShape(8, 8), StepShape(64, 4)):
        deltas = packed(plan, shape)[2 * shape.num_rows :]
        assert deltas[:3] == [2, 5, 8]
        assert not any(deltas[3:])


def test_a_joined_plan_has_room_for_the_rank_with_most_to_do_and_asks_for_all_that_any_needs() -> None:
    prompt = StepPlan(((1, 9), (2, 1)), ((1, 0, 7),), 1, epoch=5)
    decodes = StepPlan(((4, 1), (5, 1), (6, 1)), (), 0, Variant.EXTENDED, epoch=2)
    for ranks in ([prompt, decodes, idle_plan(0)], [idle_plan(0), decodes, prompt]):
        joined = StepPlan.joined(ranks, epoch=3)
        assert (joined.most_tokens, joined.most_rows, joined.num_ranks) == (10, 3, 3)
        assert (joined.num_tokens, len(joined.rows), joined.num_prefill_rows) == (13, 5, 1)
        assert (joined.variant, joined.epoch, joined.deltas) == (Variant.EXTENDED, 3, ())
        assert joined.rows[0] == (1, 9)
