"""What /v1/responses answers: its objects, and how they and the events of a stream grow from what the model writes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from stepgraph.server.answer_items import AnswerItems, Event, Item
from stepgraph.server.pieces import Piece
from stepgraph.server.replies import TokenLogprob
from stepgraph.server.service import new_id


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

    reason: str | UnsetType
    """Left out: the server ended it."""


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
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET
    """See `Generation.kv_transfer_params`."""


class Output(AnswerItems["_Item"]):
    """The items of an answer, made of the pieces in which it arrives."""

    def __init__(self) -> None:
        super().__init__(_Reasoning, _Message, _Call)
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is held back yet

    @property
    def items(self) -> tuple[OutputItem, ...]:
        """All items so far; the last one is incomplete until `end`."""
        return tuple(item.shown(item.status) for item in self._items)

    def take_with(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        """As `take`.

        Args:
            piece: what the answer gains.
            logprobs: of the tokens that it came with. A message has those that came with content.
        """
        self._logprobs += logprobs
        events = self.take(piece, logprobs=tuple(self._logprobs))
        if any(piece):
            self._logprobs.clear()
        return events


class _Item(Item):
    _prefix: ClassVar[str]
    """Of its id."""
    _topic: ClassVar[str]
    """Of the events about its text."""

    def __init__(self, index: int):
        super().__init__(index)
        self.status = "incomplete"
        self._id = new_id(self._prefix)

    @abstractmethod
    def shown(self, status: str) -> OutputItem:
        """The item as it is by now, with this status."""

    @abstractmethod
    def _result(self) -> Event:
        """What the event says that ends its text."""

    def begin(self) -> list[Event]:
        return [self._item_event("added", "in_progress")]

    def add(self, text: str, **more: Any) -> list[Event]:
        self._texts.append(text)
        return [self._text_event("delta", delta=text, **more)]

    def end(self, status: str) -> list[Event]:
        self.status = status
        return [self._text_event("done", **self._result()), self._item_event("done", status)]

    def _item_event(self, what: str, status: str) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": self._index, "item": self.shown(status)}

    def _text_event(self, what: str, **fields: Any) -> Event:
        return {"type": f"response.{self._topic}.{what}", "item_id": self._id, "output_index": self._index, **fields}


class _Call(_Item):
    _prefix = "fc_"
    _topic = "function_call_arguments"

    def __init__(self, index: int, name: str):
        super().__init__(index)
        self._name = name
        self._call_id = new_id("call_")

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
    _prefix = "rs_"
    _topic = "reasoning_text"

    def shown(self, status: str) -> OutputItem:
        return ReasoningItem(self._id, () if status == "in_progress" else (self._part(),), status)

    def _part(self) -> ReasoningText:
        return ReasoningText(self._text())

    def _result(self) -> Event:
        return {"text": self._text()}


class _Message(_TextItem):
    _prefix = "msg_"
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
