"""What /v1/responses answers: its objects, and how they and the events of a stream grow from what the model writes."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from stepgraph.server.conversation import Piece
from stepgraph.server.replies import TokenLogprob
from stepgraph.server.tool_calls import ToolCallDelta

Event: TypeAlias = dict[str, Any]
"""Of a stream: its `type` and what it tells, without its number."""


class OutputText(msgspec.Struct, frozen=True):
    """The content of a message."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    annotations: tuple[()] = ()
    type: str = "output_text"


class ReasoningText(msgspec.Struct, frozen=True):
    """The content of the reasoning."""

    text: str
    type: str = "reasoning_text"


class MessageItem(msgspec.Struct, frozen=True):
    """What the model says."""

    id: str
    content: tuple[OutputText, ...]
    status: str
    role: str = "assistant"
    type: str = "message"


class ReasoningItem(msgspec.Struct, frozen=True):
    """What the model thinks before."""

    id: str
    content: tuple[ReasoningText, ...]
    status: str
    summary: tuple[()] = ()
    encrypted_content: None = None
    type: str = "reasoning"


class FunctionCallItem(msgspec.Struct, frozen=True):
    """A call the model wants made; `arguments` is JSON text as the model wrote it."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str
    type: str = "function_call"


OutputItem: TypeAlias = ReasoningItem | MessageItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, frozen=True):
    """Part of `ResponseUsage`."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """What OpenAI charges for; here writing costs nothing."""


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """Part of `ResponseUsage`."""

    reasoning_tokens: int
    accepted_prediction_tokens: int | UnsetType = UNSET
    rejected_prediction_tokens: int | UnsetType = UNSET
    """As in `stepgraph.server.replies.CompletionTokensDetails`; the API has no place for these two."""


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response is incomplete."""

    reason: str | None
    """None: the server ended it."""


class ResponseError(msgspec.Struct, frozen=True):
    """Why a response failed."""

    code: str
    message: str


class ReasoningShown(msgspec.Struct, frozen=True):
    """What was asked for about the reasoning. It is given whole, not as a summary."""

    effort: str | None
    summary: None = None


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """A response: what was asked for, and what came of it."""

    id: str
    object: str = "response"
    created_at: int
    """Seconds since 1970, as `completed_at`."""
    completed_at: int | None = None
    status: str = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: tuple[OutputItem, ...] = ()
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: ReasoningShown
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    user: str | None
    presence_penalty: float
    frequency_penalty: float
    max_tool_calls: int | None
    service_tier: str
    safety_identifier: str | None
    prompt_cache_key: str | None
    background: bool = False
    previous_response_id: None = None
    store: bool = False
    truncation: str = "disabled"


