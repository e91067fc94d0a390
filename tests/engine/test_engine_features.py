"""Prefix cache, preemption, priorities and every sampling feature on the tiny model: the tokens a request gets alone, all in
graphs."""

import random
from dataclasses import replace

import pytest
import torch
from tiny import EOS, VOCAB_SIZE, drain

from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
STEM = [(7 * i * i + 3) % VOCAB_SIZE for i in range(70)]


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy or sampled, with any mixture of features."""

    def maybe(**settings) -> dict:
        return settings if rng.random() < 0.35 else {}

    return SamplingParams(
        temperature=rng.choice((0, 0.8, 1.2)),
        seed=rng.getrandbits(64),
        max_tokens=rng.randint(1, 24),
        ignore_eos=True,
        **maybe(top_k=rng.randint(1, 50)),
        **maybe(top_p=rng.uniform(0.3, 1.0)),
        **maybe(min_p=rng.uniform(0.0, 0.2)),
        **maybe(repetition_penalty=rng.uniform(0.6, 1.8)),
        **maybe(presence_penalty=rng.uniform(-2, 2), frequency_penalty=rng.uniform(-2, 2)),
        **maybe(logit_bias={rng.randrange(VOCAB_SIZE): rng.uniform(-9, 9) for _ in range(5)}),
        **maybe(bad_words=[chr(rng.randrange(97, 123)) for _ in range(4)]),
        **maybe(allowed_token_ids=rng.sample(range(VOCAB_SIZE), 40)),
        **maybe(stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), 12)), min_tokens=1),
        **maybe(logprobs=rng.randint(0, 5)),
    )


def random_prompt(rng: random.Random) -> list[int]:
    """Most start alike."""
    stem = STEM[: rng.randint(0, 70)]
    return stem + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]


CASES = [(random_prompt(rng), random_params(rng)) for rng in map(random.Random, range(30))]


def run(engine, cases=CASES, seed: int = 0) -> list[Request]:
    """Let the cases arrive while others run."""
    rng = random.Random(seed)
    requests: list[Request] = []
    while len(requests) < len(cases) or engine.has_work:
        while len(requests) < len(cases) and (not engine.has_work or rng.random() < 0.4):
            prompt, params = cases[len(requests)]
            requests.append(engine.add_request(f"r{len(requests)}", prompt, params, priority=rng.randint(0, 2)))
        engine.step()
    return requests


def answers(requests: list[Request]) -> list[tuple]:
    return [(request.output_token_ids, request.finish_reason, request.stop_token) for request in requests]


@pytest.fixture(scope="module")
def alone(create_engine) -> list[Request]:
    """What each case gets alone, eagerly, from scratch."""
    engine = create_engine(
        graph_backend="eager",
        max_num_seqs=1,
        max_num_batched_tokens=128,
        capture_sizes=None,
        capture_rows=None,
        enable_prefix_caching=False,
    )
    requests = []
    for number, (prompt, params) in enumerate(CASES):
        requests.append(engine.add_request(str(number), prompt, params))
        drain(engine)
    return requests


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"num_kv_blocks": 16},
        {"num_kv_blocks": 40, "block_size": 4, "max_num_batched_tokens": 24, "capture_sizes": (8, 24)},
        {"max_num_partial_prefills": 3, "long_prefill_token_threshold": 50},
        {"insertion_policy": "gather", "prefill_gather_size": 3, "prefill_gather_ms": 5},
        {"insertion_policy": "gather", "cudagraph_only_prefill": True},
    ],
    ids=["default", "no prefix cache", "little memory", "small blocks", "partial prefills", "gather", "as the seed"],
)
def test_every_mixture_of_features_gets_the_tokens_it_gets_alone(create_engine, alone, settings) -> None:
    engine = create_engine(**settings)
    requests = run(engine)
    assert answers(requests) == answers(alone)
    statistics, pool = engine.scheduler.statistics, engine.executor.statistics
    assert (statistics.cached_prompt_tokens > 100) == settings.get("enable_prefix_caching", True)
    assert sum(request.num_cached_tokens for request in requests) == statistics.cached_prompt_tokens
    assert (statistics.preemptions > 0) == ("num_kv_blocks" in settings)
    if settings.get("cudagraph_only_prefill"):
        assert set(pool.steps) == {("prefill", None), ("decode", "not_pure_prefill")}
    else:
        assert pool.num_eager_steps == 0
    assert engine.scheduler.num_free_blocks == engine.executor.runner.num_kv_blocks - 1
    for request, reference in zip(requests, alone, strict=True):
        for ours, theirs in zip(request.output_logprobs, reference.output_logprobs, strict=True):
            assert (ours.token, ours.rank, [t for t, _ in ours.top]) == (
                theirs.token,
                theirs.rank,
                [t for t, _ in theirs.top],
            )
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_a_step_runs_the_extended_graph_only_while_a_row_needs_it(create_engine) -> None:
    reference = create_engine()
    expected = reference.add_request("plain", STEM, GREEDY)
    drain(reference)
    engine = create_engine()
    plain = engine.add_request("plain", STEM, GREEDY)
    for _ in range(5):
        engine.step()
    engine.add_request("extended", STEM[:5], replace(GREEDY, max_tokens=4, logprobs=1))
    drain(engine)
    variants = [record.shape.variant.name for record in engine.executor.statistics.recent]
    assert variants == ["PLAIN"] * 5 + ["EXTENDED"] * 4 + ["PLAIN"] * 12
    assert plain.output_token_ids == expected.output_token_ids


def test_several_requests_of_one_prompt_compute_it_once(create_engine) -> None:
    engine = create_engine(max_num_batched_tokens=128, capture_sizes=(8, 128))
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=12, ignore_eos=True) for seed in range(4)]
    requests = [engine.add_request(f"r{i}", STEM, p) for i, p in enumerate(params)]
    engine.step()
    [record] = engine.executor.statistics.recent
    assert record.num_tokens == 70 + 3 * 6  # 64 of the 70 tokens are shared within the step
    drain(engine)
    assert [request.num_cached_tokens for request in requests] == [0, 64, 64, 64]
    for request, p in zip(requests, params, strict=True):
        fresh = create_engine()
        reference = fresh.add_request("alone", STEM, p)
        drain(fresh)
        assert request.output_token_ids == reference.output_token_ids


def test_logprobs_are_those_of_the_models_logits(create_engine) -> None:
    engine = create_engine(graph_backend="eager")
    logits: list[torch.Tensor] = []
    replay = engine.executor.runner.graphs.store.eager_twin

    def spy(shape):
        class Graph:
            def replay(self):
                output = replay(shape).replay()
                logits.append(output.logits[0].double().clone())
                return output

        return Graph()

    engine.executor.runner.graphs.store.eager_twin = spy
    params = SamplingParams(temperature=1, seed=3, max_tokens=6, ignore_eos=True, logprobs=4, repetition_penalty=1.5)
    request = engine.add_request("r", STEM[:20], params)
    drain(engine)
    assert len(request.output_logprobs) == len(logits) == 6
    for entry, token, row in zip(request.output_logprobs, request.output_token_ids, logits, strict=True):
        expected = row.log_softmax(0)
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert entry.rank == int((row > row[token]).sum()) + 1
        values, indices = expected.topk(4)
        assert [t for t, _ in entry.top] == indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("budget", [16, 48])
def test_prompt_logprobs_come_in_chunks_and_predict_each_token_from_those_before(create_engine, budget) -> None:
    """The log-probability of a prompt's token is that of an answer which is forced to be that token."""
    prompt = STEM[:50]
    engine = create_engine(max_num_batched_tokens=budget, capture_sizes=(8, budget))
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=2, logprobs=0)
    other = engine.add_request("other", [5], GREEDY)
    request = engine.add_request("r", prompt, params)
    drain(engine)
    assert len(other.output_token_ids) == 20
    assert request.prompt_logprobs[0] is None
    assert len(request.prompt_logprobs) == 50
    for position in (1, 2, 15, 16, 17, 31, 32, 48, 49):
        forced = engine.add_request(
            "forced",
            prompt[:position],
            SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[prompt[position]], logprobs=2),
        )
        drain(engine)
        entry = request.prompt_logprobs[position]
        assert entry.token == prompt[position] == forced.output_token_ids[0]
        assert entry.rank == forced.output_logprobs[0].rank
        assert entry.logprob == pytest.approx(forced.output_logprobs[0].logprob, abs=1e-4)
        assert [t for t, _ in entry.top] == [t for t, _ in forced.output_logprobs[0].top]
    assert engine.executor.statistics.num_eager_steps == 0


