"""Errors name the field they are about as the request spells it, and what is wrong with it by a code."""

import asyncio
import json
import pickle
from typing import Any

import pytest

from stepgraph.errors import ConfigError, Fault, ModelError, RequestError, StepgraphError
from stepgraph.server.errors import api_error
from stepgraph.server.messages import Load, Progress, Refused, TokenUpdate, decode_from_engine, encode
from stepgraph.server.protocol import ChatRequest, CompletionRequest
from stepgraph.server.responses import ResponsesRequest
from stepgraph.server.sse import EventStream, event

VALUE, TYPE, MISSING, TOO_LONG = (
    "invalid_value",
    "invalid_type",
    "missing_required_parameter",
    "context_length_exceeded",
)
ASK = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": ASK, "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
COMPLETIONS, CHAT, RESPONSES, TOKENIZE, DETOKENIZE = BODIES
GENERATION = (COMPLETIONS, CHAT, RESPONSES)
LONG = "x" * 600
LOAD = Load(0, 0, 0.0, 0, 0, 0, 0, 0, 0.0)
BAD_SCHEMA = {"type": "array", "uniqueItems": True}


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# Of all three, with the same name: the value, the place, the status and code.
SAMPLING: list[tuple[dict[str, Any], str | None, int, str]] = [
    ({"model": "gpt"}, "model", 404, "model_not_found"),
    ({"model": 5}, "model", 422, TYPE),
    ({"stream": "maybe"}, "stream", 422, TYPE),
    ({"stream_options": 5}, "stream_options", 422, TYPE),
    ({"stream_options": {"include_usage": "maybe"}}, "stream_options.include_usage", 422, TYPE),
    ({"temperature": -1}, "temperature", 400, VALUE),
    ({"temperature": "hot"}, "temperature", 422, TYPE),
    ({"top_p": 0}, "top_p", 400, VALUE),
    ({"top_k": -2}, "top_k", 400, VALUE),
    ({"min_p": 2}, "min_p", 400, VALUE),
    ({"seed": 2**64}, "seed", 400, VALUE),
    ({"stop": 5}, "stop", 422, TYPE),
    ({"stop": ["a", 5]}, "stop", 422, TYPE),
    ({"stop": [""]}, "stop", 400, VALUE),
    ({"stop": ["a"] * 17}, "stop", 400, VALUE),
    ({"stop_token_ids": [-1]}, "stop_token_ids", 400, VALUE),
    ({"stop_token_ids": [1, "x"]}, "stop_token_ids[1]", 422, TYPE),
    ({"stop_token_ids": list(range(99))}, "stop_token_ids", 400, VALUE),
    ({"include_stop_str_in_output": "maybe"}, "include_stop_str_in_output", 422, TYPE),
    ({"ignore_eos": "maybe"}, "ignore_eos", 422, TYPE),
    ({"min_tokens": -1}, "min_tokens", 400, VALUE),
    ({"presence_penalty": 3}, "presence_penalty", 400, VALUE),
    ({"frequency_penalty": -3}, "frequency_penalty", 400, VALUE),
    ({"repetition_penalty": 0}, "repetition_penalty", 400, VALUE),
    ({"logit_bias": {"a": 1}}, "logit_bias", 400, VALUE),
    ({"logit_bias": {"1": 101}}, "logit_bias", 400, VALUE),
    ({"logit_bias": {"99999": 1}}, "logit_bias", 400, VALUE),
    ({"bad_words": [""]}, "bad_words", 400, VALUE),
    ({"bad_words": [5]}, "bad_words[0]", 422, TYPE),
    ({"bad_words": ["y" * 99]}, "bad_words", 400, VALUE),
    ({"allowed_token_ids": []}, "allowed_token_ids", 400, VALUE),
    ({"allowed_token_ids": [99999]}, "allowed_token_ids", 400, VALUE),
    ({"skip_special_tokens": "maybe"}, "skip_special_tokens", 422, TYPE),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", 400, VALUE),
    ({"priority": "x"}, "priority", 422, TYPE),
    ({"cache_salt": "x" * 1025}, "cache_salt", 422, TYPE),
    ({"speculative": {"num_speculative_tokens": -1}}, "speculative", 400, VALUE),
    ({"speculative": 5}, "speculative", 422, TYPE),
    ({"metadata": 5}, "metadata", 422, TYPE),
    ({"response_format": "json"}, "response_format", 422, TYPE),
    ({"response_format": {"type": "xml"}}, "response_format.type", 400, VALUE),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", 400, VALUE),
    ({"response_format": schema_format(None)}, "response_format.json_schema.schema", 400, VALUE),
    ({"response_format": schema_format([])}, "response_format.json_schema.schema", 400, VALUE),
    ({"response_format": schema_format(BAD_SCHEMA)}, "response_format.json_schema.schema", 400, VALUE),
    ({"response_format": schema_format(True), "guided_regex": "a"}, "response_format", 400, VALUE),
    (
        {"response_format": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": BAD_SCHEMA}}},
        "response_format.format.json_schema",
        400,
        VALUE,
    ),
    ({"structured_outputs": {"json": BAD_SCHEMA}}, "structured_outputs.json", 400, VALUE),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", 400, VALUE),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", 400, VALUE),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", 400, VALUE),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", 400, VALUE),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", 400, VALUE),
    ({"guided_json": BAD_SCHEMA}, "guided_json", 400, VALUE),
    ({"guided_json": 5}, "guided_json", 422, TYPE),
    ({"guided_json": "[" * 200}, "guided_json", 400, "nested_too_deep"),
    ({"guided_regex": "(?=a)"}, "guided_regex", 400, VALUE),
    ({"guided_choice": []}, "guided_choice", 400, VALUE),
    ({"guided_grammar": "root ::= "}, "guided_grammar", 400, VALUE),
]
CONVERSATION: list[tuple[dict[str, Any], str | None, int, str]] = [
    ({"top_logprobs": 5}, "top_logprobs", 400, VALUE),
    ({"tool_choice": "sometimes"}, "tool_choice", 422, TYPE),
    ({"tool_choice": {"type": "function"}}, "tool_choice", 422, TYPE),
    ({"tool_choice": "required"}, "tool_choice", 400, VALUE),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs", 422, TYPE),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", 400, VALUE),
    ({"chat_template_kwargs": {"documents": 5}}, "chat_template_kwargs.documents", 400, VALUE),
    ({"parallel_tool_calls": "maybe"}, "parallel_tool_calls", 422, TYPE),
]
CUT = {"truncate_prompt_tokens": 50}
"""For what is described at length in the prompt, too."""
CALL = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}, {"id": "d"}]}
OF_ONE: dict[str, list[tuple[dict[str, Any], str | None, int, str]]] = {
    COMPLETIONS: [
        ({"prompt": None}, "prompt", 422, TYPE),
        ({"prompt": 1.5}, "prompt", 422, TYPE),
        ({"prompt": ["a", 5]}, "prompt", 422, TYPE),
        ({"prompt": []}, "prompt", 400, VALUE),
        ({"prompt": [[]]}, "prompt", 400, VALUE),
        ({"prompt": [99999]}, "prompt", 400, VALUE),
        ({"prompt": LONG}, "prompt", 400, TOO_LONG),
        ({"prompt": [1] * 512}, "prompt", 400, TOO_LONG),
        ({"prompt": "\ud800"}, "prompt", 400, VALUE),
        ({"max_tokens": -1}, "max_tokens", 400, VALUE),
        ({"max_tokens": 0}, "max_tokens", 400, VALUE),
        ({"max_tokens": "many"}, "max_tokens", 422, TYPE),
        ({"max_tokens": None, "min_tokens": 512}, "min_tokens", 400, VALUE),
        ({"min_tokens": 2}, "min_tokens", 400, VALUE),
        ({"n": 0}, "n", 400, VALUE),
        ({"n": 17}, "n", 400, VALUE),
        ({"logprobs": 100}, "logprobs", 400, VALUE),
        ({"prompt_logprobs": -1}, "prompt_logprobs", 400, VALUE),
        ({"best_of": 2}, "best_of", 400, VALUE),
        ({"suffix": "x"}, "suffix", 400, VALUE),
        ({"echo": "maybe"}, "echo", 422, TYPE),
        ({"add_special_tokens": "maybe"}, "add_special_tokens", 422, TYPE),
    ],
    CHAT: [
        ({"messages": None}, "messages", 422, TYPE),
        ({"messages": []}, "messages", 400, VALUE),
        ({"messages": [5]}, "messages[0]", 422, TYPE),
        ({"messages": [*ASK, {"content": "Hi"}]}, "messages[1].role", 422, MISSING),
        ({"messages": [*ASK, {"role": 5}]}, "messages[1].role", 422, TYPE),
        ({"messages": [*ASK, {"role": "narrator", "content": "x"}]}, "messages[1].role", 400, VALUE),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", 422, TYPE),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", 400, VALUE),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", 400, VALUE),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": 5}]}, "messages[1].tool_calls", 422, TYPE),
        ({"messages": [*ASK, CALL]}, "messages[1].tool_calls[1].function", 400, VALUE),
        ({"messages": [{"role": "user", "content": LONG}]}, "messages", 400, TOO_LONG),
        ({"messages": ASK * 600}, "messages", 400, TOO_LONG),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", 400, VALUE),
        ({"max_tokens": 0}, "max_tokens", 400, VALUE),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", 400, VALUE),
        ({"max_tokens": 3, "max_completion_tokens": -1}, "max_completion_tokens", 400, VALUE),
        ({"max_tokens": None, "min_tokens": 512}, "min_tokens", 400, VALUE),
        ({"n": 17}, "n", 400, VALUE),
        ({"logprobs": 5}, "logprobs", 422, TYPE),
        ({"logprobs": True, "top_logprobs": 100}, "top_logprobs", 400, VALUE),
        ({"prompt_logprobs": -1}, "prompt_logprobs", 400, VALUE),
        ({"tools": 5}, "tools", 422, TYPE),
        ({"tools": [{"type": "function"}]}, "tools[0].function", 422, MISSING),
        ({"tools": [function(), {"type": "browser", "function": {}}]}, "tools[1].type", 422, TYPE),
        ({"tools": [function(), {"type": "function", "function": {}}]}, "tools[1].function.name", 422, MISSING),
        ({"tools": [function(), function()]}, "tools[1].function.name", 400, VALUE),
        ({"tools": [function()], "tool_choice": function("g")}, "tool_choice", 400, VALUE),
        (
            {"tools": [function(), function("g", parameters=BAD_SCHEMA)], "tool_choice": function("g")} | CUT,
            "tools[1].function.parameters",
            400,
            VALUE,
        ),
        ({"tools": [function(parameters=BAD_SCHEMA)], "tool_choice": "required"} | CUT, "tools", 400, VALUE),
        (
            {"tools": [function()], "response_format": schema_format(BAD_SCHEMA)} | CUT,
            "response_format.json_schema.schema",
            400,
            VALUE,
        ),
        ({"documents": [{"text": "x"}]}, "documents", 400, VALUE),
        ({"chat_template": "{{ 1 }}"}, "chat_template", 400, VALUE),
        ({"add_generation_prompt": "maybe"}, "add_generation_prompt", 422, TYPE),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            400,
            VALUE,
        ),
        ({"include_reasoning": "maybe"}, "include_reasoning", 422, TYPE),
        ({"reasoning_effort": 5}, "reasoning_effort", 422, TYPE),
    ],
    RESPONSES: [
        ({"input": None}, "input", 422, TYPE),
        ({"input": []}, "input", 400, VALUE),
        ({"input": [5]}, "input", 422, TYPE),
        ({"input": LONG}, "input", 400, TOO_LONG),
        ({"input": [*ASK, {"role": "narrator", "content": "x"}]}, "input[1].role", 400, VALUE),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", 400, VALUE),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", 400, VALUE),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", 400, VALUE),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", 400, VALUE),
        ({"instructions": 5}, "instructions", 422, TYPE),
        ({"max_output_tokens": 0}, "max_output_tokens", 400, VALUE),
        ({"max_output_tokens": 2**63}, "max_output_tokens", 400, VALUE),
        ({"max_output_tokens": None, "min_tokens": 512}, "min_tokens", 400, VALUE),
        ({"n": 2}, "n", 400, VALUE),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 100}, "top_logprobs", 400, VALUE),
        ({"include": "x"}, "include", 422, TYPE),
        ({"prompt_logprobs": 1}, "prompt_logprobs", 400, VALUE),
        ({"return_token_ids": True}, "return_token_ids", 400, VALUE),
        ({"tools": [{"name": "f"}]}, "tools[0].type", 422, MISSING),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", 400, VALUE),
        ({"tools": [{"type": "function"}]}, "tools[0].name", 400, VALUE),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools[1].name", 400, VALUE),
        (
            {
                "tools": [{"type": "function", "name": "f", "parameters": BAD_SCHEMA}],
                "tool_choice": {"type": "function", "name": "f"},
                **CUT,
            },
            "tools[0].parameters",
            400,
            VALUE,
        ),
        ({"text": 5}, "text", 422, TYPE),
        ({"text": {"format": 5}}, "text.format", 422, TYPE),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", 400, VALUE),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", 400, VALUE),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", 400, VALUE),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": BAD_SCHEMA}}},
            "text.format.schema",
            400,
            VALUE,
        ),
        (
            {
                "text": {"format": {"type": "json_schema", "name": "x", "schema": BAD_SCHEMA}},
                "tools": [{"type": "function", "name": "f"}],
                **CUT,
            },
            "text.format.schema",
            400,
            VALUE,
        ),
        ({"reasoning": {"effort": 5}}, "reasoning.effort", 422, TYPE),
        ({"truncation": "auto"}, "truncation", 400, VALUE),
        ({"previous_response_id": "x"}, "previous_response_id", 400, VALUE),
        ({"conversation": "x"}, "conversation", 400, VALUE),
        ({"prompt": {"id": "x"}}, "prompt", 400, VALUE),
        ({"background": True}, "background", 400, VALUE),
        ({"metadata": {"a": 5}}, "metadata.a", 422, TYPE),
    ],
    TOKENIZE: [
        ({"prompt": 5}, "prompt", 422, TYPE),
        ({"prompt": None}, "prompt", 400, VALUE),
        ({"messages": ASK}, "messages", 400, VALUE),
        ({"prompt": LONG * 20}, "prompt", 400, TOO_LONG),
        ({"prompt": "\ud800"}, "prompt", 400, VALUE),
        ({"prompt": None, "messages": [{"role": "user", "content": "\ud800"}]}, "messages", 400, VALUE),
        ({"prompt": None, "messages": ASK, "documents": [{"text": "x"}]}, "documents", 400, VALUE),
        ({"prompt": None, "messages": [{}]}, "messages[0].role", 422, MISSING),
        ({"model": "gpt"}, "model", 404, "model_not_found"),
        ({"add_special_tokens": "maybe"}, "add_special_tokens", 422, TYPE),
        ({"return_token_strs": "maybe"}, "return_token_strs", 422, TYPE),
    ],
    DETOKENIZE: [
        ({"tokens": None}, "tokens", 422, TYPE),
        ({"tokens": [1, "x"]}, "tokens[1]", 422, TYPE),
        ({"tokens": [-1]}, "tokens", 400, VALUE),
        ({"model": "gpt"}, "model", 404, "model_not_found"),
    ],
}
CASES = [
    *((path, *case) for path in GENERATION for case in SAMPLING),
    *((path, *case) for path in (CHAT, RESPONSES) for case in CONVERSATION),
    *((path, *case) for path, cases in OF_ONE.items() for case in cases),
]


