"""Grammars and proposals in one step: masks follow the proposals, and the answers are those that come without them."""

import json
import random

import pytest
from json_schemas import check, random_schema
from scripted import ScriptedDrafter
from tiny import EOS, MAX_MODEL_LEN, VOCAB_SIZE, drain

from stepgraph.engine.engine import Engine
from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.step.runner import StepRunner

pytest.importorskip("xgrammar", reason="guided answers need xgrammar")

SCHEMAS = [random_schema(random.Random(seed)) for seed in range(24)]


def params(number: int) -> SamplingParams:
    """Sampled and greedy; some are free, one in a few keeps going where the grammar has ended."""
    return SamplingParams(
        temperature=(1.0, 0.0)[number % 2],
        seed=number,
        max_tokens=120,
        logit_bias={EOS: 30.0},
        ignore_eos=number % 5 == 0,
        logprobs=2 if number % 3 == 0 else None,
        structured_outputs=None if number % 7 == 6 else StructuredOutputs(json=SCHEMAS[number]),
    )


def run(engine: Engine) -> list[Request]:
    requests = [engine.add_request(str(number), [number + 1, 2, 3], params(number)) for number in range(len(SCHEMAS))]
    drain(engine)
    return requests


def outcome(request: Request) -> tuple:
    tops = [position.token for position in request.output_logprobs]
    return request.output_token_ids, request.finish_reason, tops


@pytest.fixture(scope="module")
def plain(create_engine) -> list[Request]:
    return run(create_engine(graph_backend="eager", num_kv_blocks=600))


@pytest.fixture
def create_scripted(create_engine, plain, device):
    def create(**settings) -> Engine:
        known = [([number + 1, 2, 3], request.output_token_ids) for number, request in enumerate(plain)]
        drafter = ScriptedDrafter(known, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, device=device)
        config = {"method": "ngram", "num_speculative_tokens": 5, "adaptive": False}
        return create_engine(drafter=drafter, num_kv_blocks=600, speculative_config=config, **settings)

    return create


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_guided_answers_are_the_same_with_proposals(create_scripted, plain, backend) -> None:
    engine = create_scripted(graph_backend=backend)
    requests = run(engine)
    assert [outcome(request) for request in requests] == [outcome(request) for request in plain]
    guided = [request for request in requests if request.params.structured_outputs is not None]
    assert sum(len(request.accepted) for request in guided) > 100
    for request in guided:
        if request.finish_reason is FinishReason.STOP:
            text = engine.tokenizer.decode(request.output_token_ids, skip_special_tokens=True)
            check(json.loads(text), SCHEMAS[int(request.id)])


def test_masks_that_ignore_proposals_are_noticed(create_scripted, plain, monkeypatch) -> None:
    """With the first token's mask on every line, an answer leaves its grammar, or becomes another one."""
    admit = StepRunner.launch

    def launch(runner: StepRunner, plan):
        masks = runner.state.masks
        masks[:, 1:] = masks[:, :1]
        return admit(runner, plan)

    monkeypatch.setattr(StepRunner, "launch", launch)
    requests = run(create_scripted(graph_backend="eager"))
    assert [outcome(request) for request in requests] != [outcome(request) for request in plain]


def test_an_answer_is_complete_also_where_nothing_can_be_sampled_behind_it(create_engine, device) -> None:
    """A proposed end token stands, and after it only another would be allowed, which is ruled out."""
    params = SamplingParams(
        temperature=0,
        max_tokens=9,
        ignore_eos=True,
        bad_words=["<end><end>"],
        structured_outputs=StructuredOutputs(choice=["ab", "cd"]),
    )
    prompts = [[number + 1, 2, 3] for number in range(8)]

    def answers(engine: Engine) -> list[tuple]:
        requests = [engine.add_request(str(number), prompt, params) for number, prompt in enumerate(prompts)]
        drain(engine)
        return [(request.output_token_ids, request.finish_reason, request.error) for request in requests]

    plain = answers(create_engine(graph_backend="eager"))
    assert {(tokens[-1], reason, error) for tokens, reason, error in plain} == {(EOS, FinishReason.STOP, None)}
    # The drafter takes what lies behind these for zeros, which are end tokens.
    known = [(prompt, tokens) for prompt, (tokens, *_) in zip(prompts, plain, strict=True)]
    drafter = ScriptedDrafter(known, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, device=device)
    config = {"method": "ngram", "num_speculative_tokens": 5, "adaptive": False}
    assert answers(create_engine(drafter=drafter, graph_backend="eager", speculative_config=config)) == plain
