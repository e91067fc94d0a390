"""Clients that people use, against a live server: a table of what each of them got.

    pip install '.[server,clients]'
    stepgraph serve smollm2 &
    python scripts/check_clients.py [--base-url http://127.0.0.1:8000] [--only instructor …] [--page docs/clients.md]

Each check drives a client as its own documentation does and fails if the client raises, or if what comes back is not what was
asked for. Answers are forced by grammars wherever the client lets a server do that, so that a small model suffices; where a
client only asks the model politely (marked "by prompt"), an answer that is no JSON is the model's doing and counted as such.
Exit code 1 if a check fails, 2 if a client is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import sys
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from stepgraph.bench.report import table

QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]
MAX_TOKENS = 96


class Place(BaseModel):
    """A city in a country."""

    city: Literal["Paris", "London"]
    country: Literal["France", "England"]


PLACES = ("Paris", "London")


@dataclass(frozen=True)
class Server:
    """What a client is told."""

    root: str
    key: str
    model: str

    @property
    def v1(self) -> str:
        """Where OpenAI's API begins."""
        return f"{self.root}/v1"


class ByTheModelError(Exception):
    """The client and the server did their part; what nothing forced the model to write was not there."""


Check = Callable[[Server], str]
CHECKS: dict[tuple[str, str], Check] = {}


def check(client: str, what: str) -> Callable[[Check], Check]:
    """Adds a check: it returns what came back, in a few words."""

    def add(run: Check) -> Check:
        assert (client, what) not in CHECKS
        CHECKS[client, what] = run
        return run

    return add


def said(text: str | None) -> str:
    """An answer in a few words, which it must have."""
    assert text, "the answer is empty"
    return f"“{text.strip()[:40]}”"


def found(place: Any) -> str:
    """A place, which it must be."""
    assert isinstance(place, Place), place
    return f"{place.city}, {place.country}"


def refusal(ask: Callable[[], None], kind: type[Exception]) -> Any:
    """The exception of this very type that a client makes of a refusal."""
    try:
        ask()
    except Exception as error:
        if type(error) is kind:
            return error
        raise
    raise AssertionError("it was not refused")


# --- openai


def _openai(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0)


def _async_openai(server: Server) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0)


@check("openai", "models.list")
def openai_models(server: Server) -> str:
    names = [model.id for model in _openai(server).models.list()]
    assert server.model in names
    return ", ".join(names)


