"""What Anthropic's clients may ask for, in the words of the chat endpoint, and what is refused."""

from typing import Any

import pytest

from stepgraph.errors import RequestError
from stepgraph.server.anthropic_requests import MessagesRequest, conversation_of, sampling_of

ASK = [{"role": "user", "content": "Hi"}]
WEATHER = {"name": "weather", "description": "Of a place.", "input_schema": {"type": "object"}}


def request_of(messages=None, **fields) -> MessagesRequest:
    return MessagesRequest(**{"max_tokens": 9, "messages": ASK if messages is None else messages} | fields)


def asked(request: MessagesRequest):
    return conversation_of(request, sampling_of(request))


def messages_of(messages, **fields) -> list[dict[str, Any]]:
    return asked(request_of(messages, **fields)).messages


def user(*content) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said, "cache_control": {"type": "ephemeral"}}


USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "Rome"}}


def test_blocks_are_paragraphs_and_turns_of_one_role_are_one() -> None:
    found = messages_of([user(text("a"), text("b")), {"role": "user", "content": "c"}], system=[text("S"), text("T")])
    assert found == [{"role": "system", "content": "S\n\nT"}, {"role": "user", "content": "a\n\nb\n\nc"}]


def test_thinking_calls_and_results_are_those_of_chats() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("sunny"), text("31 degrees")]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such place", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_3", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_4"},
    ]
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    said = [
        user(text("How is it?")),
        assistant(thinking, redacted, text("Let me see."), USE),
        user(*results, text("So?")),
    ]
    assert messages_of(said) == [
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny\n\n31 degrees"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no such place"},
        {"role": "tool", "tool_call_id": "toolu_3", "content": "Error"},
        {"role": "tool", "tool_call_id": "toolu_4", "content": ""},
        {"role": "user", "content": "So?"},
    ]


def test_an_answer_goes_on_with_a_last_turn_of_the_assistant_that_has_text() -> None:
    chat, messages, _ = asked(request_of([*ASK, assistant(text("It is"))]))
    assert chat.rendering()["continue_final_message"] is True
    assert messages[-1] == {"role": "assistant", "content": "It is"}
    for nothing in ([assistant()], [{"role": "assistant", "content": ""}], []):
        chat, messages, _ = asked(request_of([*ASK, *nothing]))
        assert chat.rendering()["continue_final_message"] is False
        assert [message["role"] for message in messages] == ["user"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        ([user()], "holds no text"),
        ([assistant(text(""))], "holds no text"),
        ([*ASK, assistant(USE)], "ends with a tool_use block"),
        ([*ASK, assistant({"type": "thinking", "thinking": "a"})], "ends with a thinking block"),
        ([user({"type": "image", "source": {}})], r"messages\[0\]\.content\[0\] is of type 'image'"),
        ([user({"type": "document"})], "'document'"),
        ([user(USE)], "'tool_use'"),
        ([assistant({"type": "server_tool_use"})], "'server_tool_use'"),
        (
            [user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]})],
            r"content\[0\]\.content\[0\]",
        ),
        (
            [user({"type": "tool_result", "tool_use_id": "a", "content": [7]})],
            r"content\[0\] must be a text block, not 7",
        ),
        (
            [user({"type": "tool_result", "tool_use_id": "a", "content": 7})],
            "must be text or a list of text blocks, not 7",
        ),
        ([user({"type": "tool_result"})], r"content\[0\]\.tool_use_id must be text, not None"),
        ([user({"type": "text", "text": 7})], r"content\[0\]\.text must be text, not 7"),
        ([assistant(USE | {"input": "{}"})], r"input must be an object, not '\{\}'"),
        ([{"role": "system", "content": [USE]}], "of system can hold blocks of type text"),
    ],
)
def test_a_turn_that_cannot_be_taken_is_named(messages, says) -> None:
    with pytest.raises(RequestError, match=says):
        messages_of(messages)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            r"tools\[0\] is of type 'web_search_20250305'",
        ),
        ({"tools": [{"name": "f"}]}, r"tools\[0\] needs input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "two functions named 'weather'"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "needs the name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, "'g', which is not among tools: weather"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is not supported"),
        ({"container": "c"}, "container is not supported"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format must be"),
        ({"output_format": {"type": "text"}}, "output_format must be"),
        ({"output_format": {}, "output_config": {"format": {}}}, "are the same"),
        ({"stop_sequences": ["a"], "stop": "b"}, "are the same"),
        ({"n": 2}, "n=2"),
        ({"return_token_ids": True}, "return_token_ids has no place in a message"),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}}, "contradict"),
    ],
)
def test_what_the_endpoint_does_not_have_is_refused(fields, says) -> None:
    with pytest.raises(RequestError, match=says):
        asked(request_of(**fields))


