"""Grammars in the engine: guided and free requests share steps and graphs, and every finished answer is valid."""

import json
import random
import re
from dataclasses import replace

import pytest
from json_schemas import REGEXES, check, random_schema
from tiny import EOS, drain, set_run_ahead

from stepgraph import LLM
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.errors import RequestError
from stepgraph.models.source import ModelSource

pytest.importorskip("xgrammar", reason="guided answers need xgrammar")


@pytest.fixture(scope="module")
def llm(tiny_model, device) -> LLM:
    """The tiny model has one token per byte; a bias to its end token keeps its random answers short."""
    return LLM(
        tiny_model,
        device=device,
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=64,
        capture_sizes=(16, 64),
        capture_rows=(16,),
        num_kv_blocks=600,
        progress=False,
    )


def guided(seed: int, n: int = 1, **structured) -> SamplingParams:
    """Prefers what ends an answer: the end token, quotes, brackets; digits over letters."""
    closing = {EOS: 30.0}
    return SamplingParams(
        temperature=1.0,
        seed=seed,
        n=n,
        max_tokens=400,
        logit_bias=closing,
        structured_outputs=StructuredOutputs(**structured),
    )


def test_answers_to_random_schemas_are_valid_with_temperature_n_and_free_requests_beside_them(llm) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(60)]
    free = SamplingParams(temperature=1, seed=5, max_tokens=40, ignore_eos=True)
    params = [guided(i, n=1 + i % 3, json=schema) for i, schema in enumerate(schemas)] + [free] * 4
    outputs = llm.generate([[1 + i % 200, 2, 3] for i in range(len(params))], params, use_tqdm=False)
    finished = 0
    for schema, output in zip(schemas, outputs, strict=False):
        for answer in output.outputs:
            assert answer.finish_reason in ("stop", "length")
            if answer.finish_reason == "stop":
                finished += 1
                check(json.loads(answer.text), schema)
    assert finished > 80
    alone = llm.generate([[1 + len(schemas) % 200, 2, 3]], free, use_tqdm=False)[0]
    assert outputs[len(schemas)].outputs[0].token_ids == alone.outputs[0].token_ids
    assert llm.engine.executor.statistics.num_eager_steps == 0


def test_answers_match_their_regexes(llm) -> None:
    expressions = REGEXES
    params = [guided(i, regex=expression) for i, expression in enumerate(expressions)]
    outputs = llm.generate([[7, 7]] * len(params), params, use_tqdm=False)
    answers = [(e, o.outputs[0]) for e, o in zip(expressions, outputs, strict=True)]
    assert sum(answer.finish_reason == "stop" for _, answer in answers) > len(answers) // 2
    for expression, answer in answers:
        if answer.finish_reason == "stop":
            assert re.fullmatch(expression, answer.text, re.ASCII), (expression, answer.text)


def test_a_guided_answer_is_the_same_alone_batched_and_after_preemptions(create_engine) -> None:
    spec = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
    }
    texts = []
    params = [replace(guided(i, json=spec), max_tokens=60) for i in range(6)]
    for settings in ({}, {"num_kv_blocks": 24, "block_size": 4}, {"max_num_seqs": 1}):
        engine = create_engine(**settings)
        requests = [engine.add_request(f"r{i}", [1, 2, i], p) for i, p in enumerate(params)]
        drain(engine)
        assert FinishReason.STOP in {request.finish_reason for request in requests}
        texts.append([request.output_token_ids for request in requests])
        assert (engine.scheduler.statistics.preemptions > 0) == ("block_size" in settings)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_guided_rows_wait_for_their_mask_while_free_rows_run_ahead(create_engine, run_ahead) -> None:
    engine = create_engine()
    set_run_ahead(engine, run_ahead)
    request = engine.add_request("guided", [3], guided(1, choice=["north", "south", "northwest"]))
    free = engine.add_request("free", [4], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    drain(engine)
    text = bytes(llm_byte(token) for token in request.output_token_ids[:-1])
    assert text in (b"north", b"south", b"northwest")
    assert request.output_token_ids[-1] == EOS
    assert len(free.output_token_ids) == 30


def llm_byte(token: int) -> int:
    """The byte of one of the tiny tokenizer's tokens, for ASCII letters."""
    from tokenizers import pre_tokenizers

    return ord(sorted(pre_tokenizers.ByteLevel.alphabet())[token - 1])


def test_a_grammar_that_does_not_compile_fails_its_request_only(create_engine) -> None:
    engine = create_engine()
    good = engine.add_request("good", [1], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    bad = engine.add_request("bad", [1], guided(0, grammar="root ::= nothing"))
    drain(engine)
    assert (bad.finish_reason, bad.output_token_ids) == (FinishReason.ERROR, [])
    assert "nothing" in bad.error.message
    assert len(good.output_token_ids) == 10


def test_a_request_may_be_aborted_while_its_grammar_compiles(create_engine) -> None:
    engine = create_engine()
    engine.add_request("r", [1], guided(0, json_object=True))
    assert engine.seconds_until_work is not None
    assert engine.abort("r").finish_reason is FinishReason.ABORT
    assert not engine.has_work
    drain(engine)
    engine.add_request("r", [1], guided(0, choice=["a"]))
    drain(engine)


def test_allowed_tokens_and_a_grammar_hold_both(create_engine) -> None:
    letters = {chr(llm_byte(token)): token for token in range(1, 257)}
    params = replace(guided(0, regex="[a-z]{3}"), allowed_token_ids=[letters["k"], letters["Q"], EOS])
    engine = create_engine()
    request = engine.add_request("r", [1], params)
    drain(engine)
    assert request.output_token_ids == [letters["k"]] * 3 + [EOS]


def test_a_model_without_a_tokenizer_cannot_be_guided(create_engine, monkeypatch) -> None:
    monkeypatch.setattr(ModelSource, "tokenizer_if_any", lambda source: None)
    engine = create_engine()
    request = engine.add_request("r", [1], guided(0, choice=["a"]))
    drain(engine)
    assert request.finish_reason is FinishReason.ERROR
    assert "tokenizer" in request.error.message


def test_a_bad_schema_is_refused(create_engine) -> None:
    engine = create_engine()
    request = engine.add_request("r", [1], guided(0, json={"type": "array", "uniqueItems": True}))
    drain(engine)
    assert request.finish_reason is FinishReason.ERROR
    assert "uniqueItems" in request.error.message
    assert request.error.param == "structured_outputs.json"
    with pytest.raises(RequestError, match="exactly one of"):
        StructuredOutputs(regex="a", choice=["b"])
