"""Tools and the Responses API through the official OpenAI client, with a model that can speak."""

import asyncio
import json
import re
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

MODEL = "smollm2"
GREEDY = {"model": MODEL, "temperature": 0}
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
CAPITAL = "What is the capital of France?"


class GetWeather(BaseModel):
    """The weather in a city now."""

    city: str


class GetTime(BaseModel):
    """The time of day."""

    utc: bool


WEATHER = openai.pydantic_function_tool(GetWeather, name="get_weather")
TIME = openai.pydantic_function_tool(GetTime, name="get_time")
CALL = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "[A-Z][a-z]+"\}\}\n</tool_call>'
"""What the model writes when it calls. Models this small do so only if they are made to."""


@pytest.fixture(scope="module")
def client(chat_server) -> openai.OpenAI:
    with chat_server.client() as client:
        yield client


def create(client: openai.OpenAI, **fields):
    return client.chat.completions.create(**GREEDY | {"messages": ASK, "max_tokens": 48} | fields)


def calls_of(message) -> list[tuple[str, Any]]:
    """Names and arguments."""
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def written(regex: str) -> dict[str, Any]:
    """Makes the model write something of this form."""
    return {"extra_body": {"structured_outputs": {"regex": regex}}}


class StreamedChat:
    """A stream put together as clients do: by index, with name and id of a call in its first piece."""

    def __init__(self, chunks):
        self.content = ""
        self.finish_reason = None
        self.calls: list[dict[str, Any]] = []
        self.num_pieces = 0
        for chunk in chunks:
            [choice] = chunk.choices
            self.content += choice.delta.content or ""
            self.finish_reason = choice.finish_reason or self.finish_reason
            for call in choice.delta.tool_calls or ():
                self.num_pieces += 1
                if call.index == len(self.calls):
                    assert (call.type, bool(call.id), bool(call.function.name)) == ("function", True, True)
                    self.calls.append({"name": call.function.name, "arguments": ""})
                else:
                    assert (call.type, call.id, call.function.name) == (None, None, None)
                self.calls[call.index]["arguments"] += call.function.arguments

    def parsed(self) -> list[tuple[str, Any]]:
        return [(call["name"], json.loads(call["arguments"])) for call in self.calls]


# Chat completions


def test_calls_in_an_answer_are_set_apart_from_its_text_whole_and_streamed(client) -> None:
    fields = {"tools": [WEATHER, TIME], **written(r"I will look\. " + CALL)}
    [choice] = create(client, **fields).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I will look.")
    [(name, arguments)] = calls_of(choice.message)
    assert (name, arguments) == ("get_weather", {"city": "Paris"})
    assert choice.message.tool_calls[0].id
    streamed = StreamedChat(create(client, stream=True, **fields))
    assert (streamed.content, streamed.finish_reason) == ("I will look.", "tool_calls")
    assert streamed.parsed() == [("get_weather", {"city": "Paris"})]
    assert streamed.num_pieces > 3


def test_several_calls_have_ids_of_their_own_and_parallel_tool_calls_keeps_the_first(client) -> None:
    call = r'<tool_call>\{"name": "get_time", "arguments": \{"utc": (true|false)\}\}</tool_call>'
    fields = {"tools": [WEATHER, TIME], "max_tokens": 160, **written(call + call)}
    [choice] = create(client, **fields).choices
    assert [name for name, _ in calls_of(choice.message)] == ["get_time"] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert choice.message.content is None
    one = create(client, parallel_tool_calls=False, **fields).choices[0].message
    assert calls_of(one) == calls_of(choice.message)[:1]


def test_tools_may_be_offered_and_not_used(client) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "auto", **written(r"It is [a-z]{1,12}\.")}
    [choice] = create(client, **fields).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert choice.message.content.startswith("It is ")
    assert StreamedChat(create(client, stream=True, **fields)).content == choice.message.content


def test_with_tool_choice_none_the_model_hears_of_no_tools_and_what_looks_like_a_call_is_text(client) -> None:
    plain, auto = create(client, max_tokens=1), create(client, max_tokens=1, tools=[WEATHER])
    none = create(client, max_tokens=64, tools=[WEATHER], tool_choice="none", **written(CALL))
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens < auto.usage.prompt_tokens
    [choice] = none.choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert re.fullmatch(CALL, choice.message.content)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_a_required_call_is_one_of_the_tools_with_arguments_of_its_schema(client, is_streamed) -> None:
    kinds = {"get_weather": GetWeather, "get_time": GetTime}
    fields = {"tools": [TIME, WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 64}
    if is_streamed:
        streamed = StreamedChat(create(client, stream=True, **fields))
        calls, content, reason = streamed.parsed(), streamed.content or None, streamed.finish_reason
    else:
        [choice] = create(client, **fields).choices
        calls, content, reason = calls_of(choice.message), choice.message.content, choice.finish_reason
    [(name, arguments)] = calls
    kinds[name].model_validate(arguments, strict=True)
    assert (content, reason) == (None, "tool_calls")


def test_a_named_call_is_made_and_parsed_by_the_clients_helpers_whole_and_streamed(client) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    fields = {"messages": ASK, "tools": [TIME, WEATHER], "tool_choice": choice, "max_tokens": 32}
    [parsed] = client.chat.completions.parse(**GREEDY | fields).choices
    [call] = parsed.message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Paris")
    assert (parsed.finish_reason, parsed.message.content) == ("stop", None)
    with client.chat.completions.stream(**GREEDY | fields) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0].message.tool_calls[0]
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.parsed_arguments == final.function.parsed_arguments == GetWeather(city="Paris")
    pieces = [e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 3
    assert "".join(pieces) == done.arguments


def test_every_one_of_n_streamed_answers_has_its_own_call(client) -> None:
    arguments = ["", ""]
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        n=2,
        seed=1,
        max_tokens=32,
        stream=True,
    )
    for chunk in chunks:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                assert call.index == 0
                arguments[choice.index] += call.function.arguments
    for text in arguments:
        GetWeather.model_validate_json(text)


