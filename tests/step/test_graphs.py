"""Which graph serves a step, what is captured when, and what is counted; with graphs that run nothing."""

import pickle
from dataclasses import replace
from unittest import mock

import pytest
import torch
from fake_graphs import MIB, Device, FakeGraph, create_graphs, create_policy, plan
from hypothesis import given
from hypothesis import strategies as st
from tiny import drain

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import DeviceMemoryError
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.plan import StepKind
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy


@pytest.mark.parametrize(
    ("query_lens", "shape"),
    [
        ([1], "8x2"),
        ([1] * 8, "8x8"),
        ([4, 4], "8x2"),
        ([1, 1, 1], "8x8"),
        ([9], "16x2"),
        ([15, 1], "16x2"),
        ([17], "64x2"),
        ([57] + [1] * 7, "64x8"),
        ([], "8x2"),
    ],
)
def test_the_smallest_captured_shape_that_holds_the_step_is_chosen(query_lens, shape) -> None:
    record, graph = create_graphs(Device()).graph_for(plan(*query_lens))
    assert str(record.shape) == shape
    assert graph == FakeGraph(record.shape)


def test_plans_of_one_epoch_are_one_use_however_they_came() -> None:
    graphs = create_graphs(Device())
    first = replace(plan(1, 1), epoch=3)
    record, graph = graphs.graph_for(first)
    with mock.patch.object(ShapePolicy, "shape_of", side_effect=AssertionError("searched again")):
        for like_it in (pickle.loads(pickle.dumps(first)), replace(first, deltas=((1, 0, 2),))):
            assert graphs.graph_for(like_it) == (replace(record, captured=False), graph)
        for other in (replace(first, epoch=4), replace(first, epoch=None)):
            with pytest.raises(AssertionError, match="searched again"):
                graphs.graph_for(other)
    graphs.graph_for(plan(1, 1))
    assert str(graphs.graph_for(plan(9))[0].shape) == "16x2", "plans without an epoch are like no other"


def test_padding_is_counted_for_each_graph_and_for_all() -> None:
    graphs = create_graphs(Device())
    for query_lens in ([1], [3, 2], [9]):
        graphs.graph_for(plan(*query_lens))
    small, large = graphs.records()
    assert (str(small.shape), small.uses, small.real_tokens, small.padding_tokens) == ("8x2", 2, 6, 10)
    assert (str(large.shape), large.uses, large.real_tokens, large.padding_tokens) == ("16x2", 1, 9, 7)
    assert (graphs.log.real_tokens, graphs.log.padding_tokens) == (15, 17)
    assert [(r.num_tokens, r.num_rows) for r in graphs.log.recent] == [(1, 1), (5, 2), (9, 1)]


def test_lazy_captures_each_shape_once_at_its_first_use() -> None:
    device = Device()
    graphs = create_graphs(device)
    assert device.captured == []
    for query_lens in ([1], [2], [9], [1]):
        graphs.graph_for(plan(*query_lens))
    assert device.shapes() == ["8x2", "16x2"]
    assert device.trials == [], "the step waits"


def test_all_captures_every_shape_largest_first_and_nothing_later() -> None:
    device = Device()
    graphs = create_graphs(device, lazy=False)
    graphs.capture_all(progress=False)
    assert device.shapes() == ["64x8", "64x2", "16x8", "16x2", "8x8", "8x2"]
    assert device.shapes() == [str(shape) for shape in graphs.policy.shapes()]
    for query_lens in ([1], [64], [8] * 8):
        graphs.graph_for(plan(*query_lens))
    assert len(device.captured) == 6


def test_every_capture_is_warmed_up_inside_the_context_that_leaves_no_trace_and_one_graph_is_tried() -> None:
    device = Device()
    graphs = create_graphs(device, capture_warmups=3)
    graphs.capture_all(progress=False)
    assert {(warmups, inside) for _, warmups, inside in device.captured} == {(3, True)}
    assert device.trials == [FakeGraph(StepShape(64, 8))]


