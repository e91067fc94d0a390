"""Requests to the Responses endpoint: what their items, forms and tools become, and what is refused."""

import asyncio
from contextlib import ExitStack
from types import SimpleNamespace

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from responses_wire import LOGPROBS, WEATHER, ResponsesWire, reply_of, request_of
from scripted_calls import THINKS_TALKS_CALLS, ScriptedCall, gain

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import RequestError
from stepgraph.server.chat import ChatCall
from stepgraph.server.conversation import ToolUse
from stepgraph.server.protocol import Function, Tool
from stepgraph.server.responses import (
    ResponsesReply,
    as_chat,
    check,
    messages_of,
    tools_of,
)
from stepgraph.server.service import Context


@pytest.fixture(scope="module")
def wire() -> ResponsesWire:
    return ResponsesWire(openai.OpenAI, "http://test/v1")


def test_a_text_is_what_the_user_says() -> None:
    assert messages_of(request_of(input="Hi", instructions="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_what_the_assistant_did_in_one_turn_is_one_message() -> None:
    items = [
        {"role": "developer", "content": "Metric."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "How is "}, {"type": "input_text", "text": "Rome?"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One moment."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"place": "Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ""},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
        {"type": "function_call_output", "call_id": "c1", "output": "warm"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "cold"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "…"},
    ]
    assert messages_of(request_of(input=items, instructions="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Metric."},
        {"role": "user", "content": "How is Rome?"},
        {
            "role": "assistant",
            "reasoning_content": "Ask.",
            "content": "One moment.\n\nNo more.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}},
                {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": ""}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "warm"},
        {"role": "tool", "tool_call_id": "c2", "content": "cold"},
    ]


def test_a_turn_of_many_items_is_their_texts_with_nothing_for_empty_ones() -> None:
    texts = ["", "first", "", *map(str, range(20_000)), "last", ""]
    items = [{"role": "assistant", "content": text} for text in texts]
    [message] = messages_of(request_of(input=items))
    assert message == {"role": "assistant", "content": "\n\n".join(filter(None, texts))}


def test_the_items_of_a_response_can_be_sent_back(wire) -> None:
    response = wire.whole(reply_of(THINKS_TALKS_CALLS))
    [message] = messages_of(request_of(input=[item.model_dump(mode="json") for item in response.output]))
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "One moment.")
    calls = [(call["id"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert calls == [(item.call_id, item.arguments) for item in response.output[2:]]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"role": "robot", "content": "x"}, r"input\[1\].role='robot' is not known; use user"),
        ({"role": "user"}, r"input\[1\].content must be text or a list of parts, not None"),
        ({"content": "x"}, r"input\[1\].role=None is not known"),
        (
            {"role": "user", "content": [{"type": "input_image"}]},
            r"content\[0\] is of type 'input_image', and this model",
        ),
        ({"role": "user", "content": ["x"]}, r"content\[0\] is of type None"),
        ({"role": "user", "content": [{"type": "input_text"}]}, r"content\[0\].text must be text, not None"),
        ({"type": "item_reference", "id": "msg_1"}, r"input\[1\] is of type 'item_reference', and this server takes"),
        ({"type": ["message"]}, r"input\[1\] is of type \['message'\]"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, r"arguments must be text, not None"),
        ({"type": "function_call", "call_id": "c", "arguments": "{}"}, r"name must be text, not None"),
        ({"type": "function_call_output", "output": "x"}, r"call_id must be text, not None"),
        (
            {"type": "function_call_output", "call_id": "c", "output": 5},
            r"output must be text or a list of parts, not 5",
        ),
    ],
)
def test_an_item_that_cannot_be_taken_is_named(item, says) -> None:
    with pytest.raises(RequestError, match=says):
        messages_of(request_of(input=[{"role": "user", "content": "x"}, item]))


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(RequestError, match="input is empty"):
        messages_of(request_of(input=[]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["", "text", "message", "assistant", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "name", "call_id", "arguments", "output"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.sampled_from(["type", "role", "content", "name", "call_id", "output"]), JSON)))
def test_whatever_the_items_they_are_taken_or_refused(items) -> None:
    try:
        messages = messages_of(request_of(input=items))
    except RequestError:
        return
    assert all(isinstance(message["content"], str) for message in messages)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"previous_response_id": "resp_0"}, "previous_response_id='resp_0' is not supported: the server is stateless"),
        ({"conversation": "conv_1"}, "conversation='conv_1' is not supported: .* send the whole conversation in input"),
        ({"prompt": {"id": "p"}}, "prompt={'id': 'p'} is not supported"),
        ({"background": True}, "background=True is not supported"),
        ({"truncation": "auto"}, "truncation='auto' is not supported; use disabled"),
        ({"n": 2}, "n=2 is not supported"),
        ({"prompt_logprobs": 0}, "prompt_logprobs has no place in a response"),
        ({"return_token_ids": True}, "return_token_ids has no place in a response"),
        ({"top_logprobs": 1}, "top_logprobs needs 'message.output_text.logprobs' in include"),
        ({"max_output_tokens": 0}, "max_output_tokens=0 must be at least 1"),
        ({"instructions": "\ud800"}, "half of a surrogate pair"),
        ({"metadata": {"a": "\ud800"}}, "half of a surrogate pair"),
    ],
)
def test_what_the_endpoint_does_not_have_is_refused(fields, says) -> None:
    with pytest.raises(RequestError, match=says):
        check(request_of(**fields))


