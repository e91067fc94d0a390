"""Responses and their streams: every one goes through OpenAI's own client, which checks the shapes."""

import asyncio
import json
from contextlib import ExitStack
from types import SimpleNamespace

import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response
from published import ReplyCheck
from scripted_calls import THINKS_TALKS_CALLS, ScriptedCall, Wire, answers, gain, streamed

from stepgraph.engine.outputs import Logprob
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import AnswerDelta
from stepgraph.errors import EngineDeadError, RequestError
from stepgraph.server.chat import ChatCall, Gain
from stepgraph.server.conversation import ToolUse
from stepgraph.server.protocol import Function, Tool
from stepgraph.server.responses import (
    ResponsesReply,
    ResponsesRequest,
    as_begun,
    as_chat,
    check,
    messages_of,
    tools_of,
)
from stepgraph.server.service import Context

UNKNOWN_TO_THE_CLIENT = {"store", "bytes", "name", "presence_penalty", "frequency_penalty"}
"""Fields that the client's types lack here or there, and the API's reference has."""
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "description": "Of a place."}
LOGPROBS = ["message.output_text.logprobs"]


def request_of(**fields) -> ResponsesRequest:
    return ResponsesRequest(**({"input": "Hi"} | fields))


def reply_of(gains, *, error=None, **fields) -> ResponsesReply:
    return reply_to(ScriptedCall(gains, error), **fields)


def reply_to(call: ScriptedCall, **fields) -> ResponsesReply:
    request = request_of(**fields)
    begun = as_begun(request, SamplingParams(temperature=0.5, top_p=0.9), model="tiny", id="resp_1")
    return ResponsesReply(call, begun, num_top_logprobs=request.top_logprobs or 0)


class ResponsesWire(Wire):
    def whole(self, reply: ResponsesReply) -> Response:
        self._content = (asyncio.run(reply.reply()), "application/json")
        self._check()
        return checked(self._client.responses.create(model="tiny", input="Hi"))

    def stream(self, reply: ResponsesReply, *, timeout_s: float | None = None) -> list:
        content = asyncio.run(streamed(reply, timeout_s))
        self._content = (content, "text/event-stream")
        self._check()
        return [checked(event) for event in self._client.responses.create(model="tiny", input="Hi", stream=True)]

    def _check(self) -> None:
        content, media_type = self._content
        check = ReplyCheck("/v1/responses", 200, media_type)
        check.feed(content)
        check.end()

    def accumulated(self, reply: ResponsesReply) -> Response:
        """What the client makes of a stream."""
        self.stream(reply)
        with self._client.responses.stream(model="tiny", input="Hi") as stream:
            return stream.get_final_response()


def checked(value):
    """`value`, all of whose fields the client knows."""
    if isinstance(value, pydantic.BaseModel):
        assert set(value.model_extra or ()) <= UNKNOWN_TO_THE_CLIENT, value
        for name in type(value).model_fields:
            checked(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            checked(one)
    return value


@pytest.fixture(scope="module")
def wire() -> ResponsesWire:
    return ResponsesWire(openai.OpenAI, "http://test/v1")


def plain(response) -> dict:
    """A response without what chance and time put in."""

    def strip(value):
        if isinstance(value, list):
            return [strip(one) for one in value]
        if isinstance(value, dict):
            return {
                name: strip(one)
                for name, one in value.items()
                if name not in ("id", "call_id", "created_at", "completed_at")
            }
        return value

    return strip(response.model_dump())


def shown(response) -> list[tuple[str, ...]]:
    """The items of a response, without their looks."""
    found = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.name, item.arguments, item.status))
        else:
            [part] = item.content
            found.append((item.type, part.text, item.status))
    return found


def test_reasoning_text_and_calls_become_items_in_this_order(wire) -> None:
    response = wire.whole(reply_of(THINKS_TALKS_CALLS, tools=[WEATHER]))
    assert shown(response) == [
        ("reasoning", "Let me see.", "completed"),
        ("message", "One moment.", "completed"),
        ("function_call", "weather", '{"place": "Rome"}', "completed"),
        ("function_call", "weather", "{}", "completed"),
    ]
    assert response.output_text == "One moment."
    assert response.status == "completed"
    assert [item.id.partition("_")[0] for item in response.output] == ["rs", "msg", "fc", "fc"]
    ids = [item.id for item in response.output] + [item.call_id for item in response.output[2:]]
    assert len(set(ids)) == 6
    assert ids[-1].startswith("call_")


def test_a_stream_tells_of_each_item_from_its_beginning_to_its_end(wire) -> None:
    events = wire.stream(reply_of(THINKS_TALKS_CALLS))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