def test_a_shape_over_the_byte_budget_runs_in_the_smallest_larger_graph_captured() -> None:
    graphs = create_graphs(Device(bytes_of=lambda shape: 40 * MIB), graph_bytes=20 * MIB, graph_memory_mib=100)
    graphs.capture_all(progress=False)
    assert [(str(record.shape), record.bytes // MIB) for record in graphs.records()] == [
        ("16x8", 20),
        ("64x2", 20),
        ("64x8", 60),
    ]
    assert graphs.store.bytes == 100 * MIB
    assert [str(graphs.graph_for(plan(*lens))[0].shape) for lens in ([1], [1] * 8, [40])] == ["16x8", "16x8", "64x2"]
    assert graphs.log.num_eager_steps == 0


def test_a_shape_over_the_byte_budget_that_no_graph_holds_runs_eagerly_with_the_reason() -> None:
    device = Device(bytes_of=lambda shape: shape.num_tokens * MIB)
    graphs = create_graphs(device, graph_memory_mib=20)
    assert graphs.graph_for(plan(8))[1] == FakeGraph(StepShape(8, 2))
    record, graph = graphs.graph_for(plan(64))
    assert record.shape == StepShape(64, 2)
    assert graph is graphs.store.eager_twin(record.shape)
    assert graphs.log.steps == {(StepKind.DECODE, None): 1, (StepKind.DECODE, EagerReason.MEMORY_BUDGET): 1}
    graphs.graph_for(plan(64))
    assert device.shapes().count("64x2") == 1  # a shape found too large is not captured again


def test_what_a_graph_over_the_budget_left_behind_is_counted_and_smaller_graphs_use_it() -> None:
    graphs = create_graphs(Device(bytes_of=lambda shape: shape.num_tokens * MIB), graph_memory_mib=20)
    for query_lens, num_bytes in (([8], 8 * MIB), ([64], 64 * MIB), ([16], 64 * MIB)):
        record, _ = graphs.graph_for(plan(*query_lens))
        assert graphs.store.bytes == num_bytes
    assert record.eager_reason is None


def test_the_memory_of_graphs_over_the_budget_comes_back_where_no_other_shares_it() -> None:
    graphs = create_graphs(Device(bytes_of=lambda shape: shape.num_tokens * MIB), graph_memory_mib=20)
    graphs.capture_all(progress=False)
    assert [str(record.shape) for record in graphs.records()] == ["8x2", "8x8", "16x2", "16x8"]
    assert graphs.store.bytes == 16 * MIB


def test_the_memory_of_graphs_is_counted_after_captures_only() -> None:
    device = Device(lambda shape: 8 * MIB)
    graphs = create_graphs(device)
    graphs.graph_for(plan(1))
    counted = device.num_counted
    assert counted > 0
    for _ in range(10):  # as after every step
        graphs.graph_for(plan(1))
        assert graphs.store.bytes == 8 * MIB
    assert device.num_counted == counted


def test_a_budget_that_nothing_fits_runs_everything_eagerly() -> None:
    graphs = create_graphs(Device(bytes_of=lambda shape: 5 * MIB), graph_memory_mib=1)
    graphs.capture_all(progress=False)
    assert (graphs.records(), graphs.store.bytes) == ([], 0)
    for query_lens in ([1], [64], [1]):
        graphs.graph_for(plan(*query_lens))
    assert graphs.log.steps == {(StepKind.DECODE, EagerReason.MEMORY_BUDGET): 3}


def test_only_prefill_graphs_run_pure_prefills_and_all_else_runs_eagerly_with_the_reason() -> None:
    device = Device()
    graphs = create_graphs(device, cudagraph_only_prefill=True)
    graphs.graph_for(plan(1, 1))
    graphs.graph_for(plan(1, 9, prefill_rows=1))
    assert device.captured == []
    assert graphs.graph_for(plan(9, 5, prefill_rows=2))[1] == FakeGraph(StepShape(16, 2))
    assert graphs.log.steps == {
        (StepKind.DECODE, EagerReason.NOT_PURE_PREFILL): 1,
        (StepKind.MIXED, EagerReason.NOT_PURE_PREFILL): 1,
        (StepKind.PREFILL, None): 1,
    }


def test_the_limit_of_prefills_leaves_longer_ones_without_a_graph_for_a_reason_of_their_own_and_bounds_no_other_step() -> (
    None
):
    device = Device()
    graphs = create_graphs(device, max_prefill_capture_size=16)
    assert (graphs.policy.max_tokens, len(graphs.policy.shapes())) == (64, 6)
    record, graph = graphs.graph_for(plan(9, 8, prefill_rows=2))
    assert (record.shape, graph) == (StepShape(64, 2), graphs.store.eager_twin(StepShape(64, 2)))
    assert device.captured == []
    assert graphs.graph_for(plan(8, 8, prefill_rows=2))[1] == FakeGraph(StepShape(16, 2))
    assert graphs.graph_for(plan(1, 16, prefill_rows=1))[1] == FakeGraph(StepShape(64, 2))
    assert graphs.graph_for(plan(9, 8))[1] == FakeGraph(StepShape(64, 2))  # proposals to verify
    assert graphs.log.steps == {
        (StepKind.PREFILL, EagerReason.LONG_PREFILL): 1,
        (StepKind.PREFILL, None): 1,
        (StepKind.MIXED, None): 1,
        (StepKind.DECODE, None): 1,
    }


def test_only_prefill_graphs_capture_nothing_that_prompts_do_not_come_to_as_a_rule(caplog) -> None:
    settings = {"max_tokens": 256, "max_rows": 64, "capture_sizes": None, "capture_rows": None}
    every, device = create_policy(**settings).shapes(), Device()
    graphs = create_graphs(device, **settings, lazy=False, cudagraph_only_prefill=True, max_prefill_capture_size=130)
    assert "those that decode (cudagraph_only_prefill) and those that only prefill, more than 130 tokens" in caplog.text
    graphs.capture_all(progress=False)
    captured = [shape for shape, *_ in device.captured]
    assert set(every) - set(captured) == {
        shape
        for shape in every
        if shape.num_tokens > 160 or (shape.num_rows > 8 and shape.num_tokens < 2 * shape.num_rows)
    }
    assert {"160x64", "128x64", "64x8", "8x8", "1x1"} <= {str(shape) for shape in captured}
    assert not graphs.capture_spare()
    record, graph = graphs.graph_for(
        plan(*[1] * 64, prefill_rows=64)
    )  # prompts that do come to it have their graph, too
    assert (str(record.shape), record.captured, graph) == ("64x64", True, FakeGraph(record.shape))


def test_graphs_off_runs_every_step_eagerly_at_its_padded_shape_with_the_reason() -> None:
    device = Device(name="eager")
    graphs = create_graphs(device)
    graphs.capture_all(progress=False)
    record, graph = graphs.graph_for(plan(9))
    assert graph is graphs.store.eager_twin(StepShape(16, 2))
    assert record.shape == StepShape(16, 2)
    assert device.captured == []
    assert graphs.log.steps == {(StepKind.DECODE, EagerReason.GRAPHS_OFF): 1}
    assert graphs.log.padding_tokens == 7


@given(
    steps=st.lists(st.tuples(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.booleans()), max_size=20),
    budget=st.sampled_from([None, 1, 30, 70]),
    only_prefill=st.booleans(),
    name=st.sampled_from(["fake", "eager"]),
)
def test_every_step_is_counted_and_every_eager_one_has_a_reason(steps, budget, only_prefill, name) -> None:
    device = Device(bytes_of=lambda shape: shape.num_tokens * MIB, name=name)
    graphs = create_graphs(device, graph_memory_mib=budget, cudagraph_only_prefill=only_prefill)
    for query_lens, prefill in steps:
        record, graph = graphs.graph_for(plan(*query_lens, prefill_rows=len(query_lens) if prefill else 0))
        assert record is graphs.log.recent[-1]
        assert record.shape.num_tokens >= sum(query_lens)
        assert record.shape.num_rows >= len(query_lens)
        assert (graph == FakeGraph(record.shape)) == (record.eager_reason is None)
    assert graphs.log.num_steps == len(steps)
    assert graphs.log.num_eager_steps + sum(record.uses for record in graphs.records()) == len(steps)
    assert budget is None or sum(record.bytes for record in graphs.records()) <= budget * MIB


@pytest.mark.parametrize(
    "error", [DeviceMemoryError("no memory"), torch.OutOfMemoryError("none"), AssertionError("bug")]
)
def test_a_step_whose_graph_cannot_be_captured_runs_in_a_larger_one_and_else_eagerly_with_the_reason(error) -> None:
    def failing(shape: StepShape) -> None:
        if shape.num_tokens != 16:
            raise error

    device = Device(failing=failing)
    graphs = create_graphs(device)
    record, graph = graphs.graph_for(plan(4))
    assert (record.eager_reason, graph) == (EagerReason.CAPTURE_FAILED, graphs.store.eager_twin(StepShape(8, 2)))
    assert graphs.graph_for(plan(9))[1] == FakeGraph(StepShape(16, 2))
    record, graph = graphs.graph_for(plan(4))
    assert (record.eager_reason, graph, str(record.shape)) == (None, FakeGraph(StepShape(16, 2)), "16x2")
    assert device.shapes() == ["8x2", "16x2"], "what failed is not tried at each step"
    assert graphs.store.failed_captures == 1
    assert not device.inside


def test_a_graph_that_found_no_memory_is_tried_again_later_and_one_with_a_fault_is_not(monkeypatch) -> None:
    errors, now = {8: DeviceMemoryError("no memory"), 64: AssertionError("bug")}, [1000.0]

    def failing(shape: StepShape) -> None:
        if shape.num_tokens in errors:
            raise errors[shape.num_tokens]

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    device = Device(failing=failing)
    graphs = create_graphs(device)
    for _ in range(3):
        for query_lens in ([1], [64]):
            assert graphs.graph_for(plan(*query_lens))[0].eager_reason is EagerReason.CAPTURE_FAILED
    assert device.shapes() == ["8x2", "64x2"]
    errors.clear()
    now[0] += 61
    assert graphs.graph_for(plan(1))[0].eager_reason is None
    assert graphs.graph_for(plan(64))[0].eager_reason is EagerReason.CAPTURE_FAILED


def test_a_capture_that_fails_before_requests_are_served_is_an_error() -> None:
    def failing(shape: StepShape) -> None:
        raise DeviceMemoryError("no memory")

    with pytest.raises(DeviceMemoryError):
        create_graphs(Device(failing=failing), lazy=False).capture_all(progress=False)


def test_graphs_of_fewer_proposals_are_captured_in_spare_moments_smallest_first() -> None:
    device = Device()
    graphs = create_graphs(device, draft_levels=(0, 1, 3), lazy=False)
    graphs.capture_all(progress=False)
    assert device.shapes() == ["64x8+3", "64x2+3", "16x8+3", "16x2+3", "8x8+3", "8x2+3"]
    assert graphs.graph_for(replace(plan(1, 1), num_drafts=1))[0].captured  # a step that cannot wait
    del device.captured[:]
    while graphs.capture_spare():
        pass
    assert device.shapes() == [
        *("8x2", "8x8", "16x2", "16x8", "64x2", "64x8"),
        *("8x8+1", "16x2+1", "16x8+1", "64x2+1", "64x8+1"),
    ]
    for num_drafts in (0, 1, 3):
        record, _ = graphs.graph_for(replace(plan(1, 1), num_drafts=num_drafts))
        assert (record.shape.num_drafts, record.captured, record.eager_reason) == (num_drafts, False, None)


def test_all_graphs_asked_for_by_name_are_those_of_fewer_proposals_too() -> None:
    device = Device()
    graphs = create_graphs(device, draft_levels=(0, 1, 3), lazy=False, capture="all")
    graphs.capture_all(progress=False)
    assert (len(device.captured), graphs.store.num_graphs) == (18, 18)
    assert not graphs.capture_spare()


@pytest.mark.parametrize(("lazy", "name"), [(True, "fake"), (False, "eager")])
def test_nothing_is_captured_in_spare_moments_where_nothing_is_captured_ahead(lazy, name) -> None:
    device = Device(name=name)
    assert not create_graphs(device, draft_levels=(0, 3), lazy=lazy).capture_spare()
    assert device.captured == []


def test_spare_captures_keep_to_the_budget_and_survive_failures() -> None:
    def failing(shape: StepShape) -> None:
        if shape == StepShape(8, 8):
            raise DeviceMemoryError("no memory")

    device = Device(failing=failing)
    graphs = create_graphs(device, draft_levels=(0, 3), graph_bytes=10 * MIB, graph_memory_mib=80, lazy=False)
    graphs.capture_all(progress=False)
    while graphs.capture_spare():
        pass
    assert [str(r.shape) for r in graphs.records() if not r.shape.num_drafts] == ["8x2", "16x2"]
    assert (graphs.store.bytes, graphs.store.failed_captures) == (80 * MIB, 1)


# With the tiny model, whose graphs run.


@pytest.mark.parametrize("how", ["for a new prompt", "all, between two equal steps"])
def test_graphs_captured_in_the_middle_of_a_generation_do_not_change_its_tokens(create_engine, how) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    engine = create_engine(capture="lazy", block_size=64)
    alone = engine.add_request("alone", range(5, 12), params)
    drain(engine)

    engine = create_engine(capture="lazy", block_size=64)
    request = engine.add_request("first", range(5, 12), params)
    for _ in range(6):
        engine.step()
    assert len(engine.executor.runner.graphs.records()) == 1
    if how == "for a new prompt":
        engine.add_request("second", range(100, 140), params)
    else:
        engine.executor.runner.graphs.capture_all(progress=False)
    drain(engine)
    assert len(engine.executor.runner.graphs.records()) == 2
    assert request.output_token_ids == alone.output_token_ids


def test_capture_and_the_trial_at_the_largest_context_leave_no_trace(create_engine) -> None:
    engine = create_engine(capture="lazy")
    engine.add_request("running", range(60), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    for _ in range(4):
        engine.step()
    runner = engine.executor.runner
    captured = dict(runner.graphs.store._captured)  # kept: CUDA drops a memory pool with its last graph
    runner.graphs.store._captured.clear()  # the next capture is the first again, which is tried at the largest context
    assert captured
    runner.platform.synchronize()

    def snapshot() -> list[torch.Tensor]:
        state = runner.state
        caches = [
            cache[1:] for caches in runner.caches for cache in caches.block_tensors
        ]  # of the null block nobody reads
        return [t.clone() for t in (state.lines, state.tokens, state.tables, state.counter, state.ring, *caches)]

    before = snapshot()
    assert before[0][1:, 0].any()
    assert before[-1].any()
    trials = []
    try_out = runner.try_out
    runner.try_out = lambda graph: (trials.append(graph), try_out(graph))
    runner.graphs.capture_all(progress=False)
    assert len(trials) == 1
    for old, new in zip(before, snapshot(), strict=True):
        assert torch.equal(old, new)


def test_the_trial_is_no_answer_that_a_drafter_remembers(create_engine) -> None:
    def remembered(**settings) -> int:
        # With one row, nothing pads it: on CPU padding writes to the null slot too, and hides what the trial left there.
        engine = create_engine(max_num_seqs=1, capture_rows=(1,), speculative_config={"method": "suffix"}, **settings)
        if settings["capture"] == "lazy":
            engine.add_request("0", [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
            drain(engine)
        return int(engine.executor.runner.drafter._cursor)

    assert remembered(capture="lazy") == 5 + 1
    assert remembered(capture="all") == 0


def test_the_trial_runs_one_row_at_the_largest_context(create_engine) -> None:
    seen = []
    engine = create_engine(capture="lazy", capture_context_len=300, graph_backend="eager")
    runner = engine.executor.runner

    class Graph:
        def replay(self) -> None:
            line = runner.state.lines[0]
            seen.append((runner.state.plan[:2].tolist(), line[:3].tolist()))

    runner.try_out(Graph())
    assert seen == [([0, 1], [300, 299, 1])]
    assert not runner.state.lines[0].any()
