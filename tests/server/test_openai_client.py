"""The server through the official OpenAI client: what it answers is what the engine answers offline."""

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai_calls import ANSWER, CAPITAL, PROMPT, REFERENCE, Streamed, chat, complete, generate, sdk_fields
from pydantic import BaseModel
from tiny import EOS, MAX_MODEL_LEN

from stepgraph import SamplingParams

# Completions


@pytest.mark.parametrize("prompt", ["abc", [1, 2, 3], ["abc", "de", "abc"], [[1, 2, 3], [4], [5, 6]]], ids=repr)
def test_completions_of_texts_and_ids_one_or_several_are_those_of_the_engine(tiny, offline, prompt) -> None:
    outputs = offline.generate(prompt, ANSWER, use_tqdm=False)
    reply = complete(tiny, prompt, max_tokens=24, return_token_ids=True)
    assert [choice.index for choice in reply.choices] == list(range(len(outputs)))
    for choice, output in zip(reply.choices, outputs, strict=True):
        assert tuple(choice.token_ids) == output.outputs[0].token_ids
        assert (choice.text, choice.finish_reason) == (output.outputs[0].text, output.outputs[0].finish_reason)
        assert tuple(choice.prompt_token_ids) == tuple(output.prompt_token_ids)
    assert reply.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    assert reply.usage.completion_tokens == sum(len(output.outputs[0].token_ids) for output in outputs)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    streamed = Streamed(complete(tiny, prompt, max_tokens=24, stream=True))
    assert streamed.texts == {choice.index: choice.text for choice in reply.choices}
    assert streamed.finish_reasons == {choice.index: choice.finish_reason for choice in reply.choices}


def test_a_completion_has_16_tokens_unless_asked_and_ends_at_the_models_end_token(tiny, offline) -> None:
    reply = complete(tiny)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (16, "length")
    reply = complete(tiny, max_tokens=24)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (19, "stop")


@pytest.mark.parametrize(("prompt", "text"), [(PROMPT, PROMPT), ([35, 36], "CD")], ids=["text", "ids"])
def test_echo_gives_the_prompt_before_each_answer(tiny, prompt, text) -> None:
    fields = {"max_tokens": 6, "n": 2, "temperature": 1, "seed": 1}
    answers = [choice.text for choice in complete(tiny, prompt, **fields).choices]
    assert [c.text for c in complete(tiny, prompt, echo=True, **fields).choices] == [text + a for a in answers]
    streamed = Streamed(complete(tiny, prompt, echo=True, stream=True, **fields))
    assert streamed.texts == dict(enumerate(text + answer for answer in answers))


def test_completion_logprobs_are_those_of_the_engine_whole_and_streamed(tiny, offline) -> None:
    answer = generate(offline, PROMPT, replace(ANSWER, logprobs=3)).outputs[0]
    own = [position[token].logprob for token, position in zip(answer.token_ids, answer.logprobs, strict=True)]
    got = complete(tiny, max_tokens=24, logprobs=3).choices[0].logprobs
    assert got.token_logprobs == pytest.approx(own, abs=1e-5)
    assert got.tokens == [p[token].decoded_token for token, p in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(len(got.tokens))]
    for top, position in zip(got.top_logprobs, answer.logprobs, strict=True):
        for probability in position.values():
            assert probability.decoded_token in top
            assert probability.logprob <= top[probability.decoded_token] + 1e-5
    assert Streamed(complete(tiny, max_tokens=24, logprobs=3, stream=True)).logprobs[0] == got.token_logprobs
    assert complete(tiny, max_tokens=24, logprobs=0).choices[0].logprobs.token_logprobs == got.token_logprobs


