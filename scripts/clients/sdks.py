"""The vendors' own packages."""

from __future__ import annotations

import asyncio
from typing import Any

from clients.base import MAX_TOKENS, QUESTION, TURNS, Place, Server, check, found, refusal, said


def openai_client(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0)


def async_openai_client(server: Server) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0)


@check("openai", "models.list")
def openai_models(server: Server) -> str:
    names = [model.id for model in openai_client(server).models.list()]
    assert server.model in names
    return ", ".join(names)


@check("openai", "chat.completions.create, streamed, with usage")
def openai_chat_stream(server: Server) -> str:
    stream = openai_client(server).chat.completions.create(
        model=server.model,
        messages=TURNS,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert usage is not None
    assert usage.completion_tokens > 0
    return said(text)


@check("openai", "chat.completions.parse")
def openai_parse(server: Server) -> str:
    reply = openai_client(server).chat.completions.parse(model=server.model, messages=TURNS, response_format=Place)
    return found(reply.choices[0].message.parsed)


@check("openai", "chat.completions.stream, with a tool that must be called")
def openai_chat_tool_stream(server: Server) -> str:
    import openai

    with openai_client(server).chat.completions.stream(
        model=server.model,
        messages=TURNS,
        tools=[openai.pydantic_function_tool(Place)],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds, kinds
    return found(message.tool_calls[0].function.parsed_arguments)


@check("openai", "a tool's result, sent back")
def openai_tool_result(server: Server) -> str:
    client = openai_client(server)
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris"]}}}},
    }
    first = client.chat.completions.create(
        model=server.model, messages=TURNS, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    [call] = first.choices[0].message.tool_calls
    turns = [*TURNS, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}]
    reply = client.chat.completions.create(
        model=server.model, messages=turns, tools=[tool], tool_choice="none", max_tokens=MAX_TOKENS
    )
    return said(reply.choices[0].message.content)


@check("openai", "completions.create, with log-probabilities")
def openai_completions(server: Server) -> str:
    reply = openai_client(server).completions.create(
        model=server.model, prompt="Once upon a time", max_tokens=8, logprobs=2
    )
    assert len(reply.choices[0].logprobs.token_logprobs) == 8
    return said(reply.choices[0].text)


@check("openai", "responses.create")
def openai_responses(server: Server) -> str:
    reply = openai_client(server).responses.create(model=server.model, input=QUESTION, max_output_tokens=MAX_TOKENS)
    return said(reply.output_text)


@check("openai", "responses.parse")
def openai_responses_parse(server: Server) -> str:
    return found(
        openai_client(server).responses.parse(model=server.model, input=QUESTION, text_format=Place).output_parsed
    )


@check("openai", "responses.stream, parsed")
def openai_responses_stream(server: Server) -> str:
    with openai_client(server).responses.stream(model=server.model, input=QUESTION, text_format=Place) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created", kinds
    assert kinds[-1] == "response.completed", kinds
    return found(final.output_parsed)


@check("openai", "responses.stream, a tool that must be called")
def openai_responses_tool(server: Server) -> str:
    import openai

    with openai_client(server).responses.stream(
        model=server.model,
        input=QUESTION,
        tools=[openai.pydantic_function_tool(Place)["function"] | {"type": "function"}],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        for _ in stream:
            pass
        calls = [item for item in stream.get_final_response().output if item.type == "function_call"]
    return found(Place.model_validate_json(calls[0].arguments))


@check("openai", "asynchronous, eight at once")
def openai_async(server: Server) -> str:
    async def ask() -> list[Any]:
        async with async_openai_client(server) as client:
            return await asyncio.gather(
                *(client.chat.completions.create(model=server.model, messages=TURNS, max_tokens=16) for _ in range(8))
            )

    replies = asyncio.run(ask())
    return said(replies[-1].choices[0].message.content)


@check("openai", "errors as exceptions")
def openai_errors(server: Server) -> str:
    import openai

    def ask(**fields: Any) -> None:
        openai_client(server).chat.completions.create(**{"model": server.model, "messages": TURNS, **fields})

    refusals = [
        refusal(lambda: ask(temperature=-1), openai.BadRequestError),
        refusal(lambda: ask(model="nobody"), openai.NotFoundError),
        refusal(lambda: ask(max_tokens="many"), openai.UnprocessableEntityError),
    ]
    assert all(error.request_id for error in refusals)
    return ", ".join(str(error.status_code) for error in refusals)


def anthropic_client(server: Server) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=server.root, api_key=server.key, max_retries=0)


PLACE_TOOL = {"name": "place", "description": "A city in a country.", "input_schema": Place.model_json_schema()}


@check("anthropic", "messages.create, and count_tokens")
def anthropic_create(server: Server) -> str:
    client = anthropic_client(server)
    fields: dict[str, Any] = {"model": server.model, "system": "Be brief.", "messages": TURNS}
    counted = client.messages.count_tokens(**fields).input_tokens
    reply = client.messages.create(max_tokens=MAX_TOKENS, **fields)
    assert reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0) == counted
    return said(reply.content[0].text)


@check("anthropic", "messages.stream")
def anthropic_stream(server: Server) -> str:
    with anthropic_client(server).messages.stream(model=server.model, max_tokens=MAX_TOKENS, messages=TURNS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text
    return said(text)


@check("anthropic", "a tool that must be called, and its result")
def anthropic_tools(server: Server) -> str:
    client = anthropic_client(server)
    fields: dict[str, Any] = {"model": server.model, "max_tokens": MAX_TOKENS, "tools": [PLACE_TOOL]}
    with client.messages.stream(
        messages=TURNS, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **fields
    ) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    [use] = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "It is so."}
    turns = [*TURNS, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    client.messages.create(messages=turns, tool_choice={"type": "none"}, **fields)
    return found(Place.model_validate(use.input))


@check("anthropic", "errors as exceptions")
def anthropic_errors(server: Server) -> str:
    import anthropic

    def ask(**fields: Any) -> None:
        anthropic_client(server).messages.create(
            **{"model": server.model, "max_tokens": 8, "messages": TURNS, **fields}
        )

    refusals = [
        refusal(lambda: ask(max_tokens=-1), anthropic.BadRequestError),
        refusal(lambda: ask(model="nobody"), anthropic.NotFoundError),
    ]
    return ", ".join(f"{error.status_code} {error.body['error']['type']}" for error in refusals)