def test_a_tool_is_called_and_its_result_answered_from(chat_server) -> None:
    """The whole round trip; an earlier one in the conversation shows the model how."""

    def called(id: str, city: str) -> dict[str, Any]:
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        return {"role": "assistant", "tool_calls": [{"id": id, "type": "function", "function": function}]}

    messages: list[Any] = [
        {"role": "user", "content": "What is the weather in Rome?"},
        called("call-1", "Rome"),
        {"role": "tool", "tool_call_id": "call-1", "content": "rainy, 12 degrees"},
        {"role": "assistant", "content": "Rome is rainy at 12 degrees."},
        *ASK,
    ]

    async def converse() -> str | None:
        async with chat_server.async_client() as client:
            fields = {**GREEDY, "messages": messages, "tools": [WEATHER], "max_tokens": 32}
            turn = (await client.chat.completions.create(**fields, **written(CALL))).choices[0].message
            [call] = turn.tool_calls
            assert json.loads(call.function.arguments) == {"city": "Paris"}
            messages.append(turn.to_dict())
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny, 31 degrees"})
            return (await client.chat.completions.create(**fields)).choices[0].message.content

    answer = asyncio.run(converse())
    assert "sunny" in answer
    assert "31" in answer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f'.*get_weather"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [WEATHER, WEATHER]}, "two functions named 'get_weather'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "takes text"),
    ],
)
def test_what_contradicts_itself_is_refused_whole_and_streamed(client, fields, message) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message):
            create(client, stream=stream, **fields)


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_that_is_cut_off_leaves_no_text_whole_and_streamed(client, choice) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    announced = set()
    for max_tokens in (1, 4, 6):
        [whole] = create(client, max_tokens=max_tokens, **fields).choices
        streamed = StreamedChat(create(client, stream=True, max_tokens=max_tokens, **fields))
        assert (whole.message.content, whole.finish_reason) == (None, "length")
        assert (streamed.content, streamed.finish_reason) == ("", "length")
        made = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()]
        assert [(call["name"], call["arguments"]) for call in streamed.calls] == made
        announced.add(len(made))
    assert announced == ({0} if choice == "required" else {1})


def test_a_call_that_was_cut_off_can_be_sent_back(client, chat_server) -> None:
    cut = create(client, tools=[WEATHER], tool_choice=NAMED, max_tokens=4).choices[0].message
    arguments = cut.tool_calls[0].function.arguments
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)
    messages = [
        *ASK,
        cut.to_dict(),
        {"role": "tool", "tool_call_id": cut.tool_calls[0].id, "content": "It was cut off."},
    ]
    assert create(client, messages=messages, tools=[WEATHER], max_tokens=1).choices
    tokens = chat_server.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json["tokens"]
    prompt = chat_server.post("/detokenize", {"tokens": tokens}).json["prompt"]
    assert f'"arguments": {json.dumps(arguments)}}}' in prompt

    tool = {"type": "function", **WEATHER["function"]}
    fields = {"tools": [tool], "max_output_tokens": 4}
    response = respond(client, ASK, tool_choice={"type": "function", "name": "get_weather"}, **fields)
    [call] = response.output
    assert (call.type, call.status, call.arguments) == ("function_call", "incomplete", arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It was cut off."}
    assert respond(client, [*ASK, call.to_dict(), output], **fields).output


def test_calls_and_results_keep_their_letters_where_the_template_knows_no_tools(chat_server) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Zürich 日本"}'}
    called = {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    messages = [*ASK, called, {"role": "tool", "tool_call_id": "c1", "content": "9 °C"}]
    tokens = chat_server.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json["tokens"]
    prompt = chat_server.post("/detokenize", {"tokens": tokens}).json["prompt"]
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 日本"}}\n</tool_call>' in prompt
    assert "9 °C" in prompt


SEVEN = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "seven", "schema": SEVEN}}