def test_a_request_becomes_one_of_the_chat_endpoint() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat, _, _ = asked(
        request_of(
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            stop_sequences=["a", "b"],
            metadata={"user_id": "u"},
            thinking={"type": "adaptive"},
            output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}},
            chat_template_kwargs={"depth": 3},
            seed=5,
        )
    )
    assert (chat.temperature, chat.top_p, chat.top_k, chat.stop, chat.seed) == (0.5, 0.9, 7, ["a", "b"], 5)
    assert (chat.max_completion_tokens, chat.reasoning_effort) == (9, "low")
    assert chat.response_format == {"type": "json_schema", "json_schema": {"schema": schema}}
    assert chat.rendering()["variables"] == {"enable_thinking": True, "thinking": True, "depth": 3}


@pytest.mark.parametrize(
    ("thinking", "found"),
    [(None, {}), ({"type": "disabled"}, False), ({"type": "enabled", "budget_tokens": 1024, "display": None}, True)],
)
def test_thinking_is_asked_of_the_chat_template(thinking, found) -> None:
    chat, _, _ = asked(request_of(thinking=thinking))
    assert chat.rendering()["variables"] == (found if found == {} else {"enable_thinking": found, "thinking": found})


@pytest.mark.parametrize(
    ("choice", "forced", "must_call", "names", "at_most_one"),
    [
        (None, None, False, ["weather"], False),
        ({"type": "auto"}, None, False, ["weather"], False),
        ({"type": "auto", "disable_parallel_tool_use": True}, None, False, ["weather"], True),
        ({"type": "any"}, None, True, ["weather"], False),
        ({"type": "any", "disable_parallel_tool_use": True}, None, True, ["weather"], True),
        ({"type": "tool", "name": "weather"}, "weather", True, ["weather"], True),
        ({"type": "none"}, None, False, [], True),
    ],
)
def test_a_choice_among_tools_means_what_it_means_in_chats(choice, forced, must_call, names, at_most_one) -> None:
    tools = asked(request_of(tools=[WEATHER | {"type": "custom", "strict": True}], tool_choice=choice)).tools
    assert (tools.forced, tools.must_call, tools.names, tools.at_most_one) == (forced, must_call, names, at_most_one)
    assert not tools.shown or tools.shown[0]["function"] == {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {"type": "object"},
        "strict": True,
    }
    assert asked(request_of(tool_choice={"type": "auto"})).tools.names == []


def test_fields_that_nothing_knows_are_listed() -> None:
    assert request_of(context_management={}, cache_control={}, service_tier="auto").ignored() == ["context_management"]
    tool = {"name": "f", "input_schema": {}, "input_examples": [{}]}
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "name": "Ann"}]
    inside = request_of(messages=turns, tools=[tool], thinking={"type": "adaptive", "depth": 1}, output_config={})
    assert inside.ignored() == ["thinking.depth", "messages[1].name", "tools[0].input_examples"]


FORM = {"type": "json_schema", "schema": {}}


@pytest.mark.parametrize(
    ("fields", "param", "own"),
    [
        ({"stop_sequences": ["a"]}, "stop[0]", "stop_sequences[0]"),
        ({"stop": "a"}, "stop", "stop"),
        ({}, "max_tokens", "max_tokens"),
        ({}, "prompt", "messages"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "tools[1].name"),
        ({"tools": [WEATHER]}, "tools[0].function.parameters", "tools[0].input_schema"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
            "structured_outputs.json.properties",
            "tools[0].input_schema.properties",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "any"}}, "structured_outputs.json", "tools"),
        ({"output_config": {"format": FORM}}, "structured_outputs.json", "output_config.format.schema"),
        ({"output_config": {"format": FORM}}, "structured_outputs.structural_tag", "output_config.format"),
        ({"output_format": FORM}, "structured_outputs.json.type", "output_format.schema.type"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json.type", "structured_outputs.json.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "tool_choice.name"),
    ],
)
def test_errors_name_fields_as_the_request_has_them(fields, param, own) -> None:
    assert request_of(**fields).spelled(param) == own
