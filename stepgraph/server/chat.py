"""/v1/chat/completions: conversations, with reasoning and tool calls."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from msgspec import UNSET, UnsetType

from stepgraph.engine.harmony import known_effort
from stepgraph.engine.outputs import Logprob, TokenProbabilities
from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import AnswerDelta
from stepgraph.errors import RequestError
from stepgraph.server.completions import describe_prompt_logprobs
from stepgraph.server.conversation import AnswerParser, ToolUse, plain_messages
from stepgraph.server.errors import APIError
from stepgraph.server.generation import Generation
from stepgraph.server.harmony import HarmonyParser
from stepgraph.server.pieces import Paragraphs, Piece
from stepgraph.server.protocol import ChatRequest, sampling_params, structured_outputs
from stepgraph.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
    encode_json,
)
from stepgraph.server.service import Context, Service, StreamedUsage, Tally, merged, new_id
from stepgraph.server.sse import DONE, event


class Gain(NamedTuple):
    """What one answer of a conversation gains."""

    delta: AnswerDelta
    piece: Piece
    finish_reason: str | None
    """`delta`'s, or "tool_calls"."""


class Conversation(NamedTuple):
    """What is asked for, as chat templates and the engine take it."""

    request: ChatRequest
    messages: list[dict[str, Any]]
    tools: ToolUse


class ChatCall:
    """A conversation that the engine has accepted, being answered. Use `gains` once.

    Args:
        generation: its answers.
        parsers: one for each answer.
        tally: counts their tokens.
        tools: what was asked for about them.
    """

    def __init__(
        self, generation: Generation, parsers: Sequence[AnswerParser | HarmonyParser], tally: Tally, tools: ToolUse
    ):
        self.generation = generation
        self.tally = tally
        self.tools = tools
        self._parsers = parsers

    @classmethod
    async def start(
        cls,
        read: Callable[[], Conversation],
        service: Service,
        context: Context,
        *,
        id: str,
        adapter: str | None,
    ) -> ChatCall:
        """Send a conversation to the engine.

        Args:
            read: finds out what is asked for; called in a thread.

        Raises:
            APIError, RequestError: it cannot be answered.
        """
        form = service.chat_form
        service.check_queue()  # before the work of preparing it
        request, tools, prompt, params = await service.in_thread(lambda: _prepared(read(), service))
        [generation] = await service.start(id, [prompt], params, context, request=request, adapter=adapter)
        guided = params.structured_outputs is not None
        parsers = [form.parser(tools, prompt=prompt.text, guided=guided) for _ in range(params.n)]
        tally = Tally([generation], thinks=form.thinks, speculates=service.speculates)
        return cls(generation, parsers, tally, tools)

    async def gains(self) -> AsyncGenerator[Gain]:
        """What the answers gain, as it comes; pieces that are held back yet are left out."""
        async with aclosing(merged([self.generation])) as found:
            async for _, deltas in found:
                self.tally.add(deltas)
                for delta in (part for whole in deltas for part in whole.parts()):
                    parser = self._parsers[delta.index]
                    special = delta.specials[0].token_id if delta.specials else None
                    piece = parser.feed(delta.text, special=special, finish_reason=delta.finish_reason)
                    self.tally.num_reasoning += num_reasoning(delta, piece)
                    reason = delta.finish_reason
                    if (
                        reason == "stop" and parser.num_calls and self.tools.forced is None
                    ):  # else the client knows of the call
                        reason = "tool_calls"
                    yield Gain(delta, piece, reason)

    def usage(self) -> Usage:
        """Token counts by now."""
        return self.tally.usage()


def prompt_of(conversation: Conversation, service: Service) -> TokenizedPrompt:
    """What the model is to answer. Takes milliseconds, or more if the conversation is long.

    Raises:
        APIError, RequestError: it cannot become a prompt.
    """
    request, messages, tools = conversation
    service.check_turns(messages)
    rendering = request.rendering()
    if request.reasoning_effort is not None:
        form = service.chat_form
        effort = request.reasoning_effort if form.harmony is None else known_effort(request.reasoning_effort)
        rendering["variables"].setdefault("reasoning_effort", effort)
    text = service.chat_form.template.render(messages, tools.shown, **rendering)
    return service.encode(text, add_special_tokens=False)


