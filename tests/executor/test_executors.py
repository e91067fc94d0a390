"""What an engine may count on, whatever executor runs its steps."""

import pickle
from array import array
from collections.abc import Callable

import numpy as np
import pytest
from adder import fake_executor
from tiny import TINY_SETTINGS

from stepgraph.abi import slot_line
from stepgraph.config import EngineConfig
from stepgraph.executor.base import Executor
from stepgraph.executor.build import build_local_executor
from stepgraph.models.source import ModelSource, resolve
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepKind, StepPlan
from stepgraph.step.results import StepResults
from stepgraph.step.shape import Variant
from stepgraph.step.slot_sampling import SlotSampling

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OTHER = [2, 7, 1, 8]


@pytest.fixture(scope="module")
def source(tiny_model) -> ModelSource:
    return resolve(tiny_model)


@pytest.fixture(params=["local", "fake"])
def create(request, source, tiny_model, device) -> Callable[[], Executor]:
    """Makes executors of one kind."""
    settings = {"model": tiny_model, "device": device, "capture": "lazy", "enable_sleep_mode": True}
    config = EngineConfig.from_settings(**TINY_SETTINGS | settings)
    return fake_executor if request.param == "fake" else lambda: build_local_executor(config, source)


@pytest.fixture
def executor(create) -> Executor:
    return create()


def admit(executor: Executor, slot: int, tokens, *, generation: int = 1, max_length: int = 64, **sampling) -> None:
    executor.admit(
        Admission(
            slot,
            tokens=array("i", tokens),
            prompt_len=len(tokens),
            blocks=(),
            computed=0,
            generation=generation,
            max_length=max_length,
            sampling=SlotSampling(seed=0, **sampling),
        )
    )


def run(executor: Executor, *rows: tuple[int, int], deltas=(), prefills: int = 0, variant=Variant.PLAIN) -> StepResults:
    ticket = executor.launch(StepPlan(rows, tuple(deltas), prefills, variant))
    executor.wait(ticket)
    return executor.collect(ticket)


def tokens_of(results: StepResults, row: int = 0) -> list[int]:
    return list(results.rows[row].tokens)


def answer(
    executor: Executor, prompt, *, slot: int = 1, generation: int = 1, chunk: int = 48, count: int = 6
) -> list[int]:
    """The first tokens after a prompt, computed in chunks, in the KV block of the slot's number."""
    admit(executor, slot, prompt, generation=generation)
    found: list[int] = []
    for start in range(0, len(prompt), chunk):
        row = slot, min(chunk, len(prompt) - start)
        found += tokens_of(run(executor, row, deltas=[(slot, 0, slot)] if not start else (), prefills=1))
    while len(found) < count:
        found += tokens_of(run(executor, (slot, 1)))
    return found


def test_specs_are_plain_values_that_fit_each_other(executor) -> None:
    specs = executor.specs
    assert pickle.loads(pickle.dumps(specs)) == specs
    assert list(specs.token_sizes) == sorted(set(specs.token_sizes))
    assert specs.token_sizes[-1] == specs.max_tokens
    assert list(specs.draft_levels) == sorted(set(specs.draft_levels))
    assert specs.num_kv_blocks > 1
    assert specs.run_ahead >= 0
    assert specs.longest_step_s >= 0


def test_what_goes_in_and_comes_out_can_be_sent_to_another_process(executor) -> None:
    admit(executor, 1, PROMPT)
    plan = pickle.loads(pickle.dumps(StepPlan(((1, 8),), ((1, 0, 1),), 1)))
    ticket = pickle.loads(pickle.dumps(executor.launch(plan)))
    executor.wait(ticket)
    results = executor.collect(ticket)
    again = pickle.loads(pickle.dumps(results))
    assert again.rows == results.rows
    assert results.table.dtype == np.int32


def test_an_answer_depends_on_its_prompt_alone(executor) -> None:
    expected = answer(executor, PROMPT)
    assert len(set(expected)) > 1
    assert answer(executor, PROMPT, slot=5, generation=9) == expected
    assert answer(executor, PROMPT, chunk=3, generation=2) == expected
    assert answer(executor, OTHER, generation=3) != expected


def test_rows_of_one_step_get_what_each_gets_alone_and_say_whose_they_are(executor) -> None:
    alone = [answer(executor, prompt, count=2) for prompt in (PROMPT, OTHER)]
    for slot, generation, prompt in ((3, 7, PROMPT), (2, 8, OTHER)):
        admit(executor, slot, prompt, generation=generation)
    first = run(executor, (3, len(PROMPT)), (2, len(OTHER)), deltas=[(3, 0, 3), (2, 0, 2)], prefills=2)
    assert [(row.slot, row.generation, row.finish) for row in first.rows] == [(3, 7, 0), (2, 8, 0)]
    second = run(executor, (2, 1), (3, 1))
    assert [row.slot for row in second.rows] == [2, 3]
    assert [tokens_of(first, 0) + tokens_of(second, 1), tokens_of(first, 1) + tokens_of(second, 0)] == alone