def test_what_changes_nothing_is_accepted() -> None:
    check(
        request_of(
            n=1,
            store=True,
            background=False,
            previous_response_id=None,
            truncation="disabled",
            include=["reasoning.encrypted_content"],
            top_logprobs=0,
        )
    )


def test_a_request_becomes_one_of_the_chat_endpoint() -> None:
    form = {"type": "json_schema", "name": "place", "schema": {"type": "object"}}
    chat = as_chat(
        request_of(
            temperature=0.25,
            top_k=7,
            cache_salt="s",
            max_output_tokens=9,
            include=LOGPROBS,
            top_logprobs=3,
            reasoning={"effort": "low"},
            text={"format": form},
            chat_template_kwargs={"enable_thinking": False},
        )
    )
    assert (chat.temperature, chat.top_k, chat.cache_salt, chat.max_completion_tokens) == (0.25, 7, "s", 9)
    assert (chat.logprobs, chat.top_logprobs, chat.reasoning_effort) == (True, 3, "low")
    assert chat.response_format == {"type": "json_schema", "json_schema": form}
    assert chat.chat_template_kwargs == {"enable_thinking": False}
    assert as_chat(request_of(top_logprobs=0)).top_logprobs is None  # which needs logprobs there


@pytest.mark.parametrize(
    ("form", "found"), [(None, None), ({"type": "text"}, None), ({"type": "json_object"}, {"type": "json_object"})]
)
def test_text_format_is_the_form_of_the_answer(form, found) -> None:
    assert as_chat(request_of(text={"format": form})).response_format == found


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type='yaml' is not known"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, 'json_schema" needs name and schema'),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 'json_schema" needs name and schema'),
        (
            {"text": {"format": {"type": "json_object"}}, "response_format": {"type": "json_object"}},
            "text.format and response_format each",
        ),
    ],
)
def test_a_form_that_is_not_clear_is_refused(fields, says) -> None:
    with pytest.raises(RequestError, match=says):
        as_chat(request_of(**fields))


@pytest.mark.parametrize(
    ("choice", "forced", "must_call", "names"),
    [
        (None, None, False, ["weather", "f"]),
        ("auto", None, False, ["weather", "f"]),
        ("required", None, True, ["weather", "f"]),
        ("none", None, False, []),
        ({"type": "function", "name": "f"}, "f", True, ["weather", "f"]),
    ],
)
def test_a_choice_among_tools_means_what_it_means_in_chats(choice, forced, must_call, names) -> None:
    tools = tools_of(request_of(tools=[WEATHER, {"type": "function", "name": "f"}], tool_choice=choice))
    assert (tools.forced, tools.must_call, tools.names) == (forced, must_call, names)


