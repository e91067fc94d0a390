"""Messages and their streams: each against Anthropic's published schema, and through its own client, which checks the shapes."""

import asyncio
import json
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from hypothesis import given, settings
from jsonschema import Draft202012Validator
from scripted_calls import THINKS_TALKS_CALLS, ScriptedCall, Wire, answers, gain, streamed

from stepgraph.errors import EngineDeadError, RequestError
from stepgraph.server.anthropic import MessagesReply
from stepgraph.server.anthropic_errors import error_content, error_reply
from stepgraph.server.anthropic_replies import input_of
from stepgraph.server.anthropic_requests import CountTokensRequest, MessagesRequest, conversation_of
from stepgraph.server.chat import ChatCall
from stepgraph.server.errors import APIError
from stepgraph.server.service import Context

ASK = [{"role": "user", "content": "Hi"}]
WEATHER = {"name": "weather", "description": "Of a place.", "input_schema": {"type": "object"}}

COMPONENTS = {
    "message_start": "MessageStartEvent",
    "content_block_start": "ContentBlockStartEvent",
    "content_block_delta": "ContentBlockDeltaEvent",
    "content_block_stop": "ContentBlockStopEvent",
    "message_delta": "MessageDeltaEvent",
    "message_stop": "MessageStopEvent",
    "error": "ErrorResponse",
}
"""Of the published document, by the events of a stream."""


@cache
def schema_of(component: str) -> Draft202012Validator:
    """Of a component of the published document."""
    document = json.loads((Path(__file__).parents[1] / "data" / "anthropic_schema.json").read_text())
    return Draft202012Validator({"$ref": f"#/$defs/{component}", "$defs": document["$defs"]})