class Output:
    """The items of an answer, made of the pieces in which it arrives.

    The items come one after another: what belongs to the next ends the one before. A piece does not tell the order inside it,
    which is taken to be: more of a call, reasoning, content, new calls.
    """

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is held back yet

    @property
    def items(self) -> tuple[OutputItem, ...]:
        """All items so far; the last one is incomplete until `end`."""
        return tuple(item.shown(item.status) for item in self._items)

    def take(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        """Take in what the answer gains. Returns the events that tell of it.

        Args:
            piece: what it gains.
            logprobs: of the tokens that it came with. A message has those that came with content.
        """
        events: list[Event] = []
        self._logprobs += logprobs
        num_before = next((n for n, call in enumerate(piece.calls) if call.name is not None), len(piece.calls))
        events += self._take_calls(piece.calls[:num_before])
        if piece.reasoning:
            events += self._turn_to(_Reasoning)
            events += self._items[-1].add(piece.reasoning)
        if piece.content:
            events += self._turn_to(_Message)
            events += self._items[-1].add(piece.content, logprobs=tuple(self._logprobs))
        events += self._take_calls(piece.calls[num_before:])
        if any(piece):
            self._logprobs.clear()
        return events

    def end(self, status: str) -> list[Event]:
        """The answer has ended, and `status` is its last item's. An answer of nothing is an empty message.

        Returns the events that tell of it.
        """
        events = [] if self._items else self._begin(_Message(0))
        return events + self._items[-1].end(status)

    def _take_calls(self, calls: Sequence[ToolCallDelta]) -> list[Event]:
        events: list[Event] = []
        for call in calls:
            if call.name is not None:
                events += self._begin(_Call(len(self._items), call.name))
            if call.arguments:
                events += self._items[-1].add(call.arguments)
        return events

    def _turn_to(self, kind: type[_Item]) -> list[Event]:
        """Begin an item of this kind, unless one is being written."""
        if self._items and isinstance(self._items[-1], kind):
            return []
        return self._begin(kind(len(self._items)))

    def _begin(self, item: _Item) -> list[Event]:
        events = self._items[-1].end("completed") if self._items else []
        self._items.append(item)
        return events + item.begin()


class _Item(ABC):
    """An item that is written piece by piece. What it does returns the events that tell of it.

    Args:
        index: its place among the items.
    """

    _prefix: ClassVar[str]
    """Of its id."""
    _topic: ClassVar[str]
    """Of the events about its text."""

    def __init__(self, index: int):
        self.status = "incomplete"
        self._index = index
        self._id = new_id(self._prefix)
        self._texts: list[str] = []

    @abstractmethod
    def shown(self, status: str) -> OutputItem:
        """The item as it is by now, with this status."""

    @abstractmethod
    def _result(self) -> Event:
        """What the event says that ends its text."""

    def begin(self) -> list[Event]:
        """It is new."""
        return [self._item_event("added", "in_progress")]

    def add(self, text: str, **more: Any) -> list[Event]:
        """It gains text; `more` goes into the event."""
        self._texts.append(text)
        return [self._text_event("delta", delta=text, **more)]

    def end(self, status: str) -> list[Event]:
        """It gains nothing more."""
        self.status = status
        return [self._text_event("done", **self._result()), self._item_event("done", status)]

    def _text(self) -> str:
        return "".join(self._texts)

    def _item_event(self, what: str, status: str) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": self._index, "item": self.shown(status)}

    def _text_event(self, what: str, **fields: Any) -> Event:
        return {"type": f"response.{self._topic}.{what}", "item_id": self._id, "output_index": self._index, **fields}


class _Call(_Item):
    _prefix = "fc"
    _topic = "function_call_arguments"

    def __init__(self, index: int, name: str):
        super().__init__(index)
        self._name = name
        self._call_id = new_id("call")

    def shown(self, status: str) -> OutputItem:
        return FunctionCallItem(self._id, self._call_id, self._name, self._text(), status)

    def _result(self) -> Event:
        return {"name": self._name, "arguments": self._text()}


class _TextItem(_Item):
    """Its text is the item's one part."""

    @abstractmethod
    def _part(self) -> OutputText | ReasoningText:
        """The part as it is by now."""

    def begin(self) -> list[Event]:
        return [*super().begin(), self._part_event("added")]

    def end(self, status: str) -> list[Event]:
        text_done, item_done = super().end(status)
        return [text_done, self._part_event("done"), item_done]

    def _text_event(self, what: str, **fields: Any) -> Event:
        return super()._text_event(what, content_index=0, **fields)

    def _part_event(self, what: str) -> Event:
        return {
            "type": f"response.content_part.{what}",
            "item_id": self._id,
            "output_index": self._index,
            "content_index": 0,
            "part": self._part(),
        }


class _Reasoning(_TextItem):
    _prefix = "rs"
    _topic = "reasoning_text"

    def shown(self, status: str) -> OutputItem:
        return ReasoningItem(self._id, () if status == "in_progress" else (self._part(),), status)

    def _part(self) -> ReasoningText:
        return ReasoningText(self._text())

    def _result(self) -> Event:
        return {"text": self._text()}


class _Message(_TextItem):
    _prefix = "msg"
    _topic = "output_text"

    def __init__(self, index: int):
        super().__init__(index)
        self._logprobs: list[TokenLogprob] = []

    def add(self, text: str, **more: Any) -> list[Event]:
        self._logprobs += more["logprobs"]
        return super().add(text, **more)

    def shown(self, status: str) -> OutputItem:
        return MessageItem(self._id, () if status == "in_progress" else (self._part(),), status)

    def _part(self) -> OutputText:
        return OutputText(self._text(), tuple(self._logprobs))

    def _result(self) -> Event:
        return {"text": self._text(), "logprobs": self._logprobs}


def new_id(prefix: str) -> str:
    """A name for what is about to be made, in the form of this API, e.g. resp_…"""
    return f"{prefix}_{uuid.uuid4().hex}"