def test_functions_are_shown_to_the_model_as_in_chats() -> None:
    [shown_tool] = tools_of(request_of(tools=[WEATHER | {"strict": True}])).shown
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    assert shown_tool == {"type": "function", "function": function | {"strict": True}}


def test_auto_needs_no_tools() -> None:
    assert tools_of(request_of(tools=[], tool_choice="auto")).shown == []


def test_one_call_at_most_if_calls_are_not_parallel() -> None:
    assert tools_of(request_of(tools=[WEATHER], parallel_tool_calls=False)).at_most_one
    assert not tools_of(request_of(tools=[WEATHER])).at_most_one


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        ({"type": "web_search"}, r"tools\[1\] is of type 'web_search', and this server runs no tools of its own"),
        ({"type": "function", "function": {"name": "f"}}, r"tools\[1\] has no name; a function is"),
    ],
)
def test_a_tool_that_is_no_function_is_refused(tool, says) -> None:
    with pytest.raises(RequestError, match=says):
        tools_of(request_of(tools=[WEATHER, tool]))


class CountedName(str):
    """Counts how often names are compared."""

    num_comparisons = 0

    def __eq__(self, other: object) -> bool:
        CountedName.num_comparisons += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_names_of_tools_are_compared_with_those_that_may_be_equal_only() -> None:
    names = [CountedName(f"f{i}") for i in range(500)]
    tools = [Tool(function=Function.model_construct(name=name)) for name in names]
    assert ToolUse.of(tools, None, None).names == names
    CountedName.num_comparisons = 0
    ToolUse.of(tools, None, None)
    assert CountedName.num_comparisons < len(names)
    with pytest.raises(RequestError, match="two functions named 'f7'"):
        ToolUse.of([*tools, tools[7]], None, None)


def test_a_response_tells_what_it_was_asked_for_in_its_events_too(wire) -> None:
    asked = {"max_tool_calls": 3, "safety_identifier": "s", "prompt_cache_key": "k"}
    shown = asked | {"service_tier": "default", "presence_penalty": 0.0, "frequency_penalty": 0.0}
    gains = [gain(content="Yes"), gain(end="stop")]
    created, *_, completed = wire.stream(reply_of(gains, service_tier="auto", **asked))
    for response in (wire.whole(reply_of(gains, **asked)), created.response, completed.response):
        assert {name: getattr(response, name) for name in shown} == shown
    missing = wire.whole(reply_of(gains)).model_dump()
    assert [missing[name] for name in asked] == [None, None, None]


def test_fields_that_nothing_knows_are_listed() -> None:
    assert request_of(max_tool_call=1, user="me").ignored() == ["max_tool_call"]


def test_a_request_reaches_the_engine_as_a_chat(wire, monkeypatch) -> None:
    params = SamplingParams(temperature=0.125, top_p=0.75)
    sent = []

    async def start(read, service, context, *, id, adapter):
        chat, messages, tools = read()
        sent.append((chat.max_completion_tokens, messages, tools.names, id, adapter))
        call = ScriptedCall([gain(content="Yes"), gain(end="stop")])
        call.generation.requests = {id: SimpleNamespace(params=params)}
        return call

    monkeypatch.setattr(ChatCall, "start", start)

    async def in_thread(work):
        return work()

    service = SimpleNamespace(choose_model=lambda name: ("tuned", "/adapters/tuned"), in_thread=in_thread)
    context = Context("r1", 0.0, None, ExitStack(), lambda: None)
    request = request_of(model="tuned", max_output_tokens=9, tools=[WEATHER])
    response = wire.whole(asyncio.run(ResponsesReply.start(request, service, context)))
    assert sent == [(9, [{"role": "user", "content": "Hi"}], ["weather"], response.id, "/adapters/tuned")]
    assert (response.model, response.temperature, response.top_p) == ("tuned", 0.125, 0.75)
    assert response.id.startswith("resp_")
    with pytest.raises(RequestError, match="stateless"):
        asyncio.run(ResponsesReply.start(request_of(previous_response_id="resp_0"), service, context))
    assert len(sent) == 1
