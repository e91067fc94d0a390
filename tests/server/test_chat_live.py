"""Conversations, fields of chat templates and seeds as clients send them: each endpoint does the same with them."""

import json
from typing import Any

import pytest
from tiny import EOS

ASK = [{"role": "user", "content": "How is it?"}]


def post(server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = server.post(path, body)
    assert reply.status == 200, reply.body
    return reply.json


def refused(server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = server.post(path, body)
    assert reply.status == 400, reply.body
    return reply.json["error"]


def chat(server, **fields) -> dict[str, Any]:
    return post(server, "/v1/chat/completions", {"messages": ASK, "max_tokens": 1, "temperature": 0} | fields)


def prompt_of(server, **fields) -> str:
    """What a conversation becomes."""
    tokens = post(server, "/tokenize", fields)["tokens"]
    return post(server, "/detokenize", {"tokens": tokens})["prompt"]


def test_the_developer_is_the_system_at_every_endpoint(tiny_server) -> None:
    prompt = "[system]Be brief.[user]Hi[assistant]"
    user = {"role": "user", "content": "Hi"}
    counts = set()
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be brief."}, user]
        assert prompt_of(tiny_server, messages=messages) == prompt
        counts.add(chat(tiny_server, messages=messages)["usage"]["prompt_tokens"])
        response = post(tiny_server, "/v1/responses", {"input": messages, "max_output_tokens": 1})
        counts.add(response["usage"]["input_tokens"])
    both = {
        "input": [{"role": "developer", "content": "Be brief."}, user],
        "instructions": "Rhyme.",
        "max_output_tokens": 1,
    }
    assert counts == {len(prompt)}
    more = post(tiny_server, "/v1/responses", both)["usage"]["input_tokens"]
    assert more == len("[system]Rhyme.\n\nBe brief.[user]Hi[assistant]")


def test_an_unknown_role_is_refused_with_those_that_there_are(tiny_server) -> None:
    messages = [*ASK, {"role": "narrator", "content": "It rains."}]
    for path in ("/v1/chat/completions", "/tokenize"):
        error = refused(tiny_server, path, {"messages": messages})
        assert error["message"].startswith(
            "messages[1].role='narrator' is not known to the model's chat template; use one of"
        )
        assert error["param"] == "messages[1].role"


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_any_seed_of_64_bits_is_taken_at_every_endpoint(tiny_server, seed) -> None:
    fields = {"seed": seed, "temperature": 1}
    for path, body in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": ASK, "max_tokens": 4, "n": 2}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 4}),
    ):
        first, second = (post(tiny_server, path, body | fields) for _ in range(2))
        shown = "output" if "output" in first else "choices"
        texts = [
            json.dumps([one.get("text", one.get("message", one.get("content"))) for one in r[shown]])
            for r in (first, second)
        ]
        assert texts[0] == texts[1]
    assert (
        "between -2**63 and 2**64 - 1"
        in refused(tiny_server, "/v1/completions", {"prompt": "a", "seed": -(2**63) - 1})["message"]
    )


def test_an_end_token_that_the_request_names_is_no_stop_reason(tiny_server) -> None:
    fields = {"prompt": "a", "logit_bias": {str(EOS): 100}, "stop_token_ids": [EOS]}
    [choice] = post(tiny_server, "/v1/completions", fields)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    [choice] = post(tiny_server, "/v1/completions", fields | {"ignore_eos": True})["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", EOS)


def test_a_message_says_that_nothing_was_refused(tiny_server) -> None:
    [choice] = chat(tiny_server)["choices"]
    assert choice["message"]["refusal"] is None


OPEN = [*ASK, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "[user]How is it?[assistant]It is[assistant]"),
        ({"continue_final_message": True}, "[user]How is it?[assistant]It is"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "[user]How is it?[assistant]It is"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "[user]How is it?[assistant]It is"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "[user]How is it?[assistant]It is[assistant]"),
        ({"chat_template_kwargs": {"documents": []}, "documents": None}, "[user]How is it?[assistant]It is[assistant]"),
    ],
)  # fmt: skip
def test_a_field_of_the_chat_template_may_stand_among_its_variables(tiny_server, fields, prompt) -> None:
    assert prompt_of(tiny_server, messages=OPEN, **fields) == prompt
    assert chat(tiny_server, messages=OPEN, **fields)["usage"]["prompt_tokens"] == len(prompt)
    if set(fields) <= {"chat_template_kwargs"}:
        response = post(tiny_server, "/v1/responses", {"input": OPEN, "max_output_tokens": 1, **fields})
        assert response["usage"]["input_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not taken from requests, since a template is a program"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs.chat_template",
            "--chat-template FILE",
        ),
        (
            {"chat_template_kwargs": {"documents": [{"text": "x"}]}},
            "chat_template_kwargs.documents",
            "no place in the model's chat template",
        ),
        ({"documents": [{"text": "x"}]}, "documents", "no place in the model's chat template"),
        ({"chat_template_kwargs": {"documents": "x"}}, "chat_template_kwargs.documents", "must be a list of objects"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": "no"}},
            "chat_template_kwargs.add_generation_prompt",
            "must be true or false",
        ),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}, "add_generation_prompt": True},
            "add_generation_prompt",
            "is True, and False in chat_template_kwargs; give it in one place",
        ),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "goes on with the last",
        ),
        (
            {"chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs.tools",
            "chat_template_kwargs cannot set 'tools'",
        ),
    ],
)
def test_what_a_chat_template_is_not_given_is_refused_by_its_name(tiny_server, fields, param, message) -> None:
    for path in ("/tokenize", "/v1/chat/completions"):
        error = refused(tiny_server, path, {"messages": OPEN, **fields})
        assert message in error["message"]
        assert error["param"] == param