def _prepared(
    conversation: Conversation, service: Service
) -> tuple[ChatRequest, ToolUse, TokenizedPrompt, SamplingParams]:
    """What the engine is sent of a conversation, and what must be known of it beside that. Takes as long as `prompt_of`."""
    request, _, tools = conversation
    form = service.chat_form
    prompt = prompt_of(conversation, service)
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    others: dict[str, Any] = {"max_tokens": max_tokens}
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs; set it to true", param="top_logprobs")
    if request.logprobs:
        others["logprobs"] = request.top_logprobs or 0
    others["structured_outputs"] = form.answer_form(
        structured_outputs(request), tools, prompt.text or "", is_whole=request.response_format is None
    )
    if form.harmony is not None:
        others["skip_special_tokens"] = True  # they are structure
    elif form.needs_special_tokens(tools):
        others["skip_special_tokens"] = False
    params = sampling_params(request, service.model.sampling_defaults, **others)
    return request, tools, prompt, params


def num_reasoning(delta: AnswerDelta, piece: Piece) -> int:
    """Of the tokens of `delta`, those that are reasoning. Where reasoning ends within several, they are shared by their text."""
    if not piece.reasoning:
        return 0
    return math.ceil(len(delta.token_ids) * min(1.0, len(piece.reasoning) / max(1, len(delta.text))))