@given(answers())
def test_nothing_is_lost_or_moved_however_an_answer_arrives(answer) -> None:
    gains, (reasoning, content, calls) = answer
    reply = asyncio.run(reply_of(gains).reply())
    response = json.loads(reply, object_hook=lambda fields: SimpleNamespace(**fields))
    items = shown(response)
    assert "".join(text for kind, text, *_ in items if kind == "reasoning") == reasoning
    assert "".join(text for kind, text, *_ in items if kind == "message") == content
    assert [(name, text) for kind, name, text, *_ in items if kind == "function_call"] == calls
    assert items
    completed = gains[-1].finish_reason in ("stop", "tool_calls")
    assert [item[-1] for item in items[:-1]] == ["completed"] * (len(items) - 1)
    assert items[-1][-1] == response.status == ("completed" if completed else "incomplete")


@given(answers())
def test_a_stream_has_the_grammar_of_the_api_and_ends_with_the_whole_reply(wire, answer) -> None:
    gains, _ = answer
    events = wire.stream(reply_of(gains))
    whole = wire.whole(reply_of(gains))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    created, in_progress, *events, last = events
    assert (created.type, in_progress.type) == ("response.created", "response.in_progress")
    assert created.response == in_progress.response
    assert (created.response.status, created.response.output) == ("in_progress", [])
    assert last.type == f"response.{last.response.status}"
    assert plain(last.response) == plain(whole)
    assert last.response.id == created.response.id

    events = iter(events)
    for index, item in enumerate(last.response.output):
        added = next(events)
        assert (added.type, added.output_index) == ("response.output_item.added", index)
        assert (added.item.id, added.item.type, added.item.status) == (item.id, item.type, "in_progress")
        topic = {"message": "output_text", "reasoning": "reasoning_text"}.get(item.type, "function_call_arguments")
        if item.type == "function_call":
            assert (added.item.name, added.item.call_id, added.item.arguments) == (item.name, item.call_id, "")
            text = item.arguments
        else:
            assert added.item.content == []
            [part] = item.content
            text = part.text
            event = next(events)
            assert event.type == "response.content_part.added"
            assert (event.part.type, event.part.text) == (part.type, "")
            assert (event.item_id, event.output_index, event.content_index) == (item.id, index, 0)
        told = ""
        while (event := next(events)).type == f"response.{topic}.delta":
            assert (event.item_id, event.output_index) == (item.id, index)
            assert getattr(event, "content_index", 0) == 0
            assert event.delta
            told += event.delta
        assert (event.type, event.item_id, event.output_index) == (f"response.{topic}.done", item.id, index)
        assert told == text == (event.arguments if item.type == "function_call" else event.text)
        if item.type != "function_call":
            event = next(events)
            assert (event.type, event.item_id) == ("response.content_part.done", item.id)
            assert event.part.model_dump() == part.model_dump()
        event = next(events)
        assert (event.type, event.output_index, event.item) == ("response.output_item.done", index, item)
    assert next(events, None) is None


def test_the_client_makes_the_whole_reply_of_a_stream(wire) -> None:
    accumulated = wire.accumulated(reply_of(THINKS_TALKS_CALLS))
    assert shown(accumulated) == shown(wire.whole(reply_of(THINKS_TALKS_CALLS)))


def test_an_answer_of_nothing_is_an_empty_message(wire) -> None:
    assert shown(wire.whole(reply_of([gain(end="stop")]))) == [("message", "", "completed")]


@pytest.mark.parametrize(("end", "reason"), [("length", "max_output_tokens"), ("abort", None)])
def test_an_answer_that_is_cut_off_is_incomplete_and_says_why(wire, end, reason) -> None:
    response = wire.whole(reply_of([gain("Hm."), gain(content="Well"), gain(end=end)]))
    assert response.incomplete_details.reason == reason
    assert response.completed_at is None
    assert shown(response) == [("reasoning", "Hm.", "completed"), ("message", "Well", "incomplete")]


def test_tokens_are_counted(wire) -> None:
    usage = wire.whole(reply_of([gain(end="stop")])).usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (11, 5, 16)
    assert usage.input_tokens_details.cached_tokens == 8
    assert usage.output_tokens_details.reasoning_tokens == 2