def test_a_request_ends_at_its_length_and_runs_nothing_after(executor) -> None:
    admit(executor, 1, PROMPT, max_length=len(PROMPT) + 2)
    finishes = [run(executor, (1, 8), deltas=[(1, 0, 1)], prefills=1).rows[0].finish]
    finishes += [run(executor, (1, 1)).rows[0].finish]
    assert finishes == [slot_line.RUNNING, slot_line.FINISHED_LENGTH]
    assert tokens_of(run(executor, (1, 1))) == []


def test_steps_launched_ahead_are_collected_in_their_order(executor) -> None:
    expected = answer(executor, PROMPT)
    admit(executor, 1, PROMPT, generation=2)
    plans = [StepPlan(((1, 8),), ((1, 0, 1),), 1)] + [StepPlan(((1, 1),), (), 0, epoch=1)] * 5
    tickets, found = [], []
    for plan in plans:
        tickets.append(executor.launch(plan))
        if len(tickets) > executor.specs.run_ahead:
            executor.wait(tickets[0])
            found += tokens_of(executor.collect(tickets.pop(0)))
    for ticket in tickets:
        executor.wait(ticket)
        found += tokens_of(executor.collect(ticket))
    assert found == expected


def test_a_masked_slot_samples_what_its_mask_allows_from_the_next_step_on(executor) -> None:
    words = -(-executor.specs.vocab_size // slot_line.MASK_BITS)

    def only(token: int) -> np.ndarray:
        masks = np.zeros((1, words), dtype=np.int32)
        masks[0, token // slot_line.MASK_BITS] = 1 << token % slot_line.MASK_BITS
        return masks

    admit(executor, 1, PROMPT, masked=True)
    executor.set_masks(1, only(40))
    first = run(executor, (1, 8), deltas=[(1, 0, 1)], prefills=1, variant=Variant.EXTENDED)
    executor.set_masks(1, only(7))
    second = run(executor, (1, 1), variant=Variant.EXTENDED)
    assert [tokens_of(first), tokens_of(second)] == [[40], [7]]


def test_the_log_and_the_tickets_say_what_ran(executor) -> None:
    admit(executor, 1, PROMPT)
    ticket = executor.launch(StepPlan(((1, 8),), ((1, 0, 1),), 1))
    record = ticket.record
    assert (record.kind, record.num_tokens, record.num_rows) == (StepKind.PREFILL, 8, 1)
    assert (record.shape.num_tokens, record.shape.num_rows) >= (8, 1)
    executor.wait(ticket)
    executor.collect(ticket)
    run(executor, (1, 1))
    assert [entry.kind for entry in executor.statistics.recent] == [StepKind.PREFILL, StepKind.DECODE]
    assert executor.statistics.num_steps == 2
    assert executor.statistics.real_tokens == 9


def test_after_recovering_requests_admitted_anew_get_their_answers(executor) -> None:
    expected = answer(executor, PROMPT)
    admit(executor, 1, PROMPT, generation=2)
    ticket = executor.launch(StepPlan(((1, 8),), ((1, 0, 1),), 1))
    executor.recover()  # as after a launch that failed, with this one under way
    executor.wait(ticket)
    assert tokens_of(executor.collect(ticket)) == expected[:1]
    assert answer(executor, PROMPT, slot=2, generation=3) == expected


@pytest.mark.parametrize("keep_weights", [True, False])
def test_sleep_loses_the_cache_and_wakes_to_the_same_answers(executor, source, keep_weights) -> None:
    expected = answer(executor, PROMPT)
    executor.sleep(keep_weights=True)
    if not keep_weights:
        executor.sleep(keep_weights=False)
    executor.wake()
    if not keep_weights:
        executor.check_weights(source)
        executor.write_weights()
    assert answer(executor, PROMPT, generation=2) == expected


def test_weights_are_checked_while_steps_are_under_way_and_written_while_none_is(executor, source) -> None:
    expected = answer(executor, PROMPT)
    admit(executor, 1, PROMPT, generation=2)
    ticket = executor.launch(StepPlan(((1, 8),), ((1, 0, 1),), 1))
    executor.check_weights(source)
    executor.wait(ticket)
    assert tokens_of(executor.collect(ticket)) == expected[:1]
    executor.write_weights()
    assert answer(executor, PROMPT, generation=3) == expected


def test_whoever_watches_hears_of_captures_and_the_counts_are_those_of_the_graphs(executor) -> None:
    heard: list[int] = []
    executor.watch_captures(lambda: heard.append(executor.graph_counts().num_graphs))
    executor.watch_cache(lambda: None)
    answer(executor, PROMPT)
    counts, records = executor.graph_counts(), executor.graph_records()
    assert heard == list(range(counts.num_graphs))
    assert len(records) == counts.num_graphs
    assert sum(record.uses for record in records) + executor.statistics.num_eager_steps <= executor.statistics.num_steps
    assert counts.bytes >= 0 <= counts.capture_seconds


def test_preparing_comes_to_an_end(executor) -> None:
    assert any(not executor.prepare() for _ in range(200))


def test_nothing_runs_after_the_end(executor) -> None:
    answer(executor, PROMPT, count=2)
    executor.close()
    with pytest.raises((AssertionError, AttributeError)):
        run(executor, (1, 1))
