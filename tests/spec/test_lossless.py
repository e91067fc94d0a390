"""Speculation changes how fast answers come, and nothing about them."""

import random
from dataclasses import replace

import pytest
import torch
from scripted import ScriptedDrafter, wrong_commit
from tiny import EOS, MAX_MODEL_LEN, VOCAB_SIZE, drain, set_run_ahead

from stepgraph import ops
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams

METHODS = ("mtp", "suffix", "ngram", "hybrid")


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy or sampled, with any mixture of features."""

    def maybe(**settings) -> dict:
        return settings if rng.random() < 0.3 else {}

    return SamplingParams(
        temperature=rng.choice((0, 0.7, 1.1)),
        seed=rng.getrandbits(64),
        max_tokens=rng.randint(1, 40),
        ignore_eos=True,
        **maybe(top_k=rng.randint(1, 50)),
        **maybe(top_p=rng.uniform(0.3, 1.0)),
        **maybe(repetition_penalty=rng.uniform(0.6, 1.8)),
        **maybe(presence_penalty=rng.uniform(-2, 2), frequency_penalty=rng.uniform(-2, 2)),
        **maybe(logit_bias={rng.randrange(VOCAB_SIZE): rng.uniform(-9, 9) for _ in range(5)}),
        **maybe(bad_words=[chr(rng.randrange(97, 123)) for _ in range(4)]),
        **maybe(allowed_token_ids=rng.sample(range(VOCAB_SIZE), 40)),
        **maybe(stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), 12)), min_tokens=1),
        **maybe(logprobs=rng.randint(0, 5)),
        **maybe(prompt_logprobs=rng.randint(0, 3)),
        **maybe(speculative={"num_speculative_tokens": rng.randint(0, 3)}),
    )


def random_case(number: int) -> tuple[list[int], SamplingParams]:
    """A prompt with a first token of its own; many repeat themselves, so that looking back finds something."""
    rng = random.Random(number)
    phrase = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(2, 12))]
    stem = [3 * i % VOCAB_SIZE for i in range(rng.choice((0, 20, 33)))]
    return [number + 1, *stem, *(phrase * rng.randint(1, 5))], random_params(rng)


CASES = [random_case(number) for number in range(30)]


def run(engine: Engine, cases=CASES, seed: int = 0) -> list[Request]:
    """Let the cases arrive while others run; a few more are aborted on their way."""
    rng = random.Random(seed)
    requests: list[Request] = []
    while len(requests) < len(cases) or engine.has_work:
        while len(requests) < len(cases) and (not engine.has_work or rng.random() < 0.4):
            prompt, params = cases[len(requests)]
            number = len(requests)
            requests.append(engine.add_request(f"r{number}", prompt, params, priority=rng.randint(0, 2)))
            if number % 5 == 0:
                engine.add_request(f"aborted {number}", [250, *prompt], replace(params, prompt_logprobs=None))
        if rng.random() < 0.1:
            engine.abort(f"aborted {rng.randrange(len(requests)) // 5 * 5}")
        engine.step()
    return requests


def answers(requests: list[Request]) -> list[tuple]:
    return [(request.output_token_ids, request.finish_reason, request.stop_token) for request in requests]


def assert_same(found: list[Request], expected: list[Request]) -> None:
    assert answers(found) == answers(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("output_logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert (a.token, [t for t, _ in a.top]) == (b.token, [t for t, _ in b.top])
                    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.fixture(scope="module")
def plain(create_engine) -> list[Request]:
    """What each case gets without speculation, eagerly."""
    return run(create_engine(graph_backend="eager"))


@pytest.fixture
def create_scripted(create_engine, plain, device):
    """Makes engines whose drafter knows what `plain` got."""

    def create(**settings) -> Engine:
        known = [(case[0], request.output_token_ids) for case, request in zip(CASES, plain, strict=True)]
        drafter = ScriptedDrafter(known, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, device=device)
        return create_engine(drafter=drafter, **settings)

    return create


def speculative(method: str = "ngram", num: int = 4, **settings) -> dict:
    return {"speculative_config": {"method": method, "num_speculative_tokens": num, "adaptive": False, **settings}}


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("num_drafts", [1, 3, 8])
def test_proposals_that_often_stand_change_no_answer(create_scripted, plain, backend, num_drafts):
    engine = create_scripted(graph_backend=backend, **speculative(num=num_drafts))
    requests = run(engine)
    assert_same(requests, plain)
    drafted = sum(request.num_draft_tokens for request in requests)
    accepted = sum(len(request.accepted) for request in requests)
    assert drafted / 3 < accepted < drafted, "proposals must stand and fall"
    if backend == "auto":
        assert engine.executor.statistics.num_eager_steps == 0


@pytest.mark.parametrize("num_drafts", [2, 5])
def test_steps_planned_before_results_are_read_change_no_answer(create_scripted, plain, num_drafts):
    """As on a GPU: the host plans a step before it knows how many proposals of the one before stood."""
    engine = create_scripted(graph_backend="eager", **speculative(num=num_drafts))
    set_run_ahead(engine, 1)
    assert_same(run(engine), plain)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_kv_blocks": 12}, id="preemption"),
        pytest.param({"max_num_batched_tokens": 11, "capture_sizes": (11,)}, id="a size that is no multiple of 1 + K"),
        pytest.param({"max_num_batched_tokens": 8, "capture_sizes": (8,)}, id="no room for proposals of all rows"),
        pytest.param(
            {"max_num_batched_tokens": 16, "capture_sizes": (16,), "max_num_partial_prefills": 3}, id="chunks"
        ),
        pytest.param({"enable_prefix_caching": False}, id="no prefix cache"),
    ],
)
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_tight_limits_change_no_answer(create_scripted, plain, settings, steps_ahead):
    engine = create_scripted(graph_backend="eager", max_model_len=160, **speculative(num=5), **settings)
    if steps_ahead:
        set_run_ahead(engine, 1)
    requests = run(engine)
    assert_same(requests, plain)
    if "num_kv_blocks" in settings:
        assert engine.scheduler.statistics.preemptions > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_graphs_changes_no_answer(create_engine, plain, method):
    engine = create_engine(**speculative(method, 3))
    requests = run(engine)
    assert_same(requests, plain)
    assert engine.executor.statistics.num_eager_steps == 0
    assert sum(request.num_draft_tokens for request in requests) > 0


@pytest.mark.parametrize("method", ["mtp", "hybrid"])
def test_a_draft_model_survives_preemption_chunks_and_shared_prefixes(create_engine, plain, method):
    engine = create_engine(
        graph_backend="eager",
        num_kv_blocks=11,
        max_model_len=160,
        max_num_batched_tokens=16,
        capture_sizes=(16,),
        **speculative(method, 4),
    )
    set_run_ahead(engine, 1)
    assert_same(run(engine), plain)
    assert engine.scheduler.statistics.preemptions > 0


def test_an_adaptive_number_of_proposals_changes_no_answer(create_scripted, plain):
    engine = create_scripted(graph_backend="eager", **speculative(num=6, adaptive=True))
    assert_same(run(engine), plain)


@pytest.mark.parametrize(
    ("name", "accept"),
    [
        ("all stand", lambda sampled, proposed: torch.where(proposed >= 0, proposed, sampled)),
        (
            "near misses stand",
            lambda sampled, proposed: torch.where((proposed - sampled).abs() <= 1, proposed, sampled),
        ),
    ],
)
def test_a_wrong_rule_of_acceptance_is_noticed(create_scripted, plain, monkeypatch, name, accept):
    monkeypatch.setattr(ops, "commit", wrong_commit(accept))
    requests = run(create_scripted(graph_backend="eager", **speculative()))
    assert answers(requests) != answers(plain), name


def test_a_request_can_switch_speculation_off(create_scripted, plain):
    engine = create_scripted(graph_backend="eager", **speculative())
    requests = run(engine)
    for request in requests:
        limit = request.params.max_num_drafts
        if limit == 0:
            assert request.num_draft_tokens == 0
    assert any(request.params.max_num_drafts == 0 for request in requests)
    assert any(request.num_draft_tokens for request in requests)


def test_stop_tokens_end_answers_inside_an_accepted_run(create_scripted, plain):
    engine = create_scripted(graph_backend="eager", **speculative(num=8))
    requests = run(engine)
    stopped = [request for request in requests if request.stop_token is not None]
    assert stopped
    for request in stopped:
        assert request.output_token_ids[-1] == request.stop_token
        assert request.stop_token not in request.output_token_ids[:-1]


def test_eos_ends_an_answer(create_engine):
    """Without `ignore_eos`, the model's own end token is a stop token like any other."""
    params = SamplingParams(temperature=0, max_tokens=30, logit_bias={EOS: 100.0}, min_tokens=7)
    found = []
    for settings in ({}, speculative("suffix", 5)):
        engine = create_engine(graph_backend="eager", **settings)
        request = engine.add_request("r", [1, 2, 3] * 4, params)
        drain(engine)
        found.append(request.output_token_ids)
    assert found[0] == found[1]
    assert len(found[0]) == 8
    assert found[0][-1] == EOS