def test_a_response_repeats_what_was_asked_for(wire) -> None:
    schema = {"type": "json_schema", "name": "place", "schema": {"type": "object"}, "strict": True}
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": schema},
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "user": "me",
        "store": True,
        "top_logprobs": 2,
        "include": LOGPROBS,
    }
    response = wire.whole(reply_of([gain(end="stop")], **asked))
    found = response.model_dump(by_alias=True, exclude_unset=True)
    for name in ("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "text", "tool_choice", "user"):
        assert found[name] == asked[name], name
    assert (found["tools"][0] | WEATHER, found["top_logprobs"]) == (found["tools"][0], 2)
    assert found["reasoning"] == {"effort": "low", "summary": None}
    assert (found["store"], found["background"], found["truncation"]) == (False, False, "disabled")
    assert (found["temperature"], found["top_p"], found["model"], found["id"]) == (0.5, 0.9, "tiny", "resp_1")


def test_a_response_names_the_defaults_of_what_was_left_open(wire) -> None:
    response = wire.whole(reply_of([gain(end="stop")]))
    assert response.text.format.type == "text"
    assert (response.tool_choice, response.tools, response.parallel_tool_calls) == ("auto", [], True)
    assert (response.metadata, response.error, response.instructions) == ({}, None, None)


# Log-probabilities


def token(text: str) -> dict[int, Logprob]:
    return {0: Logprob(-0.5, 2, text), 1: Logprob(-0.25, 1, "x"), 2: Logprob(-3.0, 3, "y")}


def with_token(text: str, **what) -> Gain:
    found = gain(**what)
    return found._replace(delta=AnswerDelta(0, text, (0,), [token(text)], found.finish_reason, None))


def test_a_message_has_the_log_probabilities_of_its_own_tokens(wire) -> None:
    gains = [
        with_token("Hm", reasoning="Hm"),
        with_token("</think>"),  # held back by itself, and then seen to be no text of the reasoning
        with_token(" Y"),
        with_token("es", content="Yes"),
        with_token("!", content="!"),
        with_token("{}", calls=[(0, "f", "{}")]),
        with_token("", end="stop"),
    ]
    reply = {"include": LOGPROBS, "top_logprobs": 1}
    events = wire.stream(reply_of(gains, **reply))
    deltas = [[one.token for one in event.logprobs] for event in events if event.type == "response.output_text.delta"]
    assert deltas == [["</think>", " Y", "es"], ["!"]]
    [done] = [event for event in events if event.type == "response.output_text.done"]
    assert [one.token for one in done.logprobs] == [*deltas[0], *deltas[1]]
    message = wire.whole(reply_of(gains, **reply)).output[1]
    assert [one.token for one in message.content[0].logprobs] == [*deltas[0], *deltas[1]]
    first = message.content[0].logprobs[0]
    assert (first.logprob, first.bytes) == (-0.5, list(b"</think>"))
    assert [(one.token, one.logprob) for one in first.top_logprobs] == [("x", -0.25)]


def test_without_log_probabilities_there_are_none(wire) -> None:
    [message] = wire.whole(reply_of([gain(content="Yes"), gain(end="stop")])).output
    assert message.content[0].logprobs == []


# Failures


def test_a_stream_that_fails_says_why_and_shows_how_far_it_came(wire) -> None:
    *_, error, failed = wire.stream(reply_of([gain("Hm."), gain(content="We")], error=EngineDeadError("it died")))
    assert (error.type, error.code, error.message) == ("error", "unavailable", "it died (request r1)")
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.sequence_number == error.sequence_number + 1
    assert (failed.response.error.code, failed.response.error.message) == ("server_error", "it died (request r1)")
    assert shown(failed.response) == [("reasoning", "Hm.", "completed"), ("message", "We", "incomplete")]
    assert failed.response.usage is None


def test_a_stream_that_takes_too_long_ends_as_one_that_fails(wire) -> None:
    call = ScriptedCall([gain(content="We")], stalls=True)
    *_, error, failed = wire.stream(reply_to(call), timeout_s=0.05)
    assert (error.type, error.code) == ("error", "timeout")
    assert (failed.type, failed.sequence_number) == ("response.failed", error.sequence_number + 1)
    assert (failed.response.error.code, failed.response.error.message) == ("server_error", error.message)
    assert shown(failed.response) == [("message", "We", "incomplete")]
    assert call.ended


def test_a_failure_of_the_users_is_told_as_such(wire) -> None:
    *_, error, failed = wire.stream(
        reply_of([], error=RequestError("text.format has a flaw; mend it", param="text.format"))
    )
    assert (error.code, error.param) == ("invalid_value", "text.format")
    assert (failed.response.error.code, failed.response.output) == ("invalid_prompt", [])


def test_an_answer_that_fails_unstreamed_raises_what_the_server_turns_into_an_error() -> None:
    with pytest.raises(EngineDeadError):
        asyncio.run(reply_of([gain(content="We")], error=EngineDeadError("it died")).reply())


def test_leaving_a_stream_early_ends_the_call_at_once() -> None:
    call = ScriptedCall([gain(content="a")] * 9)

    async def leave() -> None:
        events = reply_to(call).events()
        for _ in range(5):
            await anext(events)
        assert not call.ended
        await events.aclose()
        assert call.ended

    asyncio.run(leave())


# Requests


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
        call.generation = SimpleNamespace(requests={id: SimpleNamespace(params=params)})
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
