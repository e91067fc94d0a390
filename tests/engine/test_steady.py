"""Steps planned and read for all rows at once, steadily or not: nothing but the host's time tells that from row by row."""

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scheduling import Loop, answer_alone

from stepgraph.engine import row_planner, row_results
from stepgraph.engine.request import Request, RequestUpdate, StepUpdates
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.steady import SteadyDecode
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import RowResult, StepResults
from stepgraph.step.shape import Variant
from stepgraph.step.state import SlotSampling

COUNTERS = ("planned", "unread_drafts", "drafts", "room")
ATTRIBUTES = ("blocks", "output_token_ids", "accepted", "num_draft_tokens")


def count_steady(run) -> int:
    """Steps that `run` plans steadily."""
    with mock.patch.object(SteadyDecode, "next_step", autospec=True, side_effect=SteadyDecode.next_step) as planned:
        run()
    return planned.call_count


@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.integers(1, 40),
            st.booleans(),
            st.sampled_from([0, 2, 8, 8]),
            st.sampled_from([Variant.PLAIN, Variant.PLAIN, Variant.EXTENDED]),
        ),
        min_size=1,
        max_size=6,
    ),
    num_drafts=st.sampled_from([(0,), (0,), (1,), (3,), (2, 2, 0, 0)]),
    run_ahead=st.integers(0, 2),
    num_kv_blocks=st.integers(18, 80),
    lookahead=st.integers(0, 1),
    accuracy=st.sampled_from([0.7, 1.0]),
    window=st.sampled_from([0, 0, 6]),
    arrivals=st.sets(st.integers(1, 40), max_size=3),
    aborts=st.sets(st.integers(1, 40), max_size=2),
)
@example(  # the numbers of proposals differ, and are known before the next step is planned
    requests=[(3, 60, False, 8, Variant.PLAIN)],
    num_drafts=(3,),
    run_ahead=0,
    num_kv_blocks=80,
    lookahead=0,
    accuracy=0.7,
    window=0,
    arrivals=set(),
    aborts=set(),
)
@example(  # a step without proposals is planned while others verify some
    requests=[(4, 60, False, 8, Variant.PLAIN)],
    num_drafts=(2, 2, 0, 0),
    run_ahead=2,
    num_kv_blocks=80,
    lookahead=0,
    accuracy=1.0,
    window=0,
    arrivals=set(),
    aborts=set(),
)
@settings(max_examples=60)
def test_the_same_steps_are_planned_and_the_same_updates_come_as_row_by_row(
    requests, run_ahead, num_kv_blocks, num_drafts, lookahead, accuracy, window, arrivals, aborts
) -> None:
    def run(*, steadily: bool = False, together: bool = True) -> tuple:
        loop = Loop(
            max_tokens=24,
            num_kv_blocks=num_kv_blocks,
            run_ahead=run_ahead,
            num_drafts=num_drafts,
            lookahead=lookahead,
            accuracy=accuracy,
            window=window,
        )
        held, told = [], []
        with ExitStack() as stack:
            for module in (row_planner, row_results):
                stack.enter_context(mock.patch.object(module, "MANY_ROWS", 1 if together else 1000))
            if not steadily:
                stack.enter_context(mock.patch.object(SteadyDecode, "may_begin", return_value=False))
            for index, (prompt_len, max_tokens, stop, most, variant) in enumerate(requests):
                loop.add(f"r{index}", prompt_len, max_tokens, stop=stop, max_num_drafts=most).variant = variant
            for step in range(120):
                if step in arrivals:
                    loop.add(f"late {step}", 3, 9, priority=-(step % 2))
                if step in aborts:
                    loop.scheduler.abort("r0")
                loop.updates.clear()
                loop.step()
                told.append(sorted((u.request.id, *u[1:]) for u in loop.updates))
                held.append(loop.scheduler.num_free_blocks)
        return loop.plans, told, held, loop.scheduler.speculation

    expected = run(together=False)
    assert run() == expected
    if len(num_drafts) == 1:  # else it may be asked for more often
        assert run(steadily=True) == expected


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize(("num_drafts", "lookahead"), [(0, 0), (3, 0), (3, 1)])
def test_nearly_all_steps_of_long_answers_are_steady(run_ahead, num_drafts, lookahead) -> None:
    loop = Loop(
        num_kv_blocks=200,
        max_tokens=32,
        run_ahead=run_ahead,
        num_drafts=(num_drafts,),
        lookahead=lookahead,
        accuracy=1.0,
    )
    requests = [loop.add(id, 2 + index, 100) for index, id in enumerate("abc")]
    num_steady = count_steady(loop.drain)
    assert [request.output_token_ids for request in requests] == [answer_alone(request) for request in requests]
    assert num_steady > 0.7 * len(loop.plans)


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_request_can_be_aborted_while_all_decode_steadily_and_the_others_counters_are_right(num_drafts) -> None:
    loops = [Loop(run_ahead=1, num_drafts=(num_drafts,), accuracy=1.0, max_tokens=20) for _ in range(2)]
    states = []
    for loop, may_begin in zip(loops, (SteadyDecode.may_begin, lambda *args: False), strict=True):
        with mock.patch.object(SteadyDecode, "may_begin", may_begin):
            requests = [loop.add(id, 3, 40) for id in "abc"]
            for _ in range(9):
                loop.step()
            loop.scheduler.abort("b")
        table = loop.scheduler.table
        states.append(
            [
                [[getattr(request, name) for name in ATTRIBUTES] for request in requests],
                [[getattr(table, name)[r.slot] for name in COUNTERS] for r in requests if r.slot is not None],
            ]
        )
    assert states[0] == states[1]


