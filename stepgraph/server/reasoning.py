"""Setting what a model thinks apart from what it answers."""

from __future__ import annotations

from enum import Enum, auto

_BEGIN = "<think>"
_END = "</think>"


class _Place(Enum):
    """Where in an answer the next characters stand."""

    START = auto()
    REASONING = auto()
    AFTER_REASONING = auto()
    CONTENT = auto()


class ReasoningParser:
    """Splits an answer `<think>reasoning</think>content` while it is written. One per answer; what it gives does not depend on
    the pieces in which the answer arrives.

    `<think>` counts only as the first text of the answer, and the first `</think>` after it ends the reasoning for good. An
    answer that ends before that is all reasoning. Whitespace around the reasoning and before the content is left out. An answer
    without reasoning is content as it stands.
    """

    def __init__(self, *, starts_inside: bool):
        """`starts_inside`: the prompt ended with `<think>`. An answer may repeat it."""
        self._starts_inside = starts_inside
        self._place = _Place.START
        self._has_reasoning = False
        self._held = ""  # of which it is open what it is

    def feed(self, text: str) -> tuple[str, str]:
        """Take in more of the answer. Returns the reasoning and the content that are certain by now."""
        reasoning = content = ""
        self._held += text
        if self._place is _Place.START:
            self._start()
        if self._place is _Place.REASONING:
            reasoning = self._reasoning()
        if self._place is _Place.AFTER_REASONING:
            self._held = self._held.lstrip()
            if self._held:
                self._place = _Place.CONTENT
        if self._place is _Place.CONTENT:
            content, self._held = self._held, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """The answer has ended. Returns the rest as `feed` does."""
        rest, self._held = self._held, ""
        if self._place is _Place.REASONING or (self._place is _Place.START and self._starts_inside):
            return (rest if self._has_reasoning else rest.lstrip()).rstrip(), ""
        return "", rest

    def _start(self) -> None:
        first = self._held.lstrip()
        if first.startswith(_BEGIN):
            self._held = first.removeprefix(_BEGIN)
            self._place = _Place.REASONING
        elif not _BEGIN.startswith(first):
            self._place = _Place.REASONING if self._starts_inside else _Place.CONTENT

    def _reasoning(self) -> str:
        """What is held, up to `</think>` or what may become it, and up to whitespace that may stand before that."""
        before, end, after = self._held.partition(_END)
        if not end:
            beginnings = (_END[:n] for n in range(1, len(_END)))
            before = before.removesuffix(next((tag for tag in beginnings if before.endswith(tag)), ""))
        reasoning = before.rstrip()
        if end:
            self._held = after
            self._place = _Place.AFTER_REASONING
        else:
            self._held = self._held[len(reasoning) :]
        if reasoning and not self._has_reasoning:
            self._has_reasoning = True
            reasoning = reasoning.lstrip()
        return reasoning


def thinks(chat_template: str | None) -> bool:
    """Whether a chat template has `<think>` tags, as those of models that think before they answer do."""
    return chat_template is not None and (_BEGIN in chat_template or _END in chat_template)


def starts_inside(prompt: str) -> bool:
    """Whether a rendered prompt ends with `<think>`, so that the answer begins with reasoning.

    One that stands earlier does not count: it may be part of what a user wrote.
    """
    return prompt.rstrip().endswith(_BEGIN)
