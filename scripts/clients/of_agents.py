"""Packages of agents: pydantic-ai and openai-agents."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from clients.base import MAX_TOKENS, QUESTION, Place, Server, check, found, said
from clients.sdks import async_openai_client


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


def _agent(server: Server, api: str, **options: Any) -> Any:
    import agents

    agents.set_tracing_disabled(True)
    kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
    return agents.Agent(name="guide", model=kind(server.model, async_openai_client(server)), **options)


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
        assert calls[0] in ("Paris", "London")
        return f"{len(calls)} call, {said(answer)}"
