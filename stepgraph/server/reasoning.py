"""Setting what a model thinks apart from what it answers."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


class Tags(NamedTuple):
    """What stands before reasoning and behind it."""

    begin: str
    end: str


THINK = Tags("<think>", "</think>")
GEMMA4 = Tags("<|channel>thought", "<channel|>")
"""Special tokens, which the text must not leave out."""


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

    def __init__(self, *, starts_inside: bool, tags: Tags = THINK):
        """`starts_inside`: the prompt ended with `<think>`. An answer may repeat it. `tags`: other ones in place of these."""
        self._begin, self._end = tags
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
        if first.startswith(self._begin):
            self._held = first.removeprefix(self._begin)
            self._place = _Place.REASONING
        elif not self._begin.startswith(first):
            self._place = _Place.REASONING if self._starts_inside else _Place.CONTENT

    def _reasoning(self) -> str:
        """What is held, up to `</think>` or what may become it, and up to whitespace that may stand before that."""
        before, end, after = self._held.partition(self._end)
        if not end:
            beginnings = (self._end[:n] for n in range(1, len(self._end)))
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


def tags_of(chat_template: str | None) -> Tags | None:
    """The tags that a chat template has, as those of models that think before they answer do."""
    template = chat_template or ""
    if GEMMA4.end in template and "<|channel>" in template:
        return GEMMA4
    return THINK if THINK.begin in template or THINK.end in template else None


def starts_inside(prompt: str, tags: Tags = THINK) -> bool:
    """Whether a rendered prompt ends with the tag before reasoning, so that the answer begins with it.

    One that stands earlier does not count: it may be part of what a user wrote.
    """
    return prompt.rstrip().endswith(tags.begin)
