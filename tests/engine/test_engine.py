"""The engine on the tiny model: every step in a graph, and the same tokens however requests are batched, cut and run."""

import random
from dataclasses import replace

import pytest
from tiny import MAX_MODEL_LEN, VOCAB_SIZE, drain, set_run_ahead

from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import CONTEXT_LENGTH_EXCEEDED, ConfigError, RequestError
from stepgraph.step.plan import StepPlan

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def answer(engine, prompt, params: SamplingParams = GREEDY, id: str = "one"):
    """Run one request alone; returns it."""
    request = engine.add_request(id, prompt, params)
    drain(engine)
    return request


def random_requests(count: int = 24, seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 120 tokens; greedy, and sampled in every way."""
    rng = random.Random(seed)
    ways = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.95},
    ]
    return [
        (
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((1, 2, rng.randint(3, 40), rng.randint(40, 120))))],
            SamplingParams(
                seed=rng.getrandbits(64), max_tokens=rng.randint(1, 32), ignore_eos=True, **rng.choice(ways)
            ),
        )
        for _ in range(count)
    ]


REQUESTS = random_requests()


@pytest.fixture(scope="module")
def answers_alone(create_engine) -> list[list[int]]:
    """What each of REQUESTS gets alone, eagerly, at steps that hold all of its prompt and no padding."""
    engine = create_engine(
        graph_backend="eager", max_num_seqs=1, max_num_batched_tokens=128, capture_sizes=None, capture_rows=None
    )
    return [answer(engine, prompt, params).output_token_ids for prompt, params in REQUESTS]


def run_with_random_arrivals(engine, seed: int = 0) -> list[list[int]]:
    """Let REQUESTS arrive while others run; returns their tokens."""
    rng = random.Random(seed)
    requests = []
    waiting = list(enumerate(REQUESTS))
    while waiting or engine.has_work:
        while waiting and (not engine.has_work or rng.random() < 0.3):
            number, (prompt, params) = waiting.pop(0)
            requests.append(engine.add_request(f"r{number}", prompt, params))
        engine.step()
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"capture": "all"},
        {"capture_sizes": None, "capture_rows": None},
        {"max_num_seqs": 3, "max_num_batched_tokens": 5, "capture_sizes": (5,), "capture_rows": (3,)},
        {"block_size": 4, "num_kv_blocks": 200},
        {"num_kv_blocks": 12},
        {"graph_backend": "eager"},
    ],
    ids=["batched", "captured at once", "chosen sizes", "chunked", "small blocks", "little memory", "eager"],
)
def test_random_arrivals_get_the_tokens_they_get_alone(create_engine, answers_alone, settings) -> None:
    engine = create_engine(**settings)
    assert run_with_random_arrivals(engine) == answers_alone
    statistics = engine.executor.statistics
    assert statistics.num_steps > 50
    assert len({kind for kind, _ in statistics.steps}) == 3  # prefill, decode and mixed steps
    assert statistics.num_eager_steps == (statistics.num_steps if settings == {"graph_backend": "eager"} else 0)
    assert engine.host_time.steps == statistics.num_steps
    assert engine.scheduler.num_free_blocks == engine.executor.runner.num_kv_blocks - 1


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_the_depth_of_run_ahead_changes_no_token(create_engine, answers_alone, run_ahead) -> None:
    engine = create_engine()
    set_run_ahead(engine, run_ahead)
    assert run_with_random_arrivals(engine, seed=1) == answers_alone


def test_only_prefill_graphs_give_the_same_tokens_with_decodes_run_eagerly(create_engine, answers_alone) -> None:
    engine = create_engine(cudagraph_only_prefill=True)
    assert run_with_random_arrivals(engine) == answers_alone
    assert set(engine.executor.statistics.steps) == {
        ("prefill", None),
        ("decode", "not_pure_prefill"),
        ("mixed", "not_pure_prefill"),
    }


def test_a_limit_of_prefills_gives_the_same_tokens_with_longer_ones_alone_run_eagerly(create_engine) -> None:
    params = SamplingParams(temperature=1, seed=3, max_tokens=4, ignore_eos=True)
    prompts = [[1, 2, 3], list(range(2, 11)), list(range(3, 43))]
    engine, unlimited = create_engine(max_prefill_capture_size=8), create_engine()
    for prompt in prompts:
        assert answer(engine, prompt, params).output_token_ids == answer(unlimited, prompt, params).output_token_ids
    steps = engine.executor.statistics.steps
    assert steps == {("prefill", None): 1, ("prefill", "long_prefill"): 2, ("decode", None): 9}


def test_the_answers_are_neither_all_alike_nor_stuck(answers_alone) -> None:
    """Otherwise equal tokens would say little."""
    assert len({token for tokens in answers_alone for token in tokens}) > VOCAB_SIZE // 3


def test_a_seed_decides_the_tokens_and_no_seed_is_another_each_time(create_engine) -> None:
    params = SamplingParams(temperature=1, max_tokens=16, ignore_eos=True)
    engine = create_engine()
    seeded = [answer(engine, [1, 2, 3], replace(params, seed=seed)).output_token_ids for seed in (5, 5, 6, 2**63 + 5)]
    assert seeded[0] == seeded[1]
    assert len({tuple(tokens) for tokens in seeded}) == 3
    unseeded = [answer(engine, [1, 2, 3], params).output_token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    engines = [create_engine(seed=seed) for seed in (0, 0, 1)]
    first = [answer(engine, [1, 2, 3], params).output_token_ids for engine in engines]
    assert first[0] == first[1] != first[2]


def test_an_answer_ends_with_a_stop_token_and_counts_it(create_engine) -> None:
    engine = create_engine()
    whole = answer(engine, range(9)).output_token_ids
    stop = next(token for i, token in enumerate(whole) if i > 4 and token not in whole[:i])
    request = answer(engine, range(9), replace(GREEDY, stop_token_ids=(999, stop)))
    assert request.output_token_ids == whole[: whole.index(stop) + 1]
    assert (request.finish_reason, request.stop_token) == (FinishReason.STOP, stop)


def test_an_answer_ends_at_the_models_end_token_unless_that_is_ignored(create_engine, monkeypatch) -> None:
    whole = answer(create_engine(), range(9)).output_token_ids
    monkeypatch.setattr("stepgraph.engine.build.end_tokens_of", lambda source: (whole[3], whole[7]))
    engine = create_engine()
    request = answer(engine, range(9), replace(GREEDY, ignore_eos=False))
    assert request.output_token_ids == whole[:4]
    assert request.finish_reason is FinishReason.STOP
    assert answer(engine, range(9)).output_token_ids == whole


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_an_answer_ends_after_max_tokens(create_engine, max_tokens) -> None:
    engine = create_engine()
    whole = answer(engine, range(9)).output_token_ids
    request = answer(engine, range(9), replace(GREEDY, max_tokens=max_tokens))
    assert request.output_token_ids == whole[:max_tokens]
    assert (request.finish_reason, request.stop_token) == (FinishReason.LENGTH, None)


@pytest.mark.parametrize("prompt_len", [1, 500, MAX_MODEL_LEN - 1])
def test_an_answer_without_limit_ends_with_the_context(create_engine, prompt_len) -> None:
    request = answer(create_engine(), [7] * prompt_len, replace(GREEDY, max_tokens=None))
    assert len(request.output_token_ids) == MAX_MODEL_LEN - prompt_len
    assert request.finish_reason is FinishReason.LENGTH


def test_a_request_may_be_aborted_while_it_waits_prefills_or_decodes_and_the_others_do_not_notice(
    create_engine,
) -> None:
    engine = create_engine(max_num_seqs=2, max_num_batched_tokens=8, capture_sizes=(8,), capture_rows=(2,))
    expected = answer(engine, range(20)).output_token_ids
    bystander = engine.add_request("bystander", range(20), GREEDY)
    decoding = engine.add_request("decoding", [5], replace(GREEDY, max_tokens=200))
    for _ in range(8):
        engine.step()
    assert decoding.output_token_ids
    update = engine.abort("decoding")
    assert (update.request, update.new_token_ids, update.finish_reason) == (decoding, (), FinishReason.ABORT)
    prefilling = engine.add_request("prefilling", range(100), GREEDY)
    waiting = engine.add_request("waiting", [1], GREEDY)
    engine.step()
    assert prefilling.slot is not None
    assert waiting.slot is None
    for request in (prefilling, waiting):
        assert engine.abort(request.id).request is request
    drain(engine)
    assert [request.output_token_ids for request in (prefilling, waiting)] == [[], []]
    assert bystander.output_token_ids == expected
    assert engine.abort("bystander") is None
    assert engine.scheduler.num_free_blocks == engine.executor.runner.num_kv_blocks - 1


@pytest.mark.parametrize(
    ("prompt", "params", "param", "code", "message"),
    [
        ([], {}, "prompt", None, "the prompt is empty; give at least one token"),
        ([5, VOCAB_SIZE], {}, "prompt", None, f"id {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE} tokens"),
        ([-1], {}, "prompt", None, "token id -1 is outside the vocabulary"),
        ([1.5], {}, "prompt", None, "token id 1.5 is outside the vocabulary"),
        (["a"], {}, "prompt", None, "token id 'a' is outside the vocabulary"),
        (
            [1] * MAX_MODEL_LEN,
            {},
            "prompt",
            CONTEXT_LENGTH_EXCEEDED,
            f"prompt has {MAX_MODEL_LEN} tokens and max_model_len is {MAX_MODEL_LEN}.*shorten it to {MAX_MODEL_LEN - 1}",
        ),
        ([1], {"max_tokens": None, "min_tokens": MAX_MODEL_LEN}, "min_tokens", None, "lower min_tokens or shorten"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1}}, "logit_bias", None, f"token id {VOCAB_SIZE} is outside the vocabulary"),
        ([1], {"stop_token_ids": range(1, 17)}, "stop_token_ids", None, "17 stop tokens, .* included; at most 16 fit"),
        (
            [1] * 100,
            {"max_tokens": 300},
            "max_tokens",
            CONTEXT_LENGTH_EXCEEDED,
            r"needs KV blocks for 399 tokens \(25 blocks of 16\), and the cache has 24",
        ),
    ],
)
def test_a_request_that_cannot_run_is_refused_at_the_door_and_the_engine_goes_on(
    create_engine, prompt, params, param, code, message
) -> None:
    engine = create_engine(num_kv_blocks=25)
    running = engine.add_request("running", range(9), GREEDY)
    engine.step()
    with pytest.raises(RequestError, match=message) as refused:
        engine.add_request("bad", prompt, SamplingParams(temperature=0, **params))
    assert (refused.value.param, refused.value.code) == (param, code)
    drain(engine)
    assert running.output_token_ids == answer(engine, range(9), id="bad").output_token_ids


def test_an_id_in_use_is_refused_without_harm_to_its_owner(create_engine) -> None:
    engine = create_engine()
    owner = engine.add_request("same", range(9), GREEDY)
    with pytest.raises(RequestError, match="request id 'same' is in use"):
        engine.add_request("same", [1], GREEDY)
    drain(engine)
    assert len(owner.output_token_ids) == GREEDY.max_tokens


def test_steady_decoding_sends_the_device_no_plan_but_where_a_block_begins(create_engine, monkeypatch) -> None:
    engine = create_engine(block_size=8)
    requests = [engine.add_request(id, range(3), replace(GREEDY, max_tokens=21)) for id in "abc"]
    engine.step()
    packed = []
    pack = StepPlan.pack
    monkeypatch.setattr(StepPlan, "pack", lambda plan, *args: (packed.append(plan), pack(plan, *args)))
    steps = engine.host_time.steps
    drain(engine)
    assert engine.host_time.steps - steps == 20
    # The first decode has other rows than the prefill; two more blocks begin at tokens 8 and 16 of each sequence.
    assert [len(plan.deltas) for plan in packed] == [0, 3, 3]
    assert len({tuple(request.output_token_ids) for request in requests}) == 1


def test_a_model_length_beyond_the_models_is_refused(create_engine) -> None:
    with pytest.raises(ConfigError, match=rf"max_model_len={MAX_MODEL_LEN + 1} is above the {MAX_MODEL_LEN} positions"):
        create_engine(max_model_len=MAX_MODEL_LEN + 1)


def test_a_shorter_model_length_bounds_the_context(create_engine) -> None:
    engine = create_engine(max_model_len=40)
    with pytest.raises(RequestError, match="max_model_len is 40"):
        engine.add_request("long", range(40), GREEDY)
    assert len(answer(engine, range(30), replace(GREEDY, max_tokens=None)).output_token_ids) == 10
