"""Requests that start from states which others have left, of a model of linear recurrences and attention: they answer what a loop
over their tokens in float64 does."""

import random
from collections.abc import Callable

import pytest
from mixed_model import RECURRENT, MixedModel, engines_of
from scripted import ScriptedDrafter, watch_drafts
from tiny import MAX_MODEL_LEN, VOCAB_SIZE, drain, set_run_ahead

from stepgraph.abi import slot_line
from stepgraph.engine import state_lines
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.state_lines import StateLines
from stepgraph.layers.inputs import LineRows
from stepgraph.layers.recurrent import RecurrentCache
from stepgraph.verify.graphs import verify_graphs

SHARED = 40
NUM_TOKENS = 12


def random_prompt(number: int) -> list[int]:
    """One of two beginnings, then a token of its own, then any number of others."""
    rng = random.Random(number)
    beginning = [random.Random(f"{number % 2} {place}").randrange(VOCAB_SIZE) for place in range(SHARED)]
    return [*beginning, number + 1, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(70)))]


PROMPTS = [random_prompt(number) for number in range(10)]


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    return [MixedModel(RECURRENT).answer(prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture
def create(tiny_model, device, monkeypatch) -> Callable[..., Engine]:
    monkeypatch.setattr(state_lines, "SHARED_TOKENS", 16)
    monkeypatch.setattr(state_lines, "PROMPT_TOKENS", 32)
    return engines_of(tiny_model, device, RECURRENT)


def run(engine: Engine, *, preemption: float = 0.0) -> list[list[int]]:
    """Let the prompts arrive, twice each, while others run. With a chance of `preemption` at each step, the last that runs is
    sent back to wait, with what it has left in the cache."""
    rng, requests = random.Random(0), []
    while len(requests) < 2 * len(PROMPTS) or engine.has_work:
        if len(requests) < 2 * len(PROMPTS) and (not engine.has_work or rng.random() < 0.3):
            params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
            number = len(requests)
            requests.append(engine.add_request(f"{number}", PROMPTS[number % len(PROMPTS)], params))
        if rng.random() < preemption and engine.scheduler.num_running > 1:
            engine.scheduler._steady = None
            engine.scheduler._preempt(engine.scheduler.running()[-1])
        engine.step()
    assert sum(request.num_cached_tokens > 0 for request in requests) > 2
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"graph_backend": "eager", "max_num_batched_tokens": 21, "capture_sizes": None},
        {"max_num_seqs": 4, "block_size": 4},
        {"num_kv_blocks": 24},
    ],
    ids=["", "of prompts in chunks", "of which few are kept", "that lose their blocks"],
)
@pytest.mark.parametrize("preemption", [0.0, 0.2])
def test_answers_are_those_of_a_loop(create, answers, settings, preemption) -> None:
    engine = create(**settings)
    assert run(engine, preemption=preemption) == 2 * answers
    assert preemption == 0 or engine.scheduler.statistics.preemptions > 5


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_answers_are_the_same_where_proposals_stand_and_fall(create, answers, device, run_ahead) -> None:
    known = list(zip(PROMPTS, answers, strict=True))
    drafter = ScriptedDrafter(known, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, device=device, place=SHARED)
    speculative = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    engine = create(drafter=drafter, graph_backend="eager", **speculative)
    set_run_ahead(engine, run_ahead)
    drafts = watch_drafts(engine)
    assert run(engine, preemption=0.1) == 2 * answers
    assert {stood < num for num, stood in drafts} == {True, False}


def test_nothing_is_found_after_states_were_lost(create, answers) -> None:
    engine = create(enable_sleep_mode=True, graph_backend="eager")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    found = []
    for number in range(4):
        request = engine.add_request(f"{number}", PROMPTS[0], params)
        if number == 2:
            engine.step()
            engine.sleep()
            engine.wake_up()
        drain(engine)
        assert request.output_token_ids == answers[0]
        found.append(request.num_cached_tokens > 0)
    assert found == [False, True, True, True]  # the third had found them before they were lost, and computed them again


take, plan_row = LineRows.take, StateLines.plan_row


def reads_its_own(table, row_slot) -> LineRows:
    lines = take(table, row_slot)
    return lines._replace(read=lines.write)


def writes_what_it_reads(table, row_slot) -> LineRows:
    lines = take(table, row_slot)
    return lines._replace(write=lines.read)


def stays_at_its_line(table, row_slot) -> LineRows:
    before = table.clone()
    lines = take(table, row_slot)
    table[:, slot_line.READ_LINE] = before[:, slot_line.READ_LINE]
    return lines


def keeps_a_step_too_early(lines, request, end, name):
    return plan_row(lines, request, end + 16, name)


MUTANTS = {
    "reads its own line": (LineRows, "take", staticmethod(reads_its_own)),
    "writes a checkpoint": (LineRows, "take", staticmethod(writes_what_it_reads)),
    "reads a checkpoint again": (LineRows, "take", staticmethod(stays_at_its_line)),
    "keeps a state too early": (StateLines, "plan_row", keeps_a_step_too_early),
}


@pytest.mark.parametrize(("owner", "name", "mutant"), MUTANTS.values(), ids=MUTANTS)
def test_mutant_of_the_lines_changes_tokens(create, answers, monkeypatch, owner, name, mutant) -> None:
    monkeypatch.setattr(owner, name, mutant)
    assert run(create(graph_backend="eager", max_num_batched_tokens=21, capture_sizes=None)) != 2 * answers


@pytest.mark.parametrize(
    ("mutant", "said"),
    [(reads_its_own, "which hold NaN"), (writes_what_it_reads, "1 cache entries of no token of the step were written")],
)
def test_mutant_of_the_lines_fails_the_check(create, monkeypatch, mutant, said) -> None:
    monkeypatch.setattr(LineRows, "take", staticmethod(mutant))
    reports = verify_graphs(create().executor, rounds=8, seed=0)
    assert any(said in mismatch for report in reports for mismatch in report.mismatches)


def test_rows_read_other_lines_than_they_write_in_the_check(create, monkeypatch) -> None:
    """Else it would prove nothing of that."""
    apart = []
    rows = RecurrentCache.rows

    def watched(cache, inputs):
        apart.append(bool((inputs.lines.read != inputs.lines.write).any()))
        return rows(cache, inputs)

    monkeypatch.setattr(RecurrentCache, "rows", watched)
    verify_graphs(create(graph_backend="eager").executor, rounds=2, seed=0)
    assert any(apart)