@check("openai", "chat.completions.create, streamed, with usage")
def openai_chat_stream(server: Server) -> str:
    stream = _openai(server).chat.completions.create(
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
    reply = _openai(server).chat.completions.parse(model=server.model, messages=TURNS, response_format=Place)
    return found(reply.choices[0].message.parsed)


@check("openai", "chat.completions.stream, with a tool that must be called")
def openai_chat_tool_stream(server: Server) -> str:
    import openai

    with _openai(server).chat.completions.stream(
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
    client = _openai(server)
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
    reply = _openai(server).completions.create(model=server.model, prompt="Once upon a time", max_tokens=8, logprobs=2)
    assert len(reply.choices[0].logprobs.token_logprobs) == 8
    return said(reply.choices[0].text)


@check("openai", "responses.create")
def openai_responses(server: Server) -> str:
    reply = _openai(server).responses.create(model=server.model, input=QUESTION, max_output_tokens=MAX_TOKENS)
    return said(reply.output_text)


@check("openai", "responses.parse")
def openai_responses_parse(server: Server) -> str:
    return found(_openai(server).responses.parse(model=server.model, input=QUESTION, text_format=Place).output_parsed)


@check("openai", "responses.stream, parsed")
def openai_responses_stream(server: Server) -> str:
    with _openai(server).responses.stream(model=server.model, input=QUESTION, text_format=Place) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created", kinds
    assert kinds[-1] == "response.completed", kinds
    return found(final.output_parsed)


@check("openai", "responses.stream, a tool that must be called")
def openai_responses_tool(server: Server) -> str:
    import openai

    with _openai(server).responses.stream(
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
        async with _async_openai(server) as client:
            return await asyncio.gather(
                *(client.chat.completions.create(model=server.model, messages=TURNS, max_tokens=16) for _ in range(8))
            )

    replies = asyncio.run(ask())
    return said(replies[-1].choices[0].message.content)


@check("openai", "errors as exceptions")
def openai_errors(server: Server) -> str:
    import openai

    def ask(**fields: Any) -> None:
        _openai(server).chat.completions.create(**{"model": server.model, "messages": TURNS, **fields})

    refusals = [
        refusal(lambda: ask(temperature=-1), openai.BadRequestError),
        refusal(lambda: ask(model="nobody"), openai.NotFoundError),
        refusal(lambda: ask(max_tokens="many"), openai.UnprocessableEntityError),
    ]
    assert all(error.request_id for error in refusals)
    return ", ".join(str(error.status_code) for error in refusals)


# --- anthropic


def _anthropic(server: Server) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=server.root, api_key=server.key, max_retries=0)


PLACE_TOOL = {"name": "place", "description": "A city in a country.", "input_schema": Place.model_json_schema()}


@check("anthropic", "messages.create, and count_tokens")
def anthropic_create(server: Server) -> str:
    client = _anthropic(server)
    fields: dict[str, Any] = {"model": server.model, "system": "Be brief.", "messages": TURNS}
    counted = client.messages.count_tokens(**fields).input_tokens
    reply = client.messages.create(max_tokens=MAX_TOKENS, **fields)
    assert reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0) == counted
    return said(reply.content[0].text)


@check("anthropic", "messages.stream")
def anthropic_stream(server: Server) -> str:
    with _anthropic(server).messages.stream(model=server.model, max_tokens=MAX_TOKENS, messages=TURNS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text
    return said(text)


@check("anthropic", "a tool that must be called, and its result")
def anthropic_tools(server: Server) -> str:
    client = _anthropic(server)
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
        _anthropic(server).messages.create(**{"model": server.model, "max_tokens": 8, "messages": TURNS, **fields})

    refusals = [
        refusal(lambda: ask(max_tokens=-1), anthropic.BadRequestError),
        refusal(lambda: ask(model="nobody"), anthropic.NotFoundError),
    ]
    return ", ".join(f"{error.status_code} {error.body['error']['type']}" for error in refusals)


# --- instructor

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

        client = instructor.from_openai(_openai(server), mode=instructor.Mode[mode])
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

    client = instructor.from_anthropic(_anthropic(server), mode=instructor.Mode.ANTHROPIC_TOOLS)
    return found(
        client.messages.create(model=server.model, max_tokens=MAX_TOKENS, messages=TURNS, response_model=Place)
    )


# --- litellm


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


# --- langchain


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


# --- pydantic-ai


def _pydantic_model(server: Server, api: str) -> Any:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if api == "messages":
        return AnthropicModel(server.model, provider=AnthropicProvider(base_url=server.root, api_key=server.key))
    kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
    return kind(server.model, provider=OpenAIProvider(base_url=server.v1, api_key=server.key))


for _api in ("chat", "responses", "messages"):

    @check("pydantic-ai", f"Agent with typed output by a tool, {_api}")
    def pydantic_tool_output(server: Server, api: str = _api) -> str:
        from pydantic_ai import Agent

        agent = Agent(_pydantic_model(server, api), output_type=Place, model_settings={"max_tokens": MAX_TOKENS})
        return found(agent.run_sync(QUESTION).output)


for _api in ("chat", "responses"):

    @check("pydantic-ai", f"NativeOutput, {_api}")
    def pydantic_native_output(server: Server, api: str = _api) -> str:
        from pydantic_ai import Agent, NativeOutput

        return found(Agent(_pydantic_model(server, api), output_type=NativeOutput(Place)).run_sync(QUESTION).output)

    @check("pydantic-ai", f"a text as it streams, {_api}")
    def pydantic_stream(server: Server, api: str = _api) -> str:
        from pydantic_ai import Agent

        async def read() -> str:
            agent = Agent(_pydantic_model(server, api), model_settings={"max_tokens": 16})
            async with agent.run_stream(QUESTION) as result:
                texts = [text async for text in result.stream_text(delta=True)]
                assert len(texts) > 1
                return "".join(texts)

        return said(asyncio.run(read()))


# --- openai-agents


def _agent(server: Server, api: str, **options: Any) -> Any:
    import agents

    agents.set_tracing_disabled(True)
    kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
    return agents.Agent(name="guide", model=kind(server.model, _async_openai(server)), **options)


for _api in ("chat", "responses"):

    @check("openai-agents", f"typed output, {_api}")
    def agents_output(server: Server, api: str = _api) -> str:
        import agents

        return found(agents.Runner.run_sync(_agent(server, api, output_type=Place), QUESTION).final_output)

    @check("openai-agents", f"a tool that must be called, then an answer, streamed, {_api}")
    def agents_tool(server: Server, api: str = _api) -> str:
        import agents

        calls = []

        @agents.function_tool
        def weather(city: Literal["Paris", "London"]) -> str:
            """The weather in a city."""
            calls.append(city)
            return "22 degrees"

        settings = agents.ModelSettings(
            tool_choice="required", max_tokens=1024, temperature=0, parallel_tool_calls=False
        )
        agent = _agent(server, api, tools=[weather], model_settings=settings)

        async def run() -> str:
            result = agents.Runner.run_streamed(agent, "How is the weather in Paris?", max_turns=6)
            async for _ in result.stream_events():
                pass
            return str(result.final_output)

        answer = asyncio.run(run())
        assert calls
        assert calls[0] in PLACES
        return f"{len(calls)} call, {said(answer)}"


# --- the table


@dataclass(frozen=True)
class Row:
    client: str
    what: str
    result: str
    remark: str


def run_checks(server: Server, only: set[str]) -> list[Row]:
    """Every check, one after the other."""
    rows = []
    for (client, what), run in CHECKS.items():
        if only and client not in only:
            continue
        try:
            result, remark = "ok", run(server)
        except ModuleNotFoundError as error:
            result, remark = "not installed", str(error)
        except ByTheModelError as error:
            result, remark = "by the model", str(error)
        except Exception as error:
            result, remark = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append(Row(client, what, result, remark))
        print(f"{client}: {what}: {result} ({remark})", file=sys.stderr)
    return rows


def version_of(client: str) -> str:
    """As installed."""
    try:
        return importlib.metadata.version("pydantic-ai-slim" if client == "pydantic-ai" else client)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def page(server: Server, version: str, rows: list[Row]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Clients",
        "",
        f"What clients got from stepgraph {version} serving {server.model}, each driven as its own documentation does.",
        f"Made by `scripts/check_clients.py --page docs/clients.md` under Python {platform.python_version()}, which is how to",
        "see what another version, or another model, does; `pip install '.[server,clients]'` installs versions that go together.",
        "",
        "| Client | Version | | Result |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {row.client} | {version_of(row.client)} | {row.what} | {row.result} |" for row in rows]
    lines += [
        "",
        "*By prompt*: the client asks the model for a form and the server for nothing, so that it is for the model to follow it;",
        "*by the model*: it did not. All other forms are forced by the server.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    parser.add_argument("--api-key", default="none", metavar="KEY")
    parser.add_argument("--only", nargs="+", default=[], metavar="CLIENT")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table as a page of the documentation")
    arguments = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = arguments.api_key  # some clients insist on it
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a list of prices
    root = arguments.base_url.rstrip("/").removesuffix("/v1")
    unknown = set(arguments.only) - {client for client, _ in CHECKS}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: known are {', '.join(dict(CHECKS))}")
    headers = {"Authorization": f"Bearer {arguments.api_key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{root}/v1/models", headers=headers)) as reply:
            model = json.load(reply)["data"][0]["id"]
        with urllib.request.urlopen(f"{root}/version") as reply:
            version = json.load(reply)["version"]
    except OSError as error:
        print(f"error: {root} does not answer ({error}); start one with `stepgraph serve smollm2`", file=sys.stderr)
        return 2
    server = Server(root, arguments.api_key, model)
    rows = run_checks(server, set(arguments.only))
    print(
        table(
            ["client", "version", "what", "result", "remark"],
            [[row.client, version_of(row.client), row.what, row.result, row.remark] for row in rows],
        )
    )
    if arguments.page is not None:
        arguments.page.write_text(page(server, version, rows))
    if any(row.result == "FAILED" for row in rows):
        return 1
    return 2 if any(row.result == "not installed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
