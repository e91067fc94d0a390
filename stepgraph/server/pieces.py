"""What an answer gains, sorted."""

from __future__ import annotations

from typing import NamedTuple

from stepgraph.server.tool_calls import ToolCallDelta


class Piece(NamedTuple):
    """What an answer gains."""

    reasoning: str
    content: str
    calls: list[ToolCallDelta]
    begins_message: bool = False
    """Its reasoning or content is the first of a message by itself, in a format whose answers hold several."""


class Paragraphs:
    """Joins the messages of an answer where they become one, each a paragraph. One per answer."""

    def __init__(self) -> None:
        self._has_reasoning = self._has_content = False

    def join(self, piece: Piece) -> Piece:
        """The piece with what stands before it."""
        reasoning, content, calls, begins = piece
        if begins and reasoning and self._has_reasoning:
            reasoning = _BETWEEN + reasoning
        if begins and content and self._has_content:
            content = _BETWEEN + content
        self._has_reasoning |= bool(reasoning)
        self._has_content |= bool(content)
        return Piece(reasoning, content, calls)


_BETWEEN = "\n\n"