def test_a_steady_plan_is_the_same_object_but_where_a_block_begins() -> None:
    loop = Loop(num_kv_blocks=100, run_ahead=1)
    loop.add("a", 1, 41)
    loop.drain()
    steady = loop.plans[3:-1]
    assert len({id(plan) for plan in steady if not plan.deltas}) == 1
    assert {len(plan.deltas) for plan in steady} == {0, 1}
    assert {plan.epoch for plan in steady} == {steady[0].epoch}
    assert loop.plans[0].epoch < steady[0].epoch


def test_plans_of_one_epoch_differ_in_their_deltas_only() -> None:
    loop = Loop(run_ahead=1, num_drafts=(0, 0, 0, 0, 0, 2), num_kv_blocks=40)
    for index, id in enumerate("abcdef"):
        loop.add(id, 2 + 5 * index, 30, stop=index % 2 == 0)
    loop.drain()
    by_epoch: dict[int, list[StepPlan]] = {}
    for plan in loop.plans:
        by_epoch.setdefault(plan.epoch, []).append(replace(plan, deltas=()))
    assert list(by_epoch) == sorted(by_epoch)
    assert all(plan == plans[0] for plans in by_epoch.values() for plan in plans)
    assert 1 < len(by_epoch) < len(loop.plans)


def test_a_prompt_that_finds_no_slot_does_not_end_it() -> None:
    loop = Loop(max_num_seqs=2, num_kv_blocks=200, run_ahead=1)
    for id in "ab":
        loop.add(id, 4, 60)
    waiting = loop.add("c", 4, 5)
    assert count_steady(lambda: [loop.step() for _ in range(50)]) > 40
    loop.drain()
    assert waiting.output_token_ids == answer_alone(waiting)


def test_steady_updates_are_those_of_each_request_in_turn() -> None:
    requests = [Request(id, [1], SamplingParams(), 9, SlotSampling(seed=0)) for id in "ab"]
    updates = StepUpdates(requests, zip([5, 6], strict=True))
    expected = [RequestUpdate(requests[0], (5,), None), RequestUpdate(requests[1], (6,), None)]
    assert list(updates) == list(updates) == expected
    assert (len(updates), updates[1], updates[:1]) == (2, expected[1], expected[:1])


def test_results_as_a_table_are_their_rows() -> None:
    rows = [
        RowResult(3, 1, 0, 2, 3, 1, 0, 4, tokens=[7, 8]),
        RowResult(1, 2, 0, 0),
        RowResult(2, 9, 1, 1, first_sample=5, tokens=[6]),
    ]
    results = StepResults.of(rows)
    assert results.table.dtype == np.int32
    assert [row._replace(tokens=list(row.tokens)) for row in rows] == results.rows
    assert results.outcomes(1) == [(0, 0, 0), (1, 0, 0)]