def events_of(content: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each of the published form, and named by its type; without pings."""
    events = []
    for part in content.decode().removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            schema_of(COMPONENTS[event["type"]]).validate(event)
            events.append(event)
    return events


class MessagesWire(Wire):
    def whole(self, reply: MessagesReply) -> Message:
        content = asyncio.run(reply.reply())
        self._content = (content, "application/json")
        message = self._client.messages.create(model="tiny", max_tokens=5, messages=ASK)
        if message.stop_reason != "model_context_window_exceeded":  # which the client knows, and the document not yet
            schema_of("Message").validate(json.loads(content))
        return message

    def accumulated(self, content: bytes) -> Message:
        """What the client makes of a stream."""
        self._content = (content, "text/event-stream")
        with self._client.messages.stream(model="tiny", max_tokens=5, messages=ASK) as stream:
            return stream.get_final_message()


@pytest.fixture(scope="module")
def wire() -> MessagesWire:
    return MessagesWire(anthropic.Anthropic, "http://test")


def reply_to(call: ScriptedCall, *, max_tokens: int = 5, shows_thinking: bool = True) -> MessagesReply:
    """`max_tokens`: by default those that `ScriptedCall` counts."""
    return MessagesReply(
        call, id="msg_1", model="tiny", max_tokens=max_tokens, shows_thinking=shows_thinking, request_id="r1"
    )


def reply_of(gains, *, error=None, **fields) -> MessagesReply:
    return reply_to(ScriptedCall(gains, error), **fields)


def stream_of(gains, **fields) -> list[dict[str, Any]]:
    return events_of(asyncio.run(streamed(reply_of(gains, **fields))))


def shown(message: Message) -> list[tuple]:
    """The blocks of a message, without their looks."""
    found = []
    for block in message.content:
        if block.type == "tool_use":
            found.append((block.type, block.name, block.input))
        else:
            found.append((block.type, block.thinking if block.type == "thinking" else block.text))
    return found


# Replies


def test_thinking_text_and_calls_become_blocks_in_this_order(wire) -> None:
    message = wire.whole(reply_of(THINKS_TALKS_CALLS))
    assert shown(message) == [
        ("thinking", "Let me see."),
        ("text", "One moment."),
        ("tool_use", "weather", {"place": "Rome"}),
        ("tool_use", "weather", {}),
    ]
    assert (message.id, message.model, message.stop_reason, message.stop_sequence) == (
        "msg_1",
        "tiny",
        "tool_use",
        None,
    )
    assert message.content[0].signature
    ids = [block.id for block in message.content[2:]]
    assert len(set(ids)) == 2
    assert all(id.startswith("toolu_") for id in ids)


def test_a_stream_tells_of_each_block_from_its_beginning_to_its_end() -> None:
    told = [(event["type"], event.get("delta", {}).get("type")) for event in stream_of(THINKS_TALKS_CALLS)]
    start, stop = ("content_block_start", None), ("content_block_stop", None)
    thinking, signature = ("content_block_delta", "thinking_delta"), ("content_block_delta", "signature_delta")
    text, json_text = ("content_block_delta", "text_delta"), ("content_block_delta", "input_json_delta")
    assert told == [
        ("message_start", None),
        *(start, thinking, thinking, signature, stop),
        *(start, text, text, stop),
        *(start, json_text, json_text, stop),
        *(start, json_text, stop),
        ("message_delta", None),
        ("message_stop", None),
    ]


@settings(max_examples=30)
@given(answers())
def test_a_stream_has_the_grammar_of_the_api_and_says_what_the_whole_reply_says(answer) -> None:
    gains, (reasoning, content, calls) = answer
    start, *events, delta, stop = stream_of(gains)
    assert (start["type"], delta["type"], stop["type"]) == ("message_start", "message_delta", "message_stop")
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    whole = json.loads(asyncio.run(reply_of(gains).reply()))
    for name in ("stop_reason", "stop_sequence"):
        assert delta["delta"][name] == whole[name]
    events = iter(events)
    texts = {"thinking": "", "text": ""}
    inputs = []
    for index, block in enumerate(whole["content"]):
        begun = next(events)
        kind = block["type"]
        assert (begun["type"], begun["index"], begun["content_block"]["type"]) == ("content_block_start", index, kind)
        told = ""
        while (event := next(events))["type"] == "content_block_delta":
            assert event["index"] == index
            if event["delta"]["type"] == "signature_delta":
                assert event["delta"]["signature"] == block["signature"]
            else:
                told += event["delta"][{"tool_use": "partial_json"}.get(kind, kind)]
        assert event == {"type": "content_block_stop", "index": index}
        if kind == "tool_use":
            assert begun["content_block"]["input"] == {}
            inputs.append((block["name"], told))
            assert json.loads(bytes(input_of(told))) == block["input"]
        else:
            assert told == block[kind]
            texts[kind] += told
    assert next(events, None) is None
    assert (texts["thinking"], texts["text"], inputs) == (reasoning, content, calls)


def test_the_client_makes_the_whole_reply_of_a_stream(wire) -> None:
    accumulated = wire.accumulated(asyncio.run(streamed(reply_of(THINKS_TALKS_CALLS))))
    whole = wire.whole(reply_of(THINKS_TALKS_CALLS))
    assert shown(accumulated) == shown(whole)
    assert (accumulated.stop_reason, accumulated.usage) == (whole.stop_reason, whole.usage)


def test_an_answer_of_nothing_is_an_empty_text(wire) -> None:
    assert shown(wire.whole(reply_of([gain(end="stop")]))) == [("text", "")]


CALLS = [(0, "weather", "{}")]


@pytest.mark.parametrize(
    ("last", "max_tokens", "reason", "sequence"),
    [
        (gain(content="a", end="stop"), 5, "end_turn", None),
        (gain(content="a", end="stop", stop=7), 5, "end_turn", None),
        (gain(content="a", end="stop", stop="Paris"), 5, "stop_sequence", "Paris"),
        (gain(content="a", end="length"), 5, "max_tokens", None),
        (gain(content="a", end="length"), 6, "model_context_window_exceeded", None),
        (gain(content="a", end="abort"), 5, "pause_turn", None),
        (gain(calls=CALLS, end="tool_calls"), 5, "tool_use", None),
        (gain(calls=CALLS, end="stop"), 5, "tool_use", None),  # as chats tell of a call that was forced
        (gain(calls=CALLS, end="length"), 5, "max_tokens", None),
        (gain(calls=CALLS, end="tool_calls", stop="Paris"), 5, "stop_sequence", "Paris"),
    ],
)
def test_a_message_says_why_it_ends(wire, last, max_tokens, reason, sequence) -> None:
    message = wire.whole(reply_of([last], max_tokens=max_tokens))
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_cached_tokens_are_counted_apart(wire) -> None:
    usage = wire.whole(reply_of([gain(end="stop")])).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (3, 8, 0)
    assert (usage.output_tokens, usage.output_tokens_details.thinking_tokens) == (5, 2)
    start, *_, delta, _ = stream_of([gain(content="a", end="stop")])
    for told in (start["message"]["usage"], delta["usage"]):
        assert (told["input_tokens"], told["cache_read_input_tokens"], told["output_tokens"]) == (3, 8, 5)


def test_thinking_that_is_not_to_be_shown_leaves_an_empty_block(wire) -> None:
    gains = [gain("Hm, "), gain("Rome."), gain(content="Rome.", end="stop")]
    hidden, plain = (wire.whole(reply_of(gains, shows_thinking=shows)) for shows in (False, True))
    assert shown(hidden) == [("thinking", ""), ("text", "Rome.")]
    assert hidden.content[0].signature == plain.content[0].signature
    assert "Hm" not in json.dumps(stream_of(gains, shows_thinking=False))


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ('{"a": [1, {"b": "c"}]}', {"a": [1, {"b": "c"}]}),
        ("", {}),
        (" \n", {}),
        ('{"a": "x", "b": "cut o', {"a": "x"}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
        ("[1, 2]", {"arguments": "[1, 2]"}),
        ("{'a': 1}", {"arguments": "{'a': 1}"}),
        ('{"a": NaN}', {"arguments": '{"a": NaN}'}),
        ('{"a": 1e999', {"arguments": '{"a": 1e999'}),
        ('{"a":' + "[" * 5000, {"arguments": '{"a":' + "[" * 5000}),
    ],
)
def test_the_input_of_a_call_is_an_object_whatever_the_model_wrote(written, found) -> None:
    assert json.loads(bytes(input_of(written))) == found


def test_a_stream_that_breaks_off_ends_with_an_error_event(wire) -> None:
    *_, block, error = stream_of([gain(content="We")], error=EngineDeadError("it died"))
    assert block["type"] == "content_block_delta"
    assert error["error"]["type"] == "overloaded_error"
    assert error["error"]["message"] == "it died (request r1)"
    assert error["request_id"] == "r1"
    content = asyncio.run(streamed(reply_of([gain(content="We")], error=EngineDeadError("it died"))))
    with pytest.raises(anthropic.APIStatusError) as caught:
        wire.accumulated(content)
    assert (caught.value.type, caught.value.error_code) == ("overloaded_error", "unavailable")


def test_a_stream_that_takes_too_long_ends_so_too_and_ends_its_request() -> None:
    call = ScriptedCall([gain(content="We")], stalls=True)
    *_, error = events_of(asyncio.run(streamed(reply_to(call), 0.05)))
    assert error["error"]["type"] == "timeout_error"
    assert "request_timeout=0.05 s" in error["error"]["message"]
    assert call.ended


def test_a_client_that_waits_is_told_so_and_may_leave(monkeypatch) -> None:
    monkeypatch.setattr("stepgraph.server.anthropic._PING_S", 0.001)

    async def wait(call: ScriptedCall) -> list[bytes]:
        events = reply_to(call).events()
        found = [await anext(events) for _ in range(3)]
        assert not call.ended
        await events.aclose()
        assert call.ended
        return found

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    assert asyncio.run(wait(ScriptedCall([], stalls=True))) == [ping] * 3
    assert asyncio.run(wait(ScriptedCall([gain(content="a")] * 9)))[1] == ping


def test_an_answer_that_fails_unstreamed_raises_what_the_server_turns_into_an_error() -> None:
    with pytest.raises(EngineDeadError):
        asyncio.run(reply_of([gain(content="We")], error=EngineDeadError("it died")).reply())


# Requests


def test_the_blocks_of_a_message_can_be_sent_back(wire) -> None:
    message = wire.whole(reply_of(THINKS_TALKS_CALLS))
    results = [
        {"type": "tool_result", "tool_use_id": block.id} for block in message.content if block.type == "tool_use"
    ]
    blocks = [block.model_dump() for block in message.content]
    turns = [*ASK, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    _, said, *_ = conversation_of(CountTokensRequest(messages=turns), {}).messages
    assert (said["content"], said["reasoning_content"]) == ("One moment.", "Let me see.")
    assert [call["function"]["arguments"] for call in said["tool_calls"]] == [{"place": "Rome"}, {}]


def test_a_request_reaches_the_engine_as_a_chat(wire, monkeypatch) -> None:
    sent = []

    async def start(read, service, context, *, id, adapter):
        chat, messages, tools = read()
        sent.append((chat.max_completion_tokens, messages, tools.names, id, adapter))
        return ScriptedCall([gain("Hm."), gain(content="Yes", end="stop")])

    monkeypatch.setattr(ChatCall, "start", start)
    service = SimpleNamespace(choose_model=lambda name: ("tuned", "/adapters/tuned"))
    context = Context("r1", 0.0, None, ExitStack(), lambda: None)
    fields = {"max_tokens": 9, "messages": ASK, "tools": [WEATHER]}
    request = MessagesRequest(model="tuned", thinking={"type": "adaptive", "display": "omitted"}, **fields)
    message = wire.whole(asyncio.run(MessagesReply.start(request, service, context)))
    assert sent == [(9, ASK, ["weather"], message.id, "/adapters/tuned")]
    assert (message.model, shown(message)) == ("tuned", [("thinking", ""), ("text", "Yes")])
    with pytest.raises(RequestError, match="prompt_logprobs"):
        asyncio.run(MessagesReply.start(MessagesRequest(prompt_logprobs=1, **fields), service, context))
    assert len(sent) == 1


# Errors


@pytest.mark.parametrize(
    ("status", "told", "kind"),
    [
        (400, 400, "invalid_request_error"),
        (401, 401, "authentication_error"),
        (404, 404, "not_found_error"),
        (405, 405, "invalid_request_error"),
        (413, 413, "request_too_large"),
        (415, 415, "invalid_request_error"),
        (422, 400, "invalid_request_error"),
        (429, 429, "rate_limit_error"),
        (500, 500, "api_error"),
        (503, 529, "overloaded_error"),
        (504, 504, "timeout_error"),
    ],
)
def test_errors_have_the_form_and_the_status_of_anthropics(status, told, kind) -> None:
    scope = {"path": "/v1/messages/count_tokens", "state": {"request_id": "r1"}}
    reply = error_reply(APIError(status, "no \ud800", headers={"Retry-After": "2"}), scope)
    body = json.loads(reply.body)
    assert (reply.status_code, body["error"]["type"], body["error"]["message"]) == (told, kind, "no ?")
    assert (body["type"], body["request_id"], reply.headers["retry-after"]) == ("error", "r1", "2")
    if kind != "request_too_large":  # which Anthropic's documentation has, and the document not
        schema_of("ErrorResponse").validate(body)


@pytest.mark.parametrize("path", ["/v1/messagesx", "/v1/chat/completions", "/messages"])
def test_elsewhere_errors_are_openais(path) -> None:
    body = json.loads(error_reply(APIError(422, "no"), {"path": path}).body)
    assert body["error"]["code"] == "invalid_type"


def test_a_prompt_that_is_too_long_is_named_as_clients_look_for_it() -> None:
    error = APIError(400, "it has 9 tokens", code="context_length_exceeded")
    assert json.loads(error_content(error, "r1"))["error"]["message"] == "prompt is too long: it has 9 tokens"