def test_a_request_that_leaves_no_token_to_sample_ends_with_an_error_and_harms_no_other(create_engine) -> None:
    engine = create_engine()
    good = engine.add_request("good", STEM, GREEDY)
    bad = engine.add_request(
        "bad",
        STEM,
        SamplingParams(temperature=1, max_tokens=9, allowed_token_ids=[7], stop_token_ids=(7,), min_tokens=2),
    )
    drain(engine)
    assert (bad.output_token_ids, bad.finish_reason) == ([], FinishReason.ERROR)
    assert "no token could be sampled" in bad.error.message
    fresh = create_engine()
    reference = fresh.add_request("good", STEM, GREEDY)
    drain(fresh)
    assert good.output_token_ids == reference.output_token_ids


def test_min_tokens_keeps_an_answer_from_ending_and_then_lets_it(create_engine) -> None:
    engine = create_engine()
    end_at_once = SamplingParams(temperature=0, max_tokens=20, logit_bias={EOS: 100})
    request = engine.add_request("r", STEM, end_at_once)
    drain(engine)
    assert (request.output_token_ids, request.finish_reason) == ([EOS], FinishReason.STOP)
    request = engine.add_request("r", STEM, replace(end_at_once, min_tokens=5))
    drain(engine)
    assert len(request.output_token_ids) == 6
    assert request.output_token_ids.index(EOS) == 5


