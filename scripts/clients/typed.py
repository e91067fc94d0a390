"""Packages between programs and many servers: instructor, litellm, langchain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from clients.base import MAX_TOKENS, QUESTION, TURNS, ByTheModelError, Check, Place, Server, check, found, said
from clients.sdks import anthropic_client, openai_client

INSTRUCTOR_MODES = {  # of OpenAI's API; whether the server forces the form
    "FUNCTIONS": True,
    "TOOLS": True,
    "TOOLS_STRICT": True,
    "PARALLEL_TOOLS": False,
    "JSON": False,
    "JSON_O1": False,
    "MD_JSON": False,
    "JSON_SCHEMA": True,
    "RESPONSES_TOOLS": True,
    "RESPONSES_TOOLS_WITH_INBUILT_TOOLS": True,
}


def _instructor(mode: str) -> Check:
    def run(server: Server) -> str:
        import instructor
        from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException

        client = instructor.from_openai(openai_client(server), mode=instructor.Mode[mode])
        several = mode == "PARALLEL_TOOLS"
        example = ' Answer with {"city": "Paris", "country": "France"}.'
        try:
            answer = client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": QUESTION + example}],
                response_model=Iterable[Place] if several else Place,
                max_retries=1,
                **({"max_output_tokens": MAX_TOKENS} if mode.startswith("RESPONSES") else {"max_tokens": MAX_TOKENS}),
            )
            return found(next(iter(answer)) if several else answer)
        except (IncompleteOutputException, InstructorRetryException, StopIteration) as error:
            if INSTRUCTOR_MODES[mode] or "Error code" in str(error):
                raise
            raise ByTheModelError(" ".join(str(error).split())[:60] or "no calls") from error

    return run


for _mode, _forced in INSTRUCTOR_MODES.items():
    check("instructor", f"Mode.{_mode}{'' if _forced else ', by prompt'}")(_instructor(_mode))


@check("instructor", "Mode.ANTHROPIC_TOOLS")
def instructor_anthropic(server: Server) -> str:
    import instructor

    client = instructor.from_anthropic(anthropic_client(server), mode=instructor.Mode.ANTHROPIC_TOOLS)
    return found(
        client.messages.create(model=server.model, max_tokens=MAX_TOKENS, messages=TURNS, response_model=Place)
    )


def _litellm(server: Server, provider: str = "openai") -> dict[str, Any]:
    return {"model": f"{provider}/{server.model}", "api_base": server.v1, "api_key": server.key}


@check("litellm", "completion, whole and streamed")
def litellm_completion(server: Server) -> str:
    import litellm

    whole = litellm.completion(messages=TURNS, max_tokens=16, temperature=0, **_litellm(server, "hosted_vllm"))
    stream = litellm.completion(messages=TURNS, max_tokens=16, temperature=0, stream=True, **_litellm(server))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    return said(text)


@check("litellm", "completion, response_format")
def litellm_format(server: Server) -> str:
    import litellm

    reply = litellm.completion(messages=TURNS, response_format=Place, **_litellm(server))
    return found(Place.model_validate_json(reply.choices[0].message.content))


@check("litellm", "acompletion, a tool that must be called")
def litellm_tools(server: Server) -> str:
    import litellm

    tool = {"type": "function", "function": {"name": "place", "parameters": Place.model_json_schema()}}
    reply = asyncio.run(litellm.acompletion(messages=TURNS, tools=[tool], tool_choice="required", **_litellm(server)))
    return found(Place.model_validate_json(reply.choices[0].message.tool_calls[0].function.arguments))


@check("litellm", "text_completion")
def litellm_text(server: Server) -> str:
    import litellm

    options = _litellm(server, "text-completion-openai")
    return said(litellm.text_completion(prompt="Once upon a time", max_tokens=8, **options).choices[0].text)


@check("litellm", "responses")
def litellm_responses(server: Server) -> str:
    import litellm

    return said(litellm.responses(input=QUESTION, max_output_tokens=16, **_litellm(server)).output[0].content[0].text)


@check("litellm", "anthropic/…")
def litellm_anthropic(server: Server) -> str:
    import litellm

    options = _litellm(server, "anthropic") | {"api_base": server.root}
    return said(litellm.completion(messages=TURNS, max_tokens=16, **options).choices[0].message.content)


def _langchain(server: Server, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=server.model, base_url=server.v1, api_key=server.key, max_retries=0, **options)


@check("langchain-openai", "ChatOpenAI, invoked and streamed")
def langchain_chat(server: Server) -> str:
    chat = _langchain(server, temperature=0, max_tokens=16)
    whole = chat.invoke(QUESTION)
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == whole.content
    return said(whole.content)


for _method in ("json_schema", "function_calling", "json_mode"):

    @check("langchain-openai", f"with_structured_output, {_method}")
    def langchain_structured(server: Server, method: str = _method) -> str:
        question = QUESTION
        if method == "json_mode":  # any JSON object is what this asks the server for
            question += ' Answer in JSON: {"city": "Paris", "country": "France"}'
        chat = _langchain(server, temperature=0).with_structured_output(Place, method=method, include_raw=True)
        answer = chat.invoke(question)
        if method == "json_mode" and answer["parsing_error"] is not None:
            json.loads(answer["raw"].content)
            raise ByTheModelError("JSON of another form")
        return found(answer["parsed"])


@check("langchain-openai", "bind_tools, streamed")
def langchain_tools(server: Server) -> str:
    chunks = list(_langchain(server).bind_tools([Place], tool_choice="required").stream(QUESTION))
    message = chunks[0]
    for chunk in chunks[1:]:
        message += chunk
    return found(Place.model_validate(message.tool_calls[0]["args"]))


@check("langchain-openai", "the Responses API")
def langchain_responses(server: Server) -> str:
    return said(_langchain(server, use_responses_api=True, max_tokens=16).invoke(QUESTION).text)


@check("langchain-openai", "OpenAI, completions")
def langchain_completions(server: Server) -> str:
    from langchain_openai import OpenAI

    llm = OpenAI(model=server.model, base_url=server.v1, api_key=server.key, max_tokens=8)
    return said(llm.invoke("Once upon a time"))
