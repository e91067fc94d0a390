"""Layers that differ in heads, head size, window and in what they keep: what a model of such layers answers, step by step."""

import logging
import random

import pytest
import torch
from mixed_model import MIXED_ATTENTION, RECURRENT, MixedModel, engines_of
from scripted import ScriptedDrafter, watch_drafts
from tiny import MAX_MODEL_LEN, VOCAB_SIZE, drain, set_run_ahead
from torch import Tensor
from triton_operators import triton_operators

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.executor.local import runner_of
from stepgraph.layers.recurrent import RecurrentCache
from stepgraph.step import runner
from stepgraph.verify.graphs import verify_graphs

NUM_DRAFTS = 3
SPECULATIVE = {"speculative_config": {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS}}


def random_prompt(number: int) -> list[int]:
    """With a first token of its own. Some are longer than a step."""
    rng = random.Random(number)
    phrase = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))]
    return [number + 1, *(phrase * rng.choice((1, 2, 5, 11)))]


PROMPTS = [random_prompt(number) for number in range(16)]
LENGTHS = [1 + 7 * number % 33 for number in range(16)]


@pytest.fixture(scope="module", params=[MIXED_ATTENTION, RECURRENT], ids=["attention", "recurrent"])
def layers(request):
    return request.param


@pytest.fixture(scope="module")
def create(tiny_model, device, layers):
    return engines_of(tiny_model, device, layers)


@pytest.fixture(scope="module")
def create_recurrent(tiny_model, device):
    return engines_of(tiny_model, device, RECURRENT)


@pytest.fixture(scope="module")
def answers():
    """Of the loop, by layers."""
    return {
        layers: [MixedModel(layers).answer(*case) for case in zip(PROMPTS, LENGTHS, strict=True)]
        for layers in (MIXED_ATTENTION, RECURRENT)
    }


def run(engine: Engine, seed: int = 0, *, preemption: float = 0.0) -> list[list[int]]:
    """Let the prompts arrive while others run, and give some more up on their way. With a chance of `preemption` at each step,
    all that run start anew."""
    rng = random.Random(seed)
    requests = []
    while len(requests) < len(PROMPTS) or engine.has_work:
        while len(requests) < len(PROMPTS) and (not engine.has_work or rng.random() < 0.4):
            number = len(requests)
            params = SamplingParams(temperature=0, max_tokens=LENGTHS[number], ignore_eos=True)
            requests.append(engine.add_request(f"{number}", PROMPTS[number], params))
            if number % 5 == 0:
                engine.add_request(f"aborted {number}", [250, *PROMPTS[number]], params)
        if rng.random() < 0.1:
            engine.abort(f"aborted {rng.randrange(len(requests)) // 5 * 5}")
        if preemption and rng.random() < preemption:
            engine.reset_prefix_cache(preempt=True)
        engine.step()
    return [request.output_token_ids for request in requests]