def test_a_prompt_is_scored_without_an_answer(tiny, offline) -> None:
    """As lm-eval-harness asks: contexts and continuations as token ids, echoed with their log-probabilities."""
    prompts = [[40, 41, 42, 43, 44, 45], [66, 67, 68]]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, logprobs=1)
    expected = offline.generate(prompts, params, use_tqdm=False)
    scored = complete(tiny, prompts, max_tokens=0, echo=True, logprobs=1)
    with_token = complete(tiny, prompts, max_tokens=1, echo=True, logprobs=1)
    assert scored.usage.completion_tokens == 0
    for choice, longer, output in zip(scored.choices, with_token.choices, expected, strict=True):
        got, prompt = choice.logprobs, output.prompt_token_ids
        assert choice.text == offline.tokenizer.decode(prompt)
        assert (got.token_logprobs[0], got.top_logprobs[0]) == (None, None)
        own = [position[token].logprob for token, position in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        assert got.token_logprobs[1:] == pytest.approx(own, abs=1e-5)
        likeliest = [max(p.logprob for p in position.values()) for position in output.prompt_logprobs[1:]]
        assert [max(top.values()) for top in got.top_logprobs[1:]] == pytest.approx(likeliest, abs=1e-5)
        assert "".join(got.tokens) == choice.text
        assert got.text_offset == list(range(len(prompt)))
        assert longer.logprobs.token_logprobs[:-1] == got.token_logprobs
        assert longer.text == choice.text + output.outputs[0].text


def test_prompt_logprobs_and_token_ids_come_as_vllm_shapes_them(tiny, offline) -> None:
    expected = generate(offline, PROMPT, replace(ANSWER, prompt_logprobs=2)).prompt_logprobs
    for reply in (
        complete(tiny, max_tokens=1, prompt_logprobs=2).choices[0],
        chat(tiny, max_tokens=1, prompt_logprobs=2),
    ):
        got = reply.prompt_logprobs
        assert got[0] is None
        for position, ours in zip(got[1:], expected[1:], strict=True):
            assert position.keys() == {str(token) for token in ours}
            for token, probability in ours.items():
                told = position[str(token)]
                assert told["logprob"] == pytest.approx(probability.logprob, abs=1e-5)
                assert (told["rank"], told["decoded_token"]) == (probability.rank, probability.decoded_token)
    reply = chat(tiny, max_tokens=24, return_token_ids=True)
    assert reply.prompt_token_ids == offline.tokenizer.encode(PROMPT)
    assert tuple(reply.choices[0].token_ids) == generate(offline, PROMPT, ANSWER).outputs[0].token_ids


def test_best_of_is_n_or_refused(tiny) -> None:
    options = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    assert len(tiny.completions.create(n=2, best_of=2, **options).choices) == 2
    with pytest.raises(openai.BadRequestError, match=r"best_of=3 .*use n") as refused:
        tiny.completions.create(n=2, best_of=3, **options)
    assert refused.value.param == "best_of"


# Fields of sampling, at both endpoints

RANDOM = {"temperature": 1.0, "seed": 3}
FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"temperature": 1.0, "seed": 3}),
    ({"temperature": 1.0, "seed": 3}, {"seed": 4}),
    (RANDOM, {"temperature": 2.0}),
    (RANDOM, {"top_p": 0.3}),
    (RANDOM, {"top_k": 2}),
    (RANDOM, {"min_p": 0.5}),
    (RANDOM, {"n": 3}),
    ({}, {"presence_penalty": 2.0}),
    ({}, {"frequency_penalty": 2.0}),
    ({}, {"repetition_penalty": 5.0}),
    ({}, {"logit_bias": {"66": 100}}),
    ({}, {"logit_bias": {"174": -100}}),
    ({}, {"bad_words": ["&"]}),
    ({}, {"allowed_token_ids": [40, 41, 42]}),
    ({}, {"stop": "GY"}),
    ({}, {"stop": ["nothing", "YO"]}),
    ({"stop": "GY"}, {"include_stop_str_in_output": True}),
    ({}, {"stop_token_ids": [39]}),
    ({"stop_token_ids": [39]}, {"include_stop_str_in_output": True}),
    ({}, {"ignore_eos": True}),
    ({"stop": "GY"}, {"min_tokens": 18}),
    ({}, {"min_tokens": 22}),
    ({"ignore_eos": True}, {"skip_special_tokens": False}),
    ({}, {"max_tokens": 3}),
]


