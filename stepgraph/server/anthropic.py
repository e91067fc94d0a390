"""/v1/messages: conversations in the form of Anthropic's Messages API, and the count of their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from stepgraph.server.anthropic_errors import error_content
from stepgraph.server.anthropic_replies import Content, DeltaUsage, Message, MessageDelta, MessageUsage, TokenCount
from stepgraph.server.anthropic_requests import CountTokensRequest, MessagesRequest, conversation_of, sampling_of
from stepgraph.server.chat import ChatCall, Gain, prompt_of
from stepgraph.server.errors import APIError
from stepgraph.server.replies import encode_json
from stepgraph.server.service import Context, Service, new_id
from stepgraph.server.sse import event

_PING_S = 15
"""So often a client that waits for the beginning of its answer is told that it still does."""
_PING = event(b'{"type":"ping"}', "ping")


class MessagesReply:
    """One call of /v1/messages, as Anthropic's API shapes it.

    Args:
        call: the conversation as the engine answers it.
        id, model: of the answer.
        max_tokens: length that was asked for.
        shows_thinking: give the text of thinking blocks.
        request_id: named in errors.
    """

    def __init__(self, call: ChatCall, *, id: str, model: str, max_tokens: int, shows_thinking: bool, request_id: str):
        self._call = call
        self._id = id
        self._model = model
        self._max_tokens = max_tokens
        self._request_id = request_id
        self._content = Content(shows_thinking=shows_thinking)
        self._end = MessageDelta()

    @classmethod
    async def start(cls, request: MessagesRequest, service: Service, context: Context) -> MessagesReply:
        """Check a request and send it to the engine.

        Raises:
            APIError, RequestError: it cannot be answered.
        """
        model, adapter = service.choose_model(request.model)
        id = new_id("msg_")
        call = await ChatCall.start(
            lambda: conversation_of(request, sampling_of(request)), service, context, id=id, adapter=adapter
        )
        return cls(
            call,
            id=id,
            model=model,
            max_tokens=request.max_tokens,
            shows_thinking=request.thinking is None or request.thinking.display != "omitted",
            request_id=context.request_id,
        )

    async def reply(self) -> bytes:
        """The whole answer, as JSON."""
        async with aclosing(self._call.gains()) as gains:
            async for gain in gains:
                self._take(gain)
        self._content.end("completed")
        return encode_json(self._message())

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events. Its usage is known, and it begins, when the first tokens are there."""
        async with aclosing(self._call.gains()) as gains:
            first = asyncio.ensure_future(anext(gains))
            try:
                while not (await asyncio.wait((first,), timeout=_PING_S))[0]:
                    yield _PING
                gain = first.result()
            finally:
                first.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await first
            yield _event({"type": "message_start", "message": self._message()})
            yield _PING  # as Anthropic's server does here
            for found in self._take(gain):
                yield _event(found)
            async for gain in gains:
                for found in self._take(gain):
                    yield _event(found)
        for found in self._content.end("completed"):
            yield _event(found)
        yield _event({"type": "message_delta", "delta": self._end, "usage": DeltaUsage.of(self._call.usage())})
        yield _event({"type": "message_stop"})

    def failed(self, failure: APIError) -> bytes:
        """The last event of a stream that breaks off."""
        return event(error_content(failure, self._request_id), "error")

    def _take(self, gain: Gain) -> list[dict[str, Any]]:
        events = self._content.take(gain.piece)
        if gain.finish_reason is not None:
            self._end = self._end_of(gain)
        return events

    def _end_of(self, gain: Gain) -> MessageDelta:
        """Why the answer ends with `gain`."""
        if gain.finish_reason == "length":
            is_full = self._call.usage().completion_tokens < self._max_tokens
            return MessageDelta("model_context_window_exceeded" if is_full else "max_tokens")
        if gain.finish_reason == "abort":  # administrators ended it; the answer can be gone on with
            return MessageDelta("pause_turn")
        if isinstance(gain.delta.stop_reason, str):
            return MessageDelta("stop_sequence", gain.delta.stop_reason)
        return MessageDelta("tool_use" if self._content.has_calls else "end_turn")

    def _message(self) -> Message:
        """The answer as it is by now."""
        return Message(
            id=self._id,
            model=self._model,
            content=self._content.blocks,
            stop_reason=self._end.stop_reason,
            stop_sequence=self._end.stop_sequence,
            usage=MessageUsage.of(self._call.usage()),
        )


def _event(content: Mapping[str, Any]) -> bytes:
    return event(encode_json(content), content["type"])


async def count_tokens(request: CountTokensRequest, service: Service) -> bytes:
    """The tokens of a prompt, as JSON.

    Raises:
        APIError, RequestError: it cannot be answered, and its length does not matter.
    """
    service.choose_model(request.model)

    def count() -> bytes:
        prompt = prompt_of(conversation_of(request, {}), service)
        return encode_json(TokenCount(len(prompt.token_ids)))

    return await service.in_thread(count)
