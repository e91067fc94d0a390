"""/v1/messages through Anthropic's own client, with a model that can speak."""

import json
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

MODEL = "smollm2"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city now.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "[A-Z][a-z]+"\}\}\n</tool_call>'
"""What the model writes when it calls. Models this small do so only if they are made to."""


@pytest.fixture(scope="module")
def client(chat_server) -> anthropic.Anthropic:
    with anthropic.Anthropic(base_url=chat_server.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def fields_of(fields: dict[str, Any]) -> dict[str, Any]:
    """With greedy choices, which the client has no name for."""
    extra = {"temperature": 0} | fields.pop("extra_body", {})
    return {"model": MODEL, "max_tokens": 48, "messages": CAPITAL, "extra_body": extra} | fields


def create(client: anthropic.Anthropic, **fields):
    return client.messages.create(**fields_of(fields))


def stream(client: anthropic.Anthropic, **fields):
    """The message that the client makes of a stream."""
    with client.messages.stream(**fields_of(fields)) as stream:
        return stream.get_final_message()


def blocks_of(message) -> list[Any]:
    """The blocks of a message: texts, and names and inputs of calls."""
    return [block.text if block.type == "text" else (block.name, block.input) for block in message.content]


def written(regex: str) -> dict[str, Any]:
    """Makes the model write something of this form."""
    return {"extra_body": {"structured_outputs": {"regex": regex}}}


def test_a_message_is_what_the_chat_endpoint_answers_whole_and_streamed(client, chat_server) -> None:
    system = "Answer with one word."
    with chat_server.client() as openai:
        messages = [{"role": "system", "content": system}, *CAPITAL]
        chat = openai.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=48)
    message = create(client, system=[{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}])
    assert (blocks_of(message), message.stop_reason) == ([chat.choices[0].message.content], "end_turn")
    assert message._request_id
    streamed = stream(client, system=system)
    assert (blocks_of(streamed), streamed.stop_reason) == (blocks_of(message), "end_turn")
    assert streamed.usage.output_tokens == message.usage.output_tokens == chat.usage.completion_tokens


@pytest.mark.parametrize("tool_choice", [{"type": "auto"}, {"type": "any"}, {"type": "none"}])
def test_tokens_are_counted_as_the_message_that_follows_counts_them(client, tool_choice) -> None:
    prompt = {"messages": ASK, "system": "Be brief.", "tools": [WEATHER], "tool_choice": tool_choice}
    count = client.messages.count_tokens(model=MODEL, **prompt).input_tokens
    for send in (create, create, stream):
        usage = send(client, max_tokens=1, **prompt).usage
        assert usage.input_tokens + usage.cache_read_input_tokens == count
        assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 1)
    assert usage.cache_read_input_tokens >= 16 * ((count - 1) // 16)  # all whole blocks: the prompt was there before


def test_a_last_turn_of_the_assistant_is_gone_on_with(client) -> None:
    prefilled = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    assert blocks_of(create(client, messages=prefilled)) == [" Paris."]
    count = client.messages.count_tokens(model=MODEL, messages=prefilled).input_tokens
    usage = create(client, messages=prefilled, max_tokens=1).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count


def test_a_message_ends_for_the_reasons_of_the_api(client) -> None:
    cut, stopped = create(client, max_tokens=3), create(client, stop_sequences=["Rome", " Paris"])
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " Paris")
    assert blocks_of(stopped) == ["The capital of France is"] == blocks_of(stream(client, stop_sequences=[" Paris"]))


def test_text_and_calls_are_blocks_whole_and_streamed(client) -> None:
    fields = {"messages": ASK, "tools": [WEATHER], **written(r"I will look\. " + CALL)}
    message = create(client, **fields)
    assert blocks_of(message) == ["I will look.", ("get_weather", {"city": "Paris"})]
    assert message.stop_reason == "tool_use"
    streamed = stream(client, **fields)
    assert (blocks_of(streamed), streamed.stop_reason) == (blocks_of(message), "tool_use")
    once = fields | {"max_tokens": 30, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    assert blocks_of(create(client, **once | written(CALL + CALL))) == [("get_weather", {"city": "Paris"})]


def test_a_forced_call_is_made_and_its_result_answered(client) -> None:
    forced = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}}
    message = create(client, messages=ASK, **forced)
    [call] = message.content
    assert (message.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    streamed = stream(
        client, messages=ASK, tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True}
    )
    assert (streamed.stop_reason, blocks_of(streamed)) == ("tool_use", blocks_of(message))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny, 31 degrees"}]}
    turns = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = create(client, messages=turns, tools=[WEATHER])
    assert answer.stop_reason == "end_turn"
    assert "sunny" in answer.content[0].text


