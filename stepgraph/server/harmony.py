"""Answers in harmony: from messages, set apart by special tokens, to reasoning, content and tool calls."""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum, auto
from typing import NamedTuple

from stepgraph.engine.harmony import NAMESPACE, HarmonyTokens, Place
from stepgraph.server.pieces import Piece
from stepgraph.server.tool_calls import ToolCallDelta

_ROLE = "assistant"
_RECIPIENT = re.compile(r"(?<!\S)to=(\S*)")
_MAX_HEADER = 256
"""Characters of a message's header, beside the longest function's name. What is longer is none."""


class _Kind(Enum):
    """What a message's text is."""

    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class _Meaning(NamedTuple):
    """What a header says of its message."""

    kind: _Kind
    name: str | None
    """Of the function that is called."""
    rest: str
    """What it holds beside role, recipient and channel."""


class HarmonyParser:
    """Sorts one answer into reasoning, content and calls while it is written. One per answer; what it gives does not depend on
    the pieces in which the answer arrives.

    The structure is in the ids of special tokens alone: a text that spells one is text. A message of the channel `analysis` is
    reasoning, one to a function that may be called is a call, and any other is content. A message whose header is malformed is
    read as far as that can be understood; no text is lost, but for a header that the answer's end cuts off.

    Args:
        tokens: of the format.
        names: of the functions that may be called.
        prompt: behind which the answer goes on, in a message or before one.
        at_most_one: give the first call only.
        sets_reasoning_apart: else it is content.
    """

    def __init__(
        self,
        tokens: HarmonyTokens,
        names: Collection[str],
        *,
        prompt: str,
        at_most_one: bool = False,
        sets_reasoning_apart: bool = True,
    ):
        self.num_calls = 0
        """Calls that were given."""
        self._tokens = tokens
        self._names = frozenset(names)
        self._at_most_one = at_most_one
        self._sets_reasoning_apart = sets_reasoning_apart
        self._max_header = _MAX_HEADER + max(map(len, names), default=0)
        self._role = ""  # what the header holds before <|channel|>
        self._channel: str | None = None  # and behind that
        place = Place.behind(prompt)
        self._may_name_role = not place.is_in_message  # the prompt has done so for the first message
        self._kind = None if place.channel is None else self._kind_of(place.channel)  # None: in a header
        self._is_new = False  # nothing of the message was given yet
        self._needs_arguments = False
        self._gained = dict.fromkeys((_Kind.REASONING, _Kind.CONTENT), "")
        self._calls: list[ToolCallDelta] = []
        self._begins = False

    def feed(self, text: str, *, special: int | None = None, finish_reason: str | None = None) -> Piece:
        """Sort more text.

        Args:
            special: the id of the special token behind it, if there is one.
            finish_reason: why the answer ends here, if it does.
        """
        self._read(text)
        if special is not None:
            self._obey(special)
        if finish_reason is not None:
            self._end(is_cut=finish_reason != "stop")
        piece = Piece(self._gained[_Kind.REASONING], self._gained[_Kind.CONTENT], self._calls, self._begins)
        self._gained, self._calls, self._begins = dict.fromkeys(self._gained, ""), [], False
        return piece

    def _read(self, text: str) -> None:
        if self._kind is not None:
            self._give(text)
            return
        room = self._max_header - len(self._role) - len(self._channel or "")
        header, excess = text[:room], text[room:]
        if self._channel is None:
            self._role += header
        else:
            self._channel += header
        if excess:
            rest = self._meaning().rest
            self._begin(_Meaning(_Kind.CONTENT, None, rest))
            self._give(rest + excess)

    def _obey(self, special: int) -> None:
        tokens = self._tokens
        if special == tokens.start:
            self._end(is_cut=False)
        elif special == tokens.channel:
            if self._kind is not None or self._channel is not None:
                self._end(is_cut=False)
            self._keep_text_before()
            self._channel = ""
        elif special == tokens.constrain and self._kind is None:
            self._read(" ")
        elif special == tokens.message and self._kind is None:
            self._keep_text_before()
            self._begin(self._meaning())
        elif special in (tokens.end, tokens.return_, tokens.call):
            self._end(is_cut=False)

    def _end(self, *, is_cut: bool) -> None:
        """The message, or the header, ends."""
        if self._kind is None:
            self._give_up_header(is_cut=is_cut)
        if self._kind is _Kind.CALL and self._needs_arguments and not is_cut:
            self._give("{}")
        self._kind = self._channel = None
        self._role, self._may_name_role = "", True

    def _keep_text_before(self) -> None:
        """What was read of a header holds more than a role and a recipient: a text that nothing announced."""
        if self._channel is None and len((rest := self._meaning().rest).split()) > 1:
            self._begin(_Meaning(_Kind.CONTENT, None, ""))
            self._give(rest)
            self._kind, self._role = None, ""

    def _give_up_header(self, *, is_cut: bool) -> None:
        """What was read is no header: it is the text of a message, as far as it is no part of one."""
        meaning = self._meaning()
        rest = meaning.rest
        if meaning.kind is _Kind.CALL:
            rest = rest[rest.find("{") :] if "{" in rest else ""
        elif self._channel is not None:
            rest = rest if len(rest.split()) > 1 else ""  # one word is the type of a text
        elif is_cut and any(word.startswith(rest.strip()) for word in ("to=", _ROLE if self._may_name_role else "")):
            rest = ""
        if rest.strip():
            self._begin(meaning)
            self._give(rest)

    def _meaning(self) -> _Meaning:
        """Of the header by now."""
        role, channel = self._role, self._channel or ""
        if self._may_name_role:
            role = re.sub(rf"^\s*{_ROLE}\b", "", role)
        recipients = _RECIPIENT.findall(f"{role} {channel}")
        role, channel = _RECIPIENT.sub("", role), _RECIPIENT.sub("", channel)
        name, _, rest = channel.lstrip().partition(" ")
        function = next((found for to in recipients if (found := self._function_of(to)) is not None), None)
        kind = self._kind_of(name) if function is None else _Kind.CALL
        return _Meaning(kind, function, rest if self._channel is not None and not role.strip() else role + rest)

    def _kind_of(self, channel: str) -> _Kind:
        return _Kind.REASONING if channel == "analysis" and self._sets_reasoning_apart else _Kind.CONTENT

    def _function_of(self, recipient: str) -> str | None:
        return next((name for name in (recipient.removeprefix(NAMESPACE), recipient) if name in self._names), None)

    def _begin(self, meaning: _Meaning) -> None:
        """A message's text begins."""
        self._kind, self._is_new = meaning.kind, True
        if meaning.name is not None:
            self._needs_arguments = True
            self.num_calls += 1
            self._tell(ToolCallDelta(self.num_calls - 1, meaning.name, ""))

    def _give(self, text: str) -> None:
        """More of the message's text."""
        assert self._kind is not None
        if not text:
            return
        if self._kind is _Kind.CALL:
            self._needs_arguments &= text.isspace()
            self._tell(ToolCallDelta(self.num_calls - 1, None, text))
            return
        self._gained[self._kind] += text
        self._begins |= self._is_new
        self._is_new = False

    def _tell(self, gained: ToolCallDelta) -> None:
        """A call is new, or gains arguments: in one piece, that is one delta."""
        if self._at_most_one and gained.index:
            return
        if self._calls and self._calls[-1].index == gained.index:
            before = self._calls.pop()
            gained = ToolCallDelta(before.index, before.name, before.arguments + gained.arguments)
        self._calls.append(gained)