def generate(engine: Engine, prompt: list[int], max_tokens: int):
    request = engine.add_request("r", prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    drain(engine)
    return request


def mismatches(engine: Engine) -> list[str]:
    reports = verify_graphs(engine.executor, rounds=8, seed=0, draft_levels=(0, NUM_DRAFTS))
    assert {report.shape.num_drafts for report in reports} == {0, NUM_DRAFTS}
    return [mismatch for report in reports for mismatch in report.mismatches]


def knowing(answers, device: str) -> ScriptedDrafter:
    known = list(zip(PROMPTS, answers, strict=True))
    return ScriptedDrafter(known, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, device=device)


def test_the_answers_are_varied(answers) -> None:
    for texts in answers.values():
        tokens = [token for text in texts for token in text]
        assert len(set(tokens)) > len(tokens) / 4


@pytest.mark.parametrize("settings", [{"graph_backend": "eager"}, {}, {"max_num_seqs": 1}, {"block_size": 4}])
def test_tokens_are_those_of_a_loop_over_them(create, layers, answers, settings) -> None:
    assert run(create(**settings)) == answers[layers]


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize("settings", [{"graph_backend": "eager"}, {}])
def test_tokens_are_the_same_where_proposals_stand_and_fall(
    create, layers, answers, device, settings, run_ahead
) -> None:
    engine = create(drafter=knowing(answers[layers], device), **SPECULATIVE, **settings)
    set_run_ahead(engine, run_ahead)
    drafts = watch_drafts(engine)
    all_outcomes = {(num, stood) for num in range(1, 1 + NUM_DRAFTS) for stood in range(num + 1)}
    for seed in range(
        4
    ):  # how many proposals a row has follows from which rows meet: one order may leave one outcome out
        assert run(engine, seed) == answers[layers]
        if all_outcomes == set(drafts):
            return
    assert all_outcomes == set(drafts)


def test_tokens_are_the_same_after_preemptions(create, layers, answers, device) -> None:
    engine = create(num_kv_blocks=40, block_size=4, **SPECULATIVE, drafter=knowing(answers[layers], device))
    assert run(engine, preemption=0.2) == answers[layers]
    assert engine.scheduler.statistics.preemptions > 10


def test_tokens_are_the_same_after_a_sleep_that_loses_all_caches(create, layers, answers) -> None:
    engine = create(enable_sleep_mode=True)
    requests = [
        engine.add_request(f"{number}", PROMPTS[number], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        for number in range(8)
    ]
    for _ in range(8):
        engine.step()
    assert any(request.output_token_ids for request in requests)
    engine.sleep()
    engine.wake_up()
    for cache in runner_of(engine.executor).caches:
        for tensor in (*cache.block_tensors, *cache.line_tensors):
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    drain(engine)
    for request, answer in zip(requests, answers[layers], strict=False):
        shorter = min(len(answer), 20)
        assert request.output_token_ids[:shorter] == answer[:shorter]


def test_captured_graphs_pass_the_check(create) -> None:
    assert mismatches(create(**SPECULATIVE)) == []


def test_triton_kernels_give_the_tokens_of_the_loop(create, layers, answers, device) -> None:
    """Lists of work are read by them alone: on CPU there are none."""
    numbers = [5, 9, 13]
    params = [SamplingParams(temperature=0, max_tokens=min(3, LENGTHS[n]), ignore_eos=True) for n in numbers]
    with triton_operators():
        engine = create(graph_backend="eager", drafter=knowing(answers[layers], device), **SPECULATIVE)
        requests = [engine.add_request(f"{n}", PROMPTS[n], p) for n, p in zip(numbers, params, strict=True)]
        drain(engine)
    assert [r.output_token_ids for r in requests] == [answers[layers][n][: min(3, LENGTHS[n])] for n in numbers]


# Attention


def test_a_step_lists_the_work_of_each_kind_of_attention_once(tiny_model, device, monkeypatch) -> None:
    engine = engines_of(tiny_model, device, MIXED_ATTENTION)(graph_backend="eager")
    plan, listed = ops.attention_plan, []

    def counting(*args):
        listed.append((*args[3:6], args[7]))
        return plan(*args)

    monkeypatch.setattr(ops, "attention_plan", counting)
    generate(engine, PROMPTS[0], 1)
    kinds = [(2, 2, 16, 40), (4, 2, 16, 0), (4, 2, 16, 7), (4, 2, 16, 24), (6, 1, 8, 24)]
    assert listed == kinds


def test_layers_that_share_keys_and_values_take_no_memory(tiny_model, device) -> None:
    runner = runner_of(engines_of(tiny_model, device, MIXED_ATTENTION)(graph_backend="eager").executor)
    caches = runner.caches
    assert caches[2] is caches[0]
    assert caches[5] is caches[1]
    assert len({(cache.group, cache.keys.data_ptr()) for cache in caches}) == 4  # groups take blocks of one memory
    assert [tuple(cache.keys.shape[1:]) for cache in caches[:2]] == [(4, 2, 16), (16, 1, 8)]  # of equal bytes


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_mutant_a_layer_with_another_layers_window_is_caught(tiny_model, device, answers, monkeypatch, layer) -> None:
    attend, calls = ops.paged_attention, []

    def mutant(*args):
        calls.append(args)
        wrong = len(calls) % len(MIXED_ATTENTION) == (layer + 1) % len(MIXED_ATTENTION)
        return attend(*args[:-1], args[-1] - 1 if wrong else args[-1])

    monkeypatch.setattr(ops, "paged_attention", mutant)
    engine = engines_of(tiny_model, device, MIXED_ATTENTION)(graph_backend="eager")
    assert run(engine) != answers[MIXED_ATTENTION]


# State of slots


def state_of(engine: Engine, slot: int) -> list[Tensor]:
    """Of each recurrent layer, the state after all tokens of a slot that are computed."""
    runner = runner_of(engine.executor)
    computed = int(runner.state.lines[slot, slot_line.COMPUTED])
    found = []
    for layer, cache in zip(runner.model.layers, runner.caches, strict=True):
        if isinstance(cache, RecurrentCache):
            (state_SN,), start = cache.state, int(cache.start[slot])
            assert computed - NUM_DRAFTS <= start <= computed
            h_N = state_SN[slot]
            for position in range(start, computed):
                h_N = layer.decay_N * h_N + cache.inputs[0][slot, position % NUM_DRAFTS]
            found.append(h_N)
    return found


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_the_state_is_that_after_the_tokens_that_stand(create_recurrent, acceptance) -> None:
    settings = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "adaptive": False, "acceptance": acceptance}
    engine = create_recurrent(graph_backend="eager", speculative_config=settings)
    drafts = watch_drafts(engine)
    text = PROMPTS[3] + generate(engine, PROMPTS[3], 60).output_token_ids
    shares = {stood / num for num, stood in drafts}
    assert {0.0: shares == {0.0}, 0.6: len(shares) > 2, 1.0: shares == {1.0}}[acceptance]
    fresh = create_recurrent(graph_backend="eager", **SPECULATIVE)
    computed = int(runner_of(engine.executor).state.lines[1, slot_line.COMPUTED])
    assert computed == len(text) - 1
    generate(fresh, text[:computed], 1)
    torch.testing.assert_close(state_of(engine, 1), state_of(fresh, 1), atol=1e-4, rtol=1e-4)


def test_nothing_is_kept_where_nothing_is_proposed(create_recurrent) -> None:
    (_, attention, last) = runner_of(create_recurrent(graph_backend="eager").executor).caches
    assert (last.inputs, last.num_kept, len(last.state)) == ((), 0, 1)
    assert attention.line_tensors == ()


def test_a_short_prompt_again_shares_blocks_where_they_hold_all_there_is(create, layers) -> None:
    engine = create(graph_backend="eager")
    prompt = list(range(100, 150))
    first, second = (generate(engine, prompt, 4) for _ in range(2))
    assert first.output_token_ids == second.output_token_ids
    assert second.num_cached_tokens == (0 if layers is RECURRENT else 48)


def test_where_no_memory_is_left_for_states_of_prefixes_it_is_said(create_recurrent, caplog, monkeypatch) -> None:
    choose = runner.choose_sizes
    monkeypatch.setattr(runner, "choose_sizes", lambda *a, **k: choose(*a, **k)._replace(num_checkpoints=0))
    with caplog.at_level(logging.WARNING, logger="stepgraph"):
        engine = create_recurrent(graph_backend="eager")
        create_recurrent(graph_backend="eager", enable_prefix_caching=False)
    assert [generate(engine, list(range(200)), 4).num_cached_tokens for _ in range(3)] == [0, 0, 0]
    (said,) = [record.message for record in caplog.records if "prefix caching is off" in record.message]
    assert "lower max_num_seqs=8 or max_model_len=512" in said


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_engines_whose_layers_carry_state_take_and_give_no_blocks(create_recurrent, role) -> None:
    with pytest.raises(
        ConfigError, match=r"layers that carry a state from token to token.*leave splitwise_role at mixed"
    ):
        create_recurrent(graph_backend="eager", splitwise_role=role)


rows, replayed = RecurrentCache.rows, RecurrentCache.replayed
start_of, next_start = RecurrentCache._start_of, RecurrentCache._next_start


def without_reset(cache, tokens):
    found = rows(cache, tokens)
    return found._replace(start=found.start.clamp(min=1))


def one_more_again(cache, start, tokens, first_R) -> Tensor:
    return torch.maximum(start_of(cache, start, tokens, first_R) - 1, first_R - cache.num_kept)


def one_less_again(cache, start, tokens, first_R) -> Tensor:
    return torch.minimum(start_of(cache, start, tokens, first_R) + 1, first_R)


def one_too_late(cache, first_R, query_len_R) -> Tensor:
    return torch.minimum(next_start(cache, first_R, query_len_R) + 1, first_R + query_len_R)


MUTANTS = {
    "skips the reset": ("rows", without_reset),
    "runs one token too many again": ("_start_of", one_more_again),
    "runs one token too few again": ("_start_of", one_less_again),
    "takes a proposal into the state": ("_next_start", one_too_late),
}


@pytest.mark.parametrize(("name", "mutant"), MUTANTS.values(), ids=MUTANTS)
def test_mutant_of_the_state_changes_tokens(create_recurrent, answers, device, monkeypatch, name, mutant) -> None:
    monkeypatch.setattr(RecurrentCache, name, mutant)
    engine = create_recurrent(
        drafter=knowing(answers[RECURRENT], device), max_num_seqs=1, graph_backend="eager", **SPECULATIVE
    )
    assert run(engine) != answers[RECURRENT]


def into_another_slot(cache, rows, inputs):
    cache.state[0][-1].fill_(1.0)
    return replayed(cache, rows, inputs)


@pytest.mark.parametrize(
    ("name", "mutant", "said"),
    [
        ("rows", without_reset, "which hold NaN"),
        ("_start_of", one_more_again, "which hold NaN"),
        ("replayed", into_another_slot, "1 cache entries of no token of the step were written"),
    ],
)
def test_mutant_of_the_state_fails_the_check(create_recurrent, monkeypatch, name, mutant, said) -> None:
    monkeypatch.setattr(RecurrentCache, name, mutant)
    assert any(said in mismatch for mismatch in mismatches(create_recurrent(**SPECULATIVE)))