def test_a_forced_call_is_made_also_where_text_answers_must_have_a_form(client) -> None:
    [choice] = create(client, tools=[TIME, WEATHER], tool_choice=NAMED, response_format=FORM).choices
    assert choice.message.content is None
    assert calls_of(choice.message) == [("get_weather", {"city": "Paris"})]
    response = respond(
        client,
        ASK,
        tools=[{"type": "function", **WEATHER["function"]}],
        tool_choice={"type": "function", "name": "get_weather"},
        text={"format": {"type": "json_schema", **FORM["json_schema"]}},
        max_output_tokens=48,
    )
    assert [(item.type, json.loads(item.arguments)) for item in response.output] == [
        ("function_call", {"city": "Paris"})
    ]


def test_a_model_that_may_call_does_so_or_answers_in_the_form(client, chat_server) -> None:
    """One this small does what a bias tells it."""
    fields = {"tools": [TIME], "response_format": FORM, "max_tokens": 32, "parallel_tool_calls": False}
    call, text = ({str(chat_server.post("/tokenize", {"prompt": sign}).json["tokens"][0]): 100} for sign in ("<", "{"))
    [answered] = create(client, logit_bias=text, **fields).choices
    assert (json.loads(answered.message.content), answered.finish_reason) == ({"n": 7}, "stop")
    assert answered.message.tool_calls is None
    [called] = create(client, logit_bias=call, **fields).choices
    assert (called.message.content, called.finish_reason) == (None, "tool_calls")
    assert called.message.tool_calls[0].function.name == "get_time"
    streamed = StreamedChat(create(client, logit_bias=call, stream=True, **fields))
    assert (streamed.content, streamed.finish_reason) == ("", "tool_calls")
    [neither] = create(client, logit_bias=call, tool_choice="none", **fields).choices
    assert (json.loads(neither.message.content), neither.message.tool_calls) == ({"n": 7}, None)


# Responses


def respond(client: openai.OpenAI, input: Any, **fields):
    return client.responses.create(**GREEDY | {"input": input, "max_output_tokens": 16} | fields)


def test_a_response_is_a_chats_answer_whole_and_streamed(client) -> None:
    response = respond(client, CAPITAL)
    assert (response.output_text, response.status) == ("The capital of France is Paris.", "completed")
    assert (response.usage.input_tokens, response.usage.output_tokens) == (37, 8)
    cut = respond(client, [{"role": "user", "content": CAPITAL}], max_output_tokens=3)
    assert (cut.output_text, cut.status) == ("The capital of", "incomplete")
    assert cut.incomplete_details.reason == "max_output_tokens"
    events = list(respond(client, CAPITAL, stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(pieces) > 5
    assert "".join(pieces) == events[-1].response.output_text == response.output_text


def test_instructions_are_a_system_message(client) -> None:
    messages = [{"role": "system", "content": "Answer with one word."}, {"role": "user", "content": CAPITAL}]
    reply = create(client, messages=messages, max_tokens=16)
    response = respond(client, CAPITAL, instructions="Answer with one word.")
    assert response.output_text == reply.choices[0].message.content
    assert response.usage.input_tokens == reply.usage.prompt_tokens


def test_a_response_calls_a_tool_and_goes_on_from_its_result(client) -> None:
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    fields = {"tools": [tool], "tool_choice": {"type": "function", "name": "get_weather"}, "max_output_tokens": 32}
    question = {"role": "user", "content": ASK[0]["content"]}
    response = respond(client, [question], **fields)
    [call] = response.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    events = list(respond(client, [question], stream=True, **fields))
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 31 degrees"}
    answer = respond(client, [question, call.to_dict(), result], tools=[tool], max_output_tokens=32)
    assert answer.status == "completed"
    assert "sunny" in answer.output_text


class Capital(BaseModel):
    """An answer to CAPITAL."""

    city: str
    country: str


def test_a_response_is_parsed_into_a_pydantic_model_whole_and_streamed(client) -> None:
    fields = GREEDY | {"input": CAPITAL, "text_format": Capital, "max_output_tokens": 40}
    parsed = client.responses.parse(**fields).output_parsed
    assert isinstance(parsed, Capital)
    with client.responses.stream(**fields) as stream:
        assert stream.get_final_response().output_parsed == parsed


def test_what_would_have_to_be_kept_is_refused(client) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        respond(client, CAPITAL, previous_response_id="resp_1")
    assert respond(client, CAPITAL, store=True, max_output_tokens=1).store is False


def test_a_forced_call_is_compact_whatever_the_model_likes(client, smollm2) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    spaces = {smollm2.tokenizer().encode(text)[0]: 100 for text in ("\n", " ", "\t", "\n\n")}
    for choice in ({"type": "function", "function": {"name": "now"}}, "required"):
        fields = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False, "logit_bias": spaces}
        reply = create(client, max_tokens=32, **fields).choices[0]
        assert reply.finish_reason in ("stop", "tool_calls")
        assert [call.function.arguments for call in reply.message.tool_calls] == ["{}"]