@pytest.mark.parametrize(("others", "fields"), FIELDS, ids=str)
def test_a_sampling_field_does_what_it_does_offline_at_both_endpoints(tiny, offline, others, fields) -> None:
    def expected(**given) -> list[tuple[Any, ...]]:
        outputs = generate(offline, PROMPT, SamplingParams(**{"temperature": 0, "max_tokens": 24} | given)).outputs
        return [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in outputs]

    def got(choices, text_of) -> list[tuple[Any, ...]]:
        return [(text_of(c), tuple(c.token_ids), c.finish_reason, c.stop_reason) for c in choices]

    wanted = expected(**others | fields)
    assert wanted != expected(**others), "the field has no effect here"
    asked = {"max_tokens": 24, "return_token_ids": True} | others | fields
    assert got(complete(tiny, **asked).choices, lambda choice: choice.text) == wanted
    assert got(chat(tiny, **asked).choices, lambda choice: choice.message.content) == wanted
    streamed = Streamed(chat(tiny, stream=True, **asked))
    assert streamed.texts == {index: text for index, (text, *_) in enumerate(wanted)}
    assert streamed.finish_reasons == {index: reason for index, (_, _, reason, _) in enumerate(wanted)}


def test_chat_answers_are_as_long_as_asked_by_either_name_or_as_the_context(tiny) -> None:
    assert chat(tiny, max_completion_tokens=5).usage.completion_tokens == 5
    assert chat(tiny, max_completion_tokens=5, max_tokens=7).usage.completion_tokens == 5
    reply = chat(tiny, ignore_eos=True)
    assert (reply.usage.total_tokens, reply.choices[0].finish_reason) == (MAX_MODEL_LEN, "length")


# Chats


