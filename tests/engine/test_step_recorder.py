"""Who watches an engine sees each step that is launched meanwhile, once, with those who took part in it."""

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import Loop

from stepgraph.engine.step_recorder import SeenRequest, SeenStep, StepRecorder


def last_news(news: list[SeenRequest]) -> dict[str, SeenRequest]:
    """The last that was told of each request, by its name."""
    return {request.name: request for request in news}


def recording(loop: Loop, **options) -> StepRecorder:
    return StepRecorder(loop.engine, count(1), clock=loop.clock, **options)


@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.booleans()), min_size=1, max_size=7),
    num_drafts=st.sampled_from([0, 0, 1, 3]),
    run_ahead=st.integers(0, 2),
    num_kv_blocks=st.integers(18, 80),
    begin=st.integers(0, 12),
    aborts=st.sets(st.integers(1, 40), max_size=2),
    every=st.integers(1, 9),
)
@settings(max_examples=60)
def test_each_token_of_each_request_is_seen_in_one_step(
    prompts, num_drafts, run_ahead, num_kv_blocks, begin, aborts, every
) -> None:
    loop = Loop(
        max_tokens=24,
        num_kv_blocks=num_kv_blocks,
        run_ahead=run_ahead,
        num_drafts=(num_drafts,),
        prefix_caching=False,
    )
    requests = [
        loop.add(f"r{index}", length, most, stop=stop) for index, (length, most, stop) in enumerate(prompts[:-1])
    ]
    for _ in range(begin):
        loop.step()
    recorder = recording(loop)
    under_way = len(loop.in_flight)  # launched before: nobody sees them
    before = {request.id: len(request.output_token_ids) for request in requests}
    known = [request for request in requests if request.finish_reason is None]
    length, most, stop = prompts[-1]
    late = loop.add("late", length, most, stop=stop)
    steps: list[SeenStep] = []
    news: list[SeenRequest] = []
    num_plans = len(loop.plans)
    for number in range(400):
        if number in aborts:
            loop.scheduler.abort("late")
        loop.step()
        if number % every == 0:
            taken = recorder.take()
            steps, news = steps + taken[0], news + taken[1]
    steps_left, news_left, dropped = recorder.take()
    steps, news = steps + steps_left, news + news_left
    assert not loop.in_flight
    assert len(steps) == len(loop.plans) - num_plans
    assert dropped == 0
    told = last_news(news)
    assert told.keys() >= {request.id for request in known}
    assert len({request.id for request in news}) == len(told), "one number for each"
    chunks, gained = Counter(), Counter()
    for step in steps:
        assert len(step.ids) == step.rows
        for row, (number, tokens) in enumerate(zip(step.ids, step.gained, strict=True)):
            (chunks if row < step.prompts else gained)[number] += tokens
    for request in (*known, late):
        seen = told[request.id]
        assert (seen.state, seen.finish_reason) == ("finished", str(request.finish_reason))
        assert (seen.prompt_tokens, seen.output_tokens) == (request.prompt_len, len(request.output_token_ids))
        assert None not in (seen.arrived, seen.finished)
        if request is late and not request.num_preemptions and seen.finish_reason != "abort":
            assert chunks[seen.id] == request.prompt_len
            assert gained[seen.id] == len(request.output_token_ids) - 1, "the first comes with the prompt's last chunk"
            assert seen.arrived <= seen.scheduled <= seen.first_token <= seen.finished
        if request is not late and before[request.id] and not under_way and not request.num_preemptions:
            assert gained[seen.id] == len(request.output_token_ids) - before[request.id]
            assert seen.first_token is None, "nobody looked when it came"


def test_what_is_seen_is_what_the_engine_reports() -> None:
    loop, reports = Loop(max_tokens=24, num_drafts=(3,), run_ahead=1), []
    note = loop.engine.on_step
    loop.engine.on_step = lambda report: (note(report), reports.append(report))
    recorder = recording(loop)
    for index, length in enumerate((3, 30, 9)):
        loop.add(f"r{index}", length, 8)
    loop.drain()
    steps, _, _ = recorder.take()
    assert len(steps) == len(reports) > 4
    assert {step.kind for step in steps} > {"decode"}
    for step, report in zip(steps, reports, strict=True):
        record = report.record
        assert (step.kind, step.tokens, step.rows) == (str(record.kind), record.num_tokens, record.num_rows)
        assert (step.padding, step.graph, step.reason) == (record.padding_tokens, str(record.shape), None)
        assert step.start + step.device_us / 1e6 == pytest.approx(report.collected_at)
        assert step.plan_us + step.read_us == pytest.approx(1e6 * report.host_seconds)
        decodes = report.decodes
        assert step.proposed == sum(row.num_verified for row in decodes)
        assert step.accepted == sum(row.num_accepted for row in decodes)
    assert sum(step.accepted for step in steps) > 0


def test_steps_that_nobody_takes_make_way_and_are_counted() -> None:
    loop = Loop()
    recorder = recording(loop, max_steps=5)
    loop.add("a", 3, 30)
    loop.drain()
    steps, _, dropped = recorder.take()
    assert (len(steps), dropped) == (5, len(loop.plans) - 5)
    assert recorder.take() == ([], [], 0)


def test_an_engine_that_is_watched_no_longer_is_as_before() -> None:
    loop = Loop()
    before = loop.engine.on_step
    recorder = recording(loop)
    loop.add("a", 3, 30)
    for _ in range(5):
        loop.step()
    assert loop.engine.on_step != before
    recorder.end()
    assert loop.engine.on_step == before
    seen = len(recorder.take()[0])
    loop.drain()
    assert (seen, recorder.take()[0]) == (5, [])


def test_a_request_that_is_aborted_while_a_step_of_it_is_under_way_keeps_its_number() -> None:
    loop = Loop(run_ahead=1)
    recorder = recording(loop)
    loop.add("a", 3, 30)
    loop.step()
    assert [request.state for request in recorder.take()[1]] == ["running"]
    loop.scheduler.abort("a")
    [told] = recorder.take()[1]
    assert (told.state, told.finish_reason) == ("finished", "abort")
    loop.drain()
    steps, news, _ = recorder.take()
    assert [step.ids for step in steps] == [[told.id]]
    assert news == []