class ChatReply:
    """One call of /v1/chat/completions, as the OpenAI API shapes it."""

    def __init__(self, request: ChatRequest, call: ChatCall, model: str, id: str, n: int):
        self._request = request
        self._call = call
        self._model = model
        self._id = id
        self._created = int(time.time())
        self._n = n

    @classmethod
    async def start(cls, request: ChatRequest, service: Service, context: Context) -> ChatReply:
        """Check a request and send it to the engine.

        Raises:
            APIError, RequestError: it cannot be answered.
        """
        model, adapter = service.choose_model(request.model)
        id = new_id("chatcmpl-")

        def read() -> Conversation:
            tools = ToolUse.of(request.tools, request.tool_choice, request.parallel_tool_calls)
            return Conversation(request, plain_messages(request.messages), tools)

        call = await ChatCall.start(read, service, context, id=id, adapter=adapter)
        return cls(request, call, model, id, len(call.generation.requests))

    async def reply(self) -> bytes:
        """The whole answer, as JSON."""
        choices = [
            ChatChoice(index, ChatMessage(None, "assistant", refusal=None), None, None) for index in range(self._n)
        ]
        texts: list[tuple[list[str], list[str]]] = [([], []) for _ in choices]
        arguments: list[list[list[str]]] = [[] for _ in choices]
        paragraphs = [Paragraphs() for _ in choices]
        async with aclosing(self._call.gains()) as gains:
            async for gain in gains:
                index = gain.delta.index
                choice = choices[index]
                gain = gain._replace(piece=paragraphs[index].join(gain.piece))
                texts[index][0].append(gain.piece.reasoning)
                texts[index][1].append(gain.piece.content)
                for call in gain.piece.calls:
                    if call.name is not None:
                        calls = [] if choice.message.tool_calls is UNSET else choice.message.tool_calls
                        calls.append(ToolCall(FunctionCall("", call.name), new_id("call-"), "function"))
                        choice.message.tool_calls = calls
                        arguments[index].append([])
                    arguments[index][-1].append(call.arguments)
                self._finish_choice(choice, gain)
        for choice, (thoughts, contents), pieces in zip(choices, texts, arguments, strict=True):
            content, thought = "".join(contents), "".join(thoughts)
            calls = [] if choice.message.tool_calls is UNSET else choice.message.tool_calls
            choice.message.content = content if content or not (calls or self._call.tools.must_call) else None
            if thought and self._request.include_reasoning:
                choice.message.reasoning_content = thought
            for call_made, texts_of_call in zip(calls, pieces, strict=True):
                call_made.function.arguments = "".join(texts_of_call)
        reply = ChatCompletion(self._id, self._created, self._model, choices, self._call.usage())
        reply.kv_transfer_params = self._call.generation.kv_transfer_params
        if self._request.return_token_ids:
            reply.prompt_token_ids = list(self._call.generation.prompt.token_ids)
        if self._request.prompt_logprobs is not None:
            reply.prompt_logprobs = await asyncio.to_thread(describe_prompt_logprobs, self._call.generation)
        return encode_json(reply)

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        usage = StreamedUsage(self._request.stream_options, self._call.usage)

        def chunk(choices: list[ChatChunkChoice], counts: Usage | UnsetType | None) -> bytes:
            params = self._call.generation.kv_transfer_params if choices and choices[0].finish_reason else UNSET
            return event(
                encode_json(ChatChunk(self._id, self._created, self._model, choices, counts, kv_transfer_params=params))
            )

        first = ChatMessage(None if self._call.tools.must_call else "", "assistant")
        for index in range(self._n):
            yield chunk([ChatChunkChoice(index, first)], usage.of_chunk())
        paragraphs = [Paragraphs() for _ in range(self._n)]
        async with aclosing(self._call.gains()) as gains:
            async for gain in gains:
                piece = paragraphs[gain.delta.index].join(gain.piece)
                choice = self._chunk_of(gain._replace(piece=piece))
                if choice is not None:
                    yield chunk([choice], usage.of_chunk())
        if usage.at_end:
            yield chunk([], self._call.usage())
        yield DONE

    def failed(self, failure: APIError) -> bytes:
        """The last event of a stream that breaks off."""
        return event(failure.body())

    def _chunk_of(self, gain: Gain) -> ChatChunkChoice | None:
        """None if there is nothing to tell yet."""
        request, delta, piece = self._request, gain.delta, gain.piece
        message = ChatMessage()
        if piece.reasoning and request.include_reasoning:
            message.reasoning_content = piece.reasoning
        if piece.content:
            message.content = piece.content
        if piece.calls:
            message.tool_calls = [
                ToolCall(FunctionCall(call.arguments), index=call.index)
                if call.name is None
                else ToolCall(FunctionCall(call.arguments, call.name), new_id("call-"), "function", call.index)
                for call in piece.calls
            ]
        choice = ChatChunkChoice(delta.index, message, finish_reason=gain.finish_reason)
        if delta.stop_reason is not None:
            choice.stop_reason = delta.stop_reason
        if delta.logprobs is not None and delta.token_ids:
            choice.logprobs = ChatLogprobs(describe_logprobs(delta, request.top_logprobs or 0))
        if request.return_token_ids:
            choice.token_ids = delta.token_ids
        elif message == ChatMessage() and gain.finish_reason is None and choice.logprobs is None:
            return None
        return choice

    def _finish_choice(self, choice: ChatChoice, gain: Gain) -> None:
        """What a whole answer has beside its text."""
        delta = gain.delta
        choice.finish_reason, choice.stop_reason = gain.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            choice.logprobs = choice.logprobs or ChatLogprobs([])
            choice.logprobs.content += describe_logprobs(delta, self._request.top_logprobs or 0)
        if self._request.return_token_ids:
            choice.token_ids = (() if choice.token_ids is UNSET else choice.token_ids) + delta.token_ids


def describe_logprobs(delta: AnswerDelta, num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens of `delta`, which has some, and of `num_top` likely ones beside each."""
    assert delta.logprobs is not None
    return [
        _describe(token, probabilities, num_top)
        for token, probabilities in zip(delta.token_ids, delta.logprobs, strict=True)
    ]


def _describe(token_id: int, probabilities: TokenProbabilities, num_top: int) -> TokenLogprob:
    own = probabilities[token_id]
    top = sorted((p for p in probabilities.values() if p.rank <= num_top), key=lambda p: p.rank)
    return TokenLogprob(
        own.decoded_token or "",
        own.logprob,
        _bytes_of(own),
        [TopLogprob(p.decoded_token or "", p.logprob, _bytes_of(p)) for p in top],
    )


def _bytes_of(token: Logprob) -> list[int]:
    if token.decoded_bytes is not None:
        return list(token.decoded_bytes)
    return list((token.decoded_token or "").encode("utf-8", "replace"))