@pytest.mark.parametrize("path", BODIES)
def test_an_error_names_the_field_as_the_request_spells_it(tiny_server, path) -> None:
    cases = [case[1:] for case in CASES if case[0] == path]
    assert len(cases) >= 4
    wrong = []
    for fields, *expected in cases:
        reply = tiny_server.post(path, BODIES[path] | fields)
        error = reply.json.get("error", {})
        found = [error.get("param"), reply.status, error.get("code")]
        if found != expected:
            wrong.append((str(fields)[:100], expected, found, error.get("message")))
    assert not wrong, "\n".join(map(str, wrong))


def test_a_message_that_begins_with_the_field_begins_with_the_requests_name_for_it(tiny_server) -> None:
    for path, fields in (
        (CHAT, {"max_tokens": None, "max_completion_tokens": -1}),
        (CHAT, {"response_format": schema_format(BAD_SCHEMA)}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": BAD_SCHEMA}}}),
        (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 100}),
    ):
        error = tiny_server.post(path, BODIES[path] | fields).json["error"]
        assert error["message"].startswith(error["param"]), error


def test_a_body_that_is_no_object_names_no_field(tiny_server) -> None:
    for body, expected in (
        (b"[1]", (422, TYPE)),
        (b"", (422, TYPE)),
        (b"{", (400, "invalid_json")),
        (b"[" * 200, (400, "nested_too_deep")),
        (json.dumps([""] * 250_000).encode(), (400, "too_many_items")),
        (b'{"seed": ' + b"1" * 5000 + b"}", (400, VALUE)),
    ):
        reply = tiny_server.post(CHAT, body)
        error = reply.json["error"]
        assert (error["param"], reply.status, error["code"]) == (None, *expected), error


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (CompletionRequest(prompt="a", guided_json={}), "guided_json"),
        (ChatRequest(messages=[], response_format=schema_format({})), "response_format.json_schema.schema"),
        (
            ResponsesRequest(input="a", text={"format": {"type": "json_schema", "name": "x", "schema": {}}}),
            "text.format.schema",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_in_a_stream_tells_its_fields(request_, param) -> None:
    async def events():
        yield b"data: {}\n\n"
        raise Fault("the answer is wrong", is_users=True, param="structured_outputs.json", code="few").error()

    async def send(message) -> None:
        sent.append(message.get("body", b""))

    sent: list[bytes] = []
    stream = EventStream(
        events(), failed=lambda failure: event(failure.body()), request_id="r", spelled=request_.spelled
    )
    asyncio.run(stream({}, asyncio.Event().wait, send))
    error = json.loads(sent[-2].removeprefix(b"data: "))["error"]
    assert (error["param"], error["code"]) == (param, "few")


def test_fields_of_errors_survive_pickling_and_the_way_between_processes() -> None:
    for kind in (StepgraphError, RequestError, ConfigError, ModelError):
        error = pickle.loads(pickle.dumps(kind("n=0 is too few", param="n", code="few")))
        assert (type(error), str(error), error.param, error.code) == (kind, "n=0 is too few", "n", "few")
    fault = Fault.of(RequestError("n=0 is too few", param="n", code="few"))
    assert fault == Fault("n=0 is too few", is_users=True, param="n", code="few")
    for told in (fault, Fault.of(ValueError("a bug")), Fault.of(KeyError())):
        refused = decode_from_engine(encode(Refused("g", told)))
        assert refused.error == told
        progress = decode_from_engine(encode(Progress([TokenUpdate("r", (), "error", error=told)], [], LOAD)))
        assert progress.updates[0].error == told
    again = fault.error("the answer ended early: ")
    assert (type(again), str(again), again.param, again.code) == (
        RequestError,
        "the answer ended early: n=0 is too few",
        "n",
        "few",
    )


def test_prose_makes_no_fields() -> None:
    """Neither a code nor a param comes from what a message says."""
    for message in ("max_model_len=5 holds too few tokens", "temperature=3 must be less", "tools has two"):
        error = api_error(RequestError(message), request_id="r")
        assert (error.status, error.param, error.code) == (400, None, VALUE)