def test_a_call_that_is_cut_off_keeps_what_came_and_can_be_sent_back(client) -> None:
    tool = {
        "name": "note",
        "input_schema": {"type": "object", "properties": {"a": {"const": 1}, "text": {"type": "string"}}},
    }
    tool["input_schema"]["required"] = ["a", "text"]
    fields = {"messages": ASK, "tools": [tool], "tool_choice": {"type": "tool", "name": "note"}, "max_tokens": 12}
    message = create(client, **fields)
    assert (message.stop_reason, blocks_of(message)) == ("max_tokens", [("note", {"a": 1})])
    assert blocks_of(stream(client, **fields)) == [("note", {"a": 1})]
    result = {"type": "tool_result", "tool_use_id": message.content[0].id, "content": "cut off", "is_error": True}
    turns = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert create(client, messages=turns, tools=[tool], max_tokens=1).stop_reason == "max_tokens"


class Capital(BaseModel):
    """An answer to CAPITAL."""

    city: str
    country: str


def test_a_message_is_parsed_into_a_pydantic_model(client) -> None:
    fields = fields_of({"output_format": Capital})
    assert client.messages.parse(**fields).parsed_output == Capital(city="Paris", country="France")
    with client.messages.stream(**fields) as stream:
        assert stream.get_final_message().parsed_output == Capital(city="Paris", country="France")


def test_a_client_that_leaves_a_stream_ends_its_request(client, chat_server) -> None:
    with client.messages.stream(**fields_of({"max_tokens": 1500, "extra_body": {"ignore_eos": True}})) as stream:
        for event in stream:
            if event.type == "content_block_delta":
                break
        assert chat_server.get("/load").json == {"server_load": 1}
    chat_server.wait_idle()


def test_errors_reach_the_client_in_its_own_classes(client) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        create(client, model="other")
    assert (missing.value.type, missing.value.error_code) == ("not_found_error", "model_not_found")
    assert missing.value.request_id == missing.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long") as long:
        create(client, messages=[{"role": "user", "content": "a b " * 2000}])
    assert long.value.error_code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="'image'"):
        create(client, messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}], stream=True)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens=0"):
        create(client, max_tokens=0)
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences has 20 entries") as many:
        create(client, stop_sequences=["a"] * 20)
    assert many.value.body["error"]["details"] == {"error_code": "invalid_value", "param": "stop_sequences"}
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "nowhere", "not": {}}}}
    for tool_choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
        with pytest.raises(anthropic.BadRequestError) as unknown:
            create(client, tools=[{"name": "f", "input_schema": schema}], tool_choice=tool_choice)
        assert unknown.value.body["error"]["details"]["param"].startswith("tools")
    with pytest.raises(anthropic.NotFoundError, match="batches are not offered"):
        client.messages.batches.list()


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "kind"),
    [
        ("POST", "/v1/messages", b"{", {}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", {"messages": ASK}, {}, 400, "invalid_request_error"),
        ("POST", "/v1/messages/count_tokens", {}, {}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"{}", {"Content-Type": "text/plain"}, 415, "invalid_request_error"),
        ("POST", "/v1/messages", b"", {"Content-Length": str(2**40)}, 413, "request_too_large"),
        ("POST", "/v1/messages", b"[" * 200, {}, 400, "invalid_request_error"),
        ("GET", "/v1/messages", None, {}, 405, "invalid_request_error"),
        ("POST", "/v1/messages/nothing", {}, {}, 404, "not_found_error"),
    ],
)
def test_errors_at_the_door_have_the_same_form(chat_server, method, path, body, headers, status, kind) -> None:
    reply = chat_server.request(method, path, body, {"X-Request-Id": "mine", **headers})
    assert (reply.status, reply.json["type"], reply.json["error"]["type"]) == (status, "error", kind)
    assert reply.headers["request-id"] == reply.headers["x-request-id"] == reply.json["request_id"] == "mine"


def test_fields_that_nothing_knows_are_named(chat_server) -> None:
    body = {
        "messages": CAPITAL,
        "max_tokens": 1,
        "metadata": {"user_id": "u"},
        "context_management": {},
        "speed": "fast",
    }
    for path, unknown in (
        ("/v1/messages", "context_management, speed"),
        ("/v1/messages/count_tokens", "context_management"),
    ):
        reply = chat_server.post(path, body, headers={"Anthropic-Version": "2023-06-01"})
        assert reply.status == 200
        assert reply.headers["x-ignored-fields"].startswith(unknown)
    assert json.loads(reply.body).keys() == {"input_tokens"}
