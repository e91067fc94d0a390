"""An answer as items that come one after another: how they, and the events of a stream, grow from what the model writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from stepgraph.server.pieces import Piece
from stepgraph.server.tool_calls import ToolCallDelta

Event: TypeAlias = dict[str, Any]
"""Of a stream: its `type` and what it tells."""


class Item(ABC):
    """An item that is written piece by piece. What it does returns the events that tell of it.

    Args:
        index: its place among the items.
    """

    def __init__(self, index: int):
        self._index = index
        self._texts: list[str] = []

    @abstractmethod
    def begin(self) -> list[Event]:
        """It is new."""

    @abstractmethod
    def add(self, text: str, **more: Any) -> list[Event]:
        """It gains text; `more` is what `AnswerItems.take` was told of content beside."""

    @abstractmethod
    def end(self, status: str) -> list[Event]:
        """It gains nothing more. `status` is "completed", or another for the last item of an answer that was cut off."""

    def _text(self) -> str:
        return "".join(self._texts)


I = TypeVar("I", bound=Item)  # noqa: E741  # an item


class AnswerItems(Generic[I]):
    """The items of an answer, made of the pieces in which it arrives.

    The items come one after another: what belongs to the next ends the one before. A piece does not tell the order inside it,
    which is taken to be: more of a call, reasoning, content, new calls.

    Args:
        reasoning, content: make an item of this kind for a place.
        call: makes one for a place and a function's name; its text is that of the arguments.
    """

    def __init__(self, reasoning: Callable[[int], I], content: Callable[[int], I], call: Callable[[int, str], I]):
        self._reasoning = reasoning
        self._content = content
        self._call = call
        self._items: list[I] = []
        self._is_open_for: Callable[[int], I] | None = None  # what the last item goes on with, if more of that comes

    def take(self, piece: Piece, **of_content: Any) -> list[Event]:
        """Take in what the answer gains; `of_content` goes to the item that gains its content. Returns the events that tell of
        it."""
        num_before = next((n for n, call in enumerate(piece.calls) if call.name is not None), len(piece.calls))
        events = self._take_calls(piece.calls[:num_before])
        if piece.begins_message:
            self._is_open_for = None
        if piece.reasoning:
            events += self._turn_to(self._reasoning)
            events += self._items[-1].add(piece.reasoning)
        if piece.content:
            events += self._turn_to(self._content)
            events += self._items[-1].add(piece.content, **of_content)
        return events + self._take_calls(piece.calls[num_before:])

    def end(self, status: str) -> list[Event]:
        """The answer has ended, and `status` is its last item's. An answer of nothing is one item without content.

        Returns the events that tell of it.
        """
        events = [] if self._items else self._turn_to(self._content)
        return events + self._items[-1].end(status)

    def _take_calls(self, calls: Sequence[ToolCallDelta]) -> list[Event]:
        events: list[Event] = []
        for call in calls:
            if call.name is not None:
                events += self._begin(self._call(len(self._items), call.name))
                self._is_open_for = None
            if call.arguments:
                events += self._items[-1].add(call.arguments)
        return events

    def _turn_to(self, kind: Callable[[int], I]) -> list[Event]:
        """Begin an item of this kind, unless one is being written."""
        if self._is_open_for is kind:
            return []
        self._is_open_for = kind
        return self._begin(kind(len(self._items)))

    def _begin(self, item: I) -> list[Event]:
        events = self._items[-1].end("completed") if self._items else []
        self._items.append(item)
        return events + item.begin()