def test_prefixes_are_shared_only_within_a_salt(create_engine) -> None:
    engine = create_engine()
    cached = []
    for number, salt in enumerate((None, "a", None, "a", "b")):
        request = engine.add_request(f"r{number}", STEM, GREEDY, cache_salt=salt)
        drain(engine)
        cached.append(request.num_cached_tokens)
    assert cached == [0, 0, 64, 64, 0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_token_ids": [VOCAB_SIZE]}, f"allowed_token_ids: token id {VOCAB_SIZE} is outside the vocabulary"),
        ({"logit_bias": {VOCAB_SIZE + 3: 1.0}}, f"logit_bias: token id {VOCAB_SIZE + 3} is outside the vocabulary"),
    ],
)
def test_token_ids_the_model_does_not_have_are_refused(create_engine, params, message) -> None:
    with pytest.raises(RequestError, match=message):
        create_engine().add_request("r", [1], SamplingParams(**params))


def test_a_prompt_of_one_token_has_no_log_probability_but_its_place(create_engine) -> None:
    engine = create_engine()
    request = engine.add_request("r", [5], replace(GREEDY, prompt_logprobs=1))
    drain(engine)
    assert request.prompt_logprobs == [None]


def test_min_tokens_beyond_the_context_is_refused(create_engine) -> None:
    with pytest.raises(RequestError, match=r"min_tokens=600 is above the 502 tokens of answer that max_model_len=512"):
        create_engine().add_request("r", range(10), SamplingParams(max_tokens=None, min_tokens=600))


def test_an_fp8_cache_runs_in_graphs_and_is_refused_where_kernels_cannot_read_it(create_engine, monkeypatch) -> None:
    engine = create_engine(kv_cache_dtype="fp8")
    requests = [engine.add_request(str(n), STEM[: 10 + n], GREEDY) for n in range(4)]
    drain(engine)
    assert [len(request.output_token_ids) for request in requests] == [20] * 4
    assert engine.executor.runner.caches[0].block_tensors[0].dtype == torch.float8_e4m3fn
    assert engine.executor.statistics.num_eager_steps == 0
    monkeypatch.setattr(
        type(engine.executor.runner.platform), "supports_fp8", property(lambda _: False, lambda *_: None), raising=False
    )
    with pytest.raises(ConfigError, match=r"kv_cache_dtype=fp8 needs a GPU of compute capability 8\.9"):
        create_engine(kv_cache_dtype="fp8")
