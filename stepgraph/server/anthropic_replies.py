"""What /v1/messages answers: its objects, and how they and the events of a stream grow from what the model writes."""

from __future__ import annotations

import json
from abc import abstractmethod
from hashlib import sha256
from typing import Any, Self, TypeAlias

import msgspec
from msgspec import UNSET
from pydantic_core import from_json

from stepgraph.server.answer_items import AnswerItems, Event, Item
from stepgraph.server.replies import Usage
from stepgraph.server.service import new_id


class TextBlock(msgspec.Struct, frozen=True):
    """What the model says."""

    text: str
    citations: None = None
    type: str = "text"


class ThinkingBlock(msgspec.Struct, frozen=True):
    """What the model thinks before."""

    thinking: str
    signature: str
    """Clients leave thinking out of later requests that has none. Nothing is checked by it."""
    type: str = "thinking"


class Caller(msgspec.Struct, frozen=True):
    """Who wants a tool called: the model itself."""

    type: str = "direct"


class ToolUseBlock(msgspec.Struct, frozen=True):
    """A call the model wants made."""

    id: str
    name: str
    input: msgspec.Raw
    caller: Caller = Caller()
    type: str = "tool_use"


Block: TypeAlias = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """Part of `DeltaUsage`."""

    thinking_tokens: int


class DeltaUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a message, as a stream tells them in the end."""

    input_tokens: int
    """Of the prompt, without those that the prefix cache saved."""
    cache_read_input_tokens: int
    """Those."""
    cache_creation_input_tokens: int = 0
    """What Anthropic charges for; here writing costs nothing."""
    output_tokens: int
    output_tokens_details: OutputTokensDetails | None
    server_tool_use: None = None

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """From the counts as the OpenAI API has them."""
        num_cached = usage.prompt_tokens_details.cached_tokens
        details = usage.completion_tokens_details
        return cls(
            input_tokens=usage.prompt_tokens - num_cached,
            cache_read_input_tokens=num_cached,
            output_tokens=usage.completion_tokens,
            output_tokens_details=None if details is UNSET else OutputTokensDetails(details.reasoning_tokens),
        )


class MessageUsage(DeltaUsage, frozen=True, kw_only=True):
    """Tokens of a message."""

    cache_creation: None = None
    inference_geo: None = None
    service_tier: str = "standard"


class MessageDelta(msgspec.Struct, frozen=True):
    """Why a message ended."""

    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    container: None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """An answer."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: tuple[Block, ...]
    stop_reason: str | None
    """None: it is only beginning."""
    stop_sequence: str | None
    stop_details: None = None
    container: None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct, frozen=True):
    """Of /v1/messages/count_tokens."""

    input_tokens: int


class Content(AnswerItems["_Block"]):
    """The blocks of an answer, made of the pieces in which it arrives.

    Args:
        shows_thinking: give the text of thinking blocks.
    """

    def __init__(self, *, shows_thinking: bool):
        super().__init__(_Thinking if shows_thinking else _HiddenThinking, _Text, _ToolUse)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks so far."""
        return tuple(item.shown() for item in self._items)

    @property
    def has_calls(self) -> bool:
        """Whether the model wants a call made."""
        return any(isinstance(item, _ToolUse) for item in self._items)


class _Block(Item):
    @abstractmethod
    def shown(self) -> Block:
        """The block as it is by now."""

    @abstractmethod
    def _delta(self, text: str) -> Event:
        """What the event says that tells of more text."""

    def begin(self) -> list[Event]:
        return [self._event("start", content_block=self.shown())]

    def add(self, text: str, **more: Any) -> list[Event]:
        self._texts.append(text)
        return [self._event("delta", delta=self._delta(text))]

    def end(self, status: str) -> list[Event]:
        return [self._event("stop")]

    def _event(self, what: str, **fields: Any) -> Event:
        return {"type": f"content_block_{what}", "index": self._index, **fields}


class _Text(_Block):
    def shown(self) -> Block:
        return TextBlock(self._text())

    def _delta(self, text: str) -> Event:
        return {"type": "text_delta", "text": text}


class _Thinking(_Block):
    def shown(self) -> Block:
        return ThinkingBlock(self._text(), self._signature())

    def end(self, status: str) -> list[Event]:
        signed = {"type": "signature_delta", "signature": self._signature()}
        return [self._event("delta", delta=signed), *super().end(status)]

    def _delta(self, text: str) -> Event:
        return {"type": "thinking_delta", "thinking": text}

    def _signature(self) -> str:
        return sha256(self._text().encode()).hexdigest() if self._texts else ""


class _HiddenThinking(_Thinking):
    def shown(self) -> Block:
        return ThinkingBlock("", self._signature())

    def add(self, text: str, **more: Any) -> list[Event]:
        super().add(text)
        return []


class _ToolUse(_Block):
    def __init__(self, index: int, name: str):
        super().__init__(index)
        self._name = name
        self._id = new_id("toolu_")

    def shown(self) -> Block:
        return ToolUseBlock(self._id, self._name, input_of(self._text()))

    def _delta(self, text: str) -> Event:
        return {"type": "input_json_delta", "partial_json": text}


def input_of(arguments: str) -> msgspec.Raw:
    """The input of a call as an object, from JSON text that the model wrote: as far as it came, if it was cut off, and under the
    name "arguments" if it is no object."""
    text = arguments.strip() or "{}"
    if not _is_object(text):
        try:
            found = from_json(text, allow_partial=True)
            text = json.dumps(found if isinstance(found, dict) else {"arguments": arguments}, allow_nan=False)
        except ValueError:
            text = json.dumps({"arguments": arguments})
    return msgspec.Raw(text.encode())


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object, which may hold numbers of any size."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