def test_system_turns_and_content_parts_reach_the_chat_template(tiny, offline) -> None:
    parts = [{"type": "text", "text": "first, "}, {"type": "text", "text": "second"}]
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]
    plain = [*turns, {"role": "user", "content": "first, second"}]
    [expected] = offline.chat(plain, replace(ANSWER, logprobs=0), use_tqdm=False)
    assert "[system]be brief[user]one[assistant]two[user]first, second" in expected.prompt
    for messages in (plain, [*turns, {"role": "user", "content": parts}]):
        reply = chat(tiny, messages, max_tokens=24)
        assert (reply.choices[0].message.content, reply.choices[0].message.role) == (
            expected.outputs[0].text,
            "assistant",
        )
        assert reply.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_chat_logprobs_are_those_of_the_engine_whole_and_streamed(tiny, offline) -> None:
    answer = generate(offline, PROMPT, replace(ANSWER, logprobs=3)).outputs[0]
    got = chat(tiny, max_tokens=24, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    for told, token, position in zip(got, answer.token_ids, answer.logprobs, strict=True):
        assert (told.token, told.logprob) == (position[token].decoded_token, pytest.approx(position[token].logprob))
        best = sorted((p for p in position.values() if p.rank <= 3), key=lambda p: p.rank)
        assert [top.token for top in told.top_logprobs] == [p.decoded_token for p in best]
        assert [top.logprob for top in told.top_logprobs] == pytest.approx([p.logprob for p in best])
    content = b"".join(bytes(told.bytes) for told in got[:-1])  # without the end token
    assert content.decode(errors="replace") == answer.text
    assert Streamed(chat(tiny, max_tokens=24, logprobs=True, top_logprobs=3, stream=True)).logprobs[0] == got
    [first, *_] = chat(tiny, max_tokens=24, logprobs=True).choices[0].logprobs.content
    assert (first.logprob, first.top_logprobs) == (got[0].logprob, [])


def test_a_stream_tells_its_usage_last_and_what_the_prefix_cache_saved(tiny) -> None:
    messages = [{"role": "user", "content": "a long prompt of its own, sent again and again " * 6}]

    def streamed_usages(**fields):
        return Streamed(chat(tiny, messages, max_tokens=5, ignore_eos=True, stream=True, **fields)).usages

    assert set(streamed_usages()) == {None}
    *others, last = streamed_usages(stream_options={"include_usage": True})
    assert set(others) == {None}
    whole = chat(tiny, messages, max_tokens=5, ignore_eos=True).usage
    assert last == whole
    assert (whole.completion_tokens, whole.prompt_tokens) == (5, len("[user][assistant]") + len(messages[0]["content"]))
    assert 0.9 * whole.prompt_tokens < whole.prompt_tokens_details.cached_tokens < whole.prompt_tokens
    salted = chat(tiny, messages, max_tokens=5, cache_salt="of somebody else").usage
    assert salted.prompt_tokens_details.cached_tokens == 0
    usages = streamed_usages(stream_options={"include_usage": True, "continuous_usage_stats": True})
    so_far = [usage.completion_tokens for usage in usages]
    assert so_far == sorted(so_far)
    assert (so_far[0], so_far[-1]) == (0, 5)


def test_16_streams_at_once_are_each_as_if_alone(tiny_server, tiny) -> None:
    texts = [f"number {'x' * i}" for i in range(16)]
    lengths = [10 + 5 * (i % 4) for i in range(16)]
    alone = [
        chat(tiny, [{"role": "user", "content": text}], max_tokens=length, ignore_eos=True).choices[0].message.content
        for text, length in zip(texts, lengths, strict=True)
    ]
    assert len(set(alone)) == 16

    async def stream(client: openai.AsyncOpenAI, text: str, length: int, *, is_chat: bool) -> str:
        asked = {"max_tokens": length, "stream": True}
        if is_chat:
            chunks = await chat(client, [{"role": "user", "content": text}], ignore_eos=True, **asked)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        chunks = await complete(client, f"[user]{text}[assistant]", ignore_eos=True, **asked)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_at_once() -> list[str]:
        async with tiny_server.async_client() as client:
            return await asyncio.gather(*(stream(client, texts[i], lengths[i], is_chat=i % 2 == 0) for i in range(16)))

    assert asyncio.run(all_at_once()) == alone


# A model that can speak


def test_greedy_answers_are_those_of_transformers(smollm) -> None:
    answers = sorted(REFERENCE, key=lambda answer: len(answer["prompt"]))[:8]
    reply = smollm.completions.create(
        model="smollm2",
        prompt=[answer["prompt"] for answer in answers],
        temperature=0,
        max_tokens=24,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert [choice.token_ids for choice in reply.choices] == [answer["tokens"][:24] for answer in answers]


def test_a_conversation_is_answered_whole_streamed_and_by_the_clients_helper(smollm, chat_server) -> None:
    options = {"model": "smollm2", "messages": CAPITAL, "temperature": 0, "max_tokens": 16}
    whole = smollm.chat.completions.create(**options)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.choices[0].finish_reason == "stop"
    assert Streamed(smollm.chat.completions.create(stream=True, **options)).texts == {
        0: "The capital of France is Paris."
    }
    with smollm.chat.completions.stream(**options) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(pieces) > 5
    assert "".join(pieces) == final.choices[0].message.content == "The capital of France is Paris."

    async def ask() -> str | None:
        async with chat_server.async_client() as client:
            return (await client.chat.completions.create(**options)).choices[0].message.content

    assert asyncio.run(ask()) == "The capital of France is Paris."


def test_a_conversation_goes_on_from_its_earlier_turns(smollm) -> None:
    def ask(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        reply = smollm.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=24)
        return reply.choices[0].message.content

    first = ("user", "My cat is called Whiskers."), ("assistant", "That is a lovely name!")
    assert "Whiskers" in ask(*first, ("user", "What is the name of my cat?"))
    assert "Whiskers" not in ask(("user", "What is the name of my cat?"))


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_a_stop_string_across_tokens_ends_the_answer_before_its_first_character(smollm, is_streamed) -> None:
    options = {
        "model": "smollm2",
        "messages": CAPITAL,
        "temperature": 0,
        "max_tokens": 16,
        "stop": ["ce is Pa", "Rome"],
    }
    if is_streamed:
        streamed = Streamed(smollm.chat.completions.create(stream=True, **options))
        assert (streamed.texts, streamed.finish_reasons) == ({0: "The capital of Fran"}, {0: "stop"})
    else:
        [choice] = smollm.chat.completions.create(**options).choices
        assert (choice.message.content, choice.finish_reason) == ("The capital of Fran", "stop")
        assert choice.stop_reason == "ce is Pa"


# Answers of a prescribed form


class Capital(BaseModel):
    """An answer to CAPITAL."""

    city: str
    country: str


def test_an_answer_is_parsed_into_a_pydantic_model_whole_and_streamed(smollm) -> None:
    options = {"model": "smollm2", "messages": CAPITAL, "temperature": 0, "max_tokens": 40, "response_format": Capital}
    [choice] = smollm.chat.completions.parse(**options).choices
    assert isinstance(choice.message.parsed, Capital)
    assert "Paris" in choice.message.parsed.city
    with smollm.chat.completions.stream(**options) as stream:
        [done] = [event for event in stream if event.type == "content.done"]
    assert done.parsed == choice.message.parsed


TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<city>",
        "content": {"type": "json_schema", "json_schema": {"enum": ["Paris", "Rome"]}},
        "end": "</city>",
    },
}


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"structured_outputs": {"regex": r"[A-Z][a-z]{2,9}\."}}, r"[A-Z][a-z]{2,9}\."),
        ({"structured_outputs": {"choice": ["Berlin", "Paris", "Rome"]}}, "Berlin|Paris|Rome"),
        ({"structured_outputs": {"grammar": 'root ::= "<" [a-z]+ ">"'}}, "<[a-z]+>"),
        ({"guided_choice": ["Paris!", "Rome!"]}, "Paris!|Rome!"),
        ({"response_format": TAG}, '<city>"(Paris|Rome)"</city>'),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, '<city>"(Paris|Rome)"</city>'),
        ({"response_format": {"type": "text"}}, r"The capital of France is Paris\."),
    ],
    ids=["regex", "choice", "grammar", "guided_choice", "tag", "tag as text", "text"],
)
def test_an_answer_has_the_form_that_is_asked_for(smollm, fields, form) -> None:
    create = smollm.chat.completions.create
    asked = sdk_fields(create, {"temperature": 0, "max_tokens": 16} | fields)
    [choice] = create(model="smollm2", messages=CAPITAL, **asked).choices
    assert (choice.finish_reason, bool(re.fullmatch(form, choice.message.content))) == ("stop", True), choice


def test_an_answer_is_any_json_object(tiny) -> None:
    """Of the tiny model, helped to an end: its tokens are bytes, and it closes what it opens if it may."""
    endings = {str(ord(sign) - 32): 30 for sign in '}"]'} | {str(EOS): 50}
    for reply in (
        complete(tiny, max_tokens=100, logit_bias=endings, response_format={"type": "json_object"}),
        chat(tiny, max_tokens=100, logit_bias=endings, response_format={"type": "json_object"}),
    ):
        [choice] = reply.choices
        text = choice.message.content if hasattr(choice, "message") else choice.text
        assert (choice.finish_reason, type(json.loads(text))) == ("stop", dict)
