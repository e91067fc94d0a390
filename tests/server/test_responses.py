"""Responses and their streams: every one goes through OpenAI's own client, which checks the shapes."""

import asyncio
import json
from types import SimpleNamespace

import openai
import pytest
from hypothesis import given
from responses_wire import LOGPROBS, WEATHER, ResponsesWire, plain, reply_of, reply_to, shown
from scripted_calls import THINKS_TALKS_CALLS, ScriptedCall, answers, gain

from stepgraph.engine.outputs import Logprob
from stepgraph.engine.session import AnswerDelta
from stepgraph.errors import EngineDeadError, RequestError
from stepgraph.server.chat import Gain


@pytest.fixture(scope="module")
def wire() -> ResponsesWire:
    return ResponsesWire(openai.OpenAI, "http://test/v1")


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
