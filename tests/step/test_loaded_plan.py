"""What lies where graphs read it is not sent again, and nothing else is left out."""

from dataclasses import replace

import numpy as np
import pytest

from stepgraph.step.loaded_plan import LoadedPlan
from stepgraph.step.plan import BlockTables, StepPlan, idle_plan
from stepgraph.step.shape import StepShape

BLOCK_SIZE = 16
SMALL, LARGE = StepShape(8, 2), StepShape(16, 3)
DECODE = StepPlan(((4, 1), (5, 1)), (), 0, epoch=7)
GROWING = replace(DECODE, deltas=((5, 2, 9),))
NEXT = StepPlan(((5, 1), (6, 1)), ((6, 0, 3),), 0, epoch=8)
IDLE = idle_plan(0)


@pytest.mark.parametrize(
    "steps",
    [
        [(DECODE, SMALL), (DECODE, SMALL), (GROWING, SMALL), (DECODE, SMALL)],
        [(GROWING, SMALL), (GROWING, LARGE), (DECODE, LARGE), (DECODE, SMALL)],
        [(DECODE, SMALL), (IDLE, SMALL), (IDLE, SMALL), (DECODE, SMALL), (IDLE, LARGE), (IDLE, SMALL)],
        [
            (GROWING, SMALL),
            (NEXT, SMALL),
            (IDLE, LARGE),
            (NEXT, LARGE),
            (replace(NEXT, epoch=None), LARGE),
            (replace(DECODE, epoch=None), LARGE),
            (DECODE, LARGE),
        ],
    ],
    ids=["one epoch", "another shape", "nothing to do between", "other rows"],
)
def test_a_graph_finds_the_plan_of_its_step_wherever_the_one_before_left_another(steps) -> None:
    """Of rows that repeat, what was set in the block table need not be there again."""
    device, out = np.full((2, LARGE.plan_length(BLOCK_SIZE)), 77, dtype=np.int32)
    loaded = LoadedPlan(BlockTables(BLOCK_SIZE), first_slot=3)
    for plan, shape in steps:
        part = loaded.pack(plan, shape, out)
        device[part] = out[part]
        end, rows = shape.plan_length(BLOCK_SIZE), shape.deltas_start
        expected = np.zeros(end, dtype=np.int32)
        plan.pack(shape, BlockTables(BLOCK_SIZE), expected, first_slot=3)
        assert device[:rows].tolist() == expected[:rows].tolist(), (plan, shape)
        if plan.deltas or part.start == 0 < part.stop:
            assert device[rows:end].tolist() == expected[rows:].tolist(), (plan, shape)


def test_what_repeats_is_not_packed_until_it_is_forgotten() -> None:
    out = np.zeros(LARGE.plan_length(BLOCK_SIZE), dtype=np.int32)
    loaded = LoadedPlan(BlockTables(BLOCK_SIZE), first_slot=3)
    whole, deltas, nothing = slice(0, SMALL.plan_length(BLOCK_SIZE)), slice(SMALL.deltas_start, None), slice(0, 0)
    assert loaded.pack(DECODE, SMALL, out) == whole
    assert loaded.pack(DECODE, SMALL, out) == nothing
    assert loaded.pack(GROWING, SMALL, out) == slice(deltas.start, whole.stop)
    loaded.forget()
    assert loaded.pack(DECODE, SMALL, out) == whole
    assert loaded.pack(IDLE, SMALL, out) == whole
    assert loaded.pack(IDLE, SMALL, out) == nothing
