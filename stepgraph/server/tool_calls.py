"""Calls of tools: finding them in an answer while it is written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from stepgraph.server.bare_arguments import BareArguments
from stepgraph.server.tagged_arguments import TaggedArguments
from stepgraph.server.tool_formats import FUNCTION, MARKS, ToolCallFormat

_T = TypeVar("_T")
_Reading: TypeAlias = Generator[None, str, _T]
"""A coroutine that is sent the characters of an answer, and returns what it read."""

_END = "END"
"""Sent after the last character. No character equals it."""
_ARGUMENTS = frozenset({"arguments", "parameters"})
"""Keys of a call's arguments."""
_BEFORE_NAME = frozenset({"type", "id"})
"""Further keys that models put before a call's name. Others show that an object is no call, and need not be held back."""
_SCALAR = frozenset("+-.0123456789eEtrufalsn")
"""Characters of JSON's numbers, true, false and null."""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What one of an answer's calls has gained."""

    index: int
    name: str | None
    """With the first delta of a call, else None."""
    arguments: str
    """More of the arguments' JSON text, as the model wrote it."""


class _NoCallError(Exception):
    """The text does not go on as a call does."""


@dataclass(slots=True)
class _Call:
    """The call that is being read."""

    name: str | None = None
    """Once it is announced."""
    is_told: bool = False
    """A delta had the name."""
    has_arguments: bool = False
    untold_arguments: list[str] = field(default_factory=list)


class _CallReader:
    """Reads an answer one character at a time, in a coroutine that waits for the next character wherever it needs one. So what
    it finds cannot depend on the pieces in which the answer arrives.

    What was read is held until it is known to be content or part of a call. A call is announced with its name; what breaks off
    before that is content, and so is what follows an announced call and is no part of one. The rest of a text that was no call is
    not searched again for calls inside it, which keeps the time proportional to the length.

    Whitespace between calls, before the first and after the last is left out. What stands between a call and content that
    follows it stays, so that the texts around a call do not run together.
    """

    def __init__(
        self,
        format: ToolCallFormat | None,
        names: Collection[str] | None,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """`names`: of the functions that may be called; None: any. `parameters`: their schemas, by their names."""
        self._format = format
        self._parameters = parameters or {}
        self._marks = MARKS[format]
        self._names = None if names is None else frozenset(names)
        self._character: str | None = None  # the next one, if it is there
        self._held: list[str] = []
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._call = _Call()
        self._num_calls = 0
        self._has_call = False  # since the last mark before calls
        self._is_after_call = False  # no content came since the last call
        self._is_cut = False  # the end came before the model's
        self._reading = self._answer()
        next(self._reading)

    @property
    def num_calls(self) -> int:
        """Calls that were announced."""
        return self._num_calls

    def feed(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Take in more of the answer. Returns the content that is certain by now, and what calls have gained, in at most one
        delta each. Raises nothing, whatever the text.
        """
        for character in text:
            self._reading.send(character)
        self._tell()
        content, deltas = "".join(self._content), self._deltas
        self._content, self._deltas = [], []
        return content, deltas

    def finish(self, *, cut: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """The answer has ended. Returns the rest as `feed` does: a call that was announced stays as far as it came, and what was
        held back of one that was not is content.

        Args:
            cut: the model would have written more. What was held back is then the beginning of a call, and left out.
        """
        self._is_cut = cut
        with contextlib.suppress(StopIteration):
            self._reading.send(_END)
        return self.feed("")

    def _answer(self) -> _Reading[None]:
        """Read the whole answer."""
        raise NotImplementedError

    # What becomes of the characters

    def _next(self) -> _Reading[str]:
        """The next character, which remains to be read, or _END."""
        if self._character is None:
            self._character = yield
        return self._character

    def _next_sign(self) -> _Reading[str]:
        """As `_next`, past whitespace."""
        while (character := (yield from self._next())).isspace():
            self._hold()
        return character

    def _hold(self) -> None:
        """Read the next character."""
        assert self._character not in (None, _END), self._character
        self._held.append(self._character)
        self._character = None

    def _give(self) -> None:
        """What is held is content; but whitespace at its end stays held, since a call may follow."""
        end = len(self._held)
        while end and self._held[end - 1].isspace():
            end -= 1
        if end:
            self._content += self._held[:end]
            del self._held[:end]
            self._is_after_call = False

    def _give_unless_cut(self) -> None:
        """What is held is no call: content, unless it only was not one yet when the answer was cut off."""
        if self._is_cut and self._character == _END:
            self._held.clear()
        else:
            self._give()

    def _announce(self, name: str) -> None:
        if self._names is not None and name not in self._names:
            raise _NoCallError
        self._call.name = name
        self._num_calls += 1
        self._has_call = self._is_after_call = True
        self._held.clear()

    def _argue(self, text: str) -> None:
        """What was just read is part of the call's arguments."""
        self._call.has_arguments = True
        self._call.untold_arguments.append(text)
        if self._call.name is not None:
            self._held.clear()

    def _tell(self) -> None:
        """Make a delta of what the call has gained."""
        call = self._call
        if call.name is None or (call.is_told and not call.untold_arguments):
            return
        name = None if call.is_told else call.name
        self._deltas.append(ToolCallDelta(self._num_calls - 1, name, "".join(call.untold_arguments)))
        call.is_told = True
        call.untold_arguments.clear()

    # The parts of an answer

    def _text(self) -> _Reading[None]:
        """Read content, and calls after marks, up to the answer's end."""
        while (character := (yield from self._next())) != _END:
            if not self._marks or character != self._marks[0][0]:
                self._hold()
                if not character.isspace():
                    self._give()
                continue
            begin, end, function = self._marks[:1], self._marks[1:2], self._marks[2:]
            mark = yield from self._word(begin + function + (end if self._has_call else ()))
            if mark in begin:
                yield from self._calls()
            elif mark in function:
                self._has_call = False
                yield from self._is_call(self._rest_of_function())
            elif mark:
                self._held.clear()
                self._has_call, self._is_after_call = False, True
            else:  # what was read hides no mark, since it has the first character of one only once
                self._give_unless_cut()
        if not self._is_after_call:
            self._content += self._held

    def _word(self, words: Collection[str]) -> _Reading[str]:
        """Read one of several words, none of which begins another. Returns it, or "" if there is none; some characters may have
        been read then.
        """
        text = ""
        while text not in words:
            longer = text + (yield from self._next())
            if not any(word.startswith(longer) for word in words):
                return ""
            text = longer
            self._hold()
        return text

    def _calls(self) -> _Reading[None]:
        """Read calls, by themselves or in a list, up to what is none."""
        self._has_call = in_list = False
        while True:
            sign = yield from self._next_sign()
            if sign == "{":
                call = self._object()
            elif sign == "<" and self._format is ToolCallFormat.QWEN3_CODER and not self._has_call:
                call = self._function()
            elif sign == "[" and not in_list and not self._has_call:
                in_list = True
                self._hold()
                continue
            elif sign in (",", ";") and self._has_call:
                self._hold()
                continue
            elif sign == "]" and in_list and self._has_call:
                self._hold()
                self._held.clear()
                break
            elif self._format is ToolCallFormat.MISTRAL:
                call = self._named_arguments()
            elif self._format is ToolCallFormat.GEMMA4 and sign == "c":
                call = self._bare_call()
            else:
                break
            if not (yield from self._is_call(call)):
                break
        if not self._has_call:
            self._give_unless_cut()

    def _is_call(self, call: _Reading[None]) -> _Reading[bool]:
        """Read what may be a call. Returns whether it is one to its last character."""
        try:
            yield from call
            if not self._call.has_arguments:
                self._argue("{}")
            self._held.clear()
            return True
        except _NoCallError:
            if self._call.name is not None and self._character == _END:
                self._held.clear()
            self._give_unless_cut()
            return False
        finally:
            self._tell()
            self._call = _Call()

    def _object(self) -> _Reading[None]:
        """Read `{"name": ..., "arguments": ...}`."""
        yield from self._sign("{")
        sign = ","
        while sign == ",":
            key = yield from self._string()
            yield from self._sign(":")
            if key == "name" and self._call.name is None:
                self._announce((yield from self._string()))
            elif key in _ARGUMENTS and not self._call.has_arguments:
                yield from self._value(self._argue)
            elif key in _BEFORE_NAME or self._call.name is not None:
                yield from self._value(_ignore)
            else:
                raise _NoCallError
            sign = yield from self._sign(",}")
        if self._call.name is None:
            raise _NoCallError

    def _named_arguments(self) -> _Reading[None]:
        """Read `name[ARGS]{...}`."""
        beginnings = {name + mark: (name, mark) for name in self._names or () for mark in ("[ARGS]", "[CALL_ID]")}
        beginning = yield from self._word(beginnings)
        if not beginning:
            raise _NoCallError
        name, mark = beginnings[beginning]
        self._announce(name)
        if mark == "[CALL_ID]":
            while (yield from self._next()) not in ("[", _END):
                self._hold()
            if not (yield from self._word(("[ARGS]",))):
                raise _NoCallError
        yield from self._value(self._argue)

    def _function(self) -> _Reading[None]:
        """Read `<function=name>...</function>`."""
        if not (yield from self._word((FUNCTION,))):
            raise _NoCallError
        yield from self._rest_of_function()

    def _rest_of_function(self) -> _Reading[None]:
        name = yield from self._name_before(">")
        self._hold()
        self._announce(name)
        yield from self._converted(TaggedArguments(self._parameters.get(name, {})))

    def _bare_call(self) -> _Reading[None]:
        """Read `call:name{...}`."""
        if not (yield from self._word(("call:",))):
            raise _NoCallError
        self._announce((yield from self._name_before("{")))
        yield from self._converted(BareArguments())

    def _name_before(self, end: str) -> _Reading[str]:
        """Read a function's name, up to a sign that follows it."""
        name = ""
        while (character := (yield from self._next())) != end:
            if character == _END:
                raise _NoCallError
            name += character
            self._hold()
        return name.strip()

    def _converted(self, arguments: TaggedArguments | BareArguments) -> _Reading[None]:
        """Read arguments that are no JSON."""
        while not arguments.is_complete:
            is_cut = (character := (yield from self._next())) == _END
            if text := arguments.cut_off() if is_cut else arguments.feed(character):
                self._argue(text)
            if is_cut:
                raise _NoCallError
            self._hold()

    # JSON, read only as closely as finding its ends takes: whether arguments are valid is for the client to check.

    def _sign(self, signs: str) -> _Reading[str]:
        """Read one of several signs and return it."""
        sign = yield from self._next_sign()
        if sign not in signs:
            raise _NoCallError
        self._hold()
        return sign

    def _value(self, write: Callable[[str], None]) -> _Reading[None]:
        """Read a value and write its text; of a string, what it holds; of null, nothing."""
        sign = yield from self._next_sign()
        if sign in "{[":
            yield from self._container(write)
        elif sign == '"':
            yield from self._characters(write)
        else:
            yield from self._scalar(write)

    def _container(self, write: Callable[[str], None]) -> _Reading[None]:
        """Read an object or an array and write its text."""
        depth = 0
        in_string = is_escaped = False
        while True:
            character = yield from self._next()
            if character == _END or (character == "<" and not in_string):
                raise _NoCallError  # no JSON has "<" outside of strings; a mark begins there
            self._hold()
            write(character)
            if is_escaped:
                is_escaped = False
            elif character == '"':
                in_string = not in_string
            elif in_string:
                is_escaped = character == "\\"
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
                if depth == 0:
                    return

    def _string(self) -> _Reading[str]:
        """Read a string and return what it holds."""
        if (yield from self._next_sign()) != '"':
            raise _NoCallError
        held: list[str] = []
        yield from self._characters(held.append)
        return "".join(held)

    def _characters(self, write: Callable[[str], None]) -> _Reading[None]:
        """Read a string and write what it holds."""
        yield from self._sign('"')
        while (character := (yield from self._next())) != '"':
            if character == _END:
                raise _NoCallError
            self._hold()
            if character == "\\":
                character = yield from self._escaped()
            write(character)
        self._hold()

    def _escaped(self) -> _Reading[str]:
        """Read the rest of an escape and return what it stands for.

        Half of a surrogate pair stays as it is written: it is no character by itself, and in the arguments' text the escape means
        the same. So does what is no escape.
        """
        escape = "\\"
        while len(escape) < (6 if escape.startswith("\\u") else 2):
            character = yield from self._next()
            if character == _END:
                raise _NoCallError
            self._hold()
            escape += character
        try:
            text: str = json.loads(f'"{escape}"')
        except ValueError:
            return escape
        return escape if "\ud800" <= text <= "\udfff" else text

    def _scalar(self, write: Callable[[str], None]) -> _Reading[None]:
        """Read a number, true, false or null and write its text."""
        text = ""
        while (character := (yield from self._next())) in _SCALAR:
            text += character
            self._hold()
        try:
            value = json.loads(text)
        except ValueError as error:
            raise _NoCallError from error
        if value is not None:
            write(text)


class ToolCallParser(_CallReader):
    """Finds the calls in an answer of a model that was offered tools. One per answer.

    Args:
        format: how the model writes calls.
        names: of the functions that it was offered. What calls another one is content.
        parameters: the schemas of their arguments by their names, for formats that write values as text.
    """

    def __init__(
        self,
        format: ToolCallFormat,
        names: Collection[str],
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__(format, names, parameters)

    def _answer(self) -> _Reading[None]:
        if self._format is ToolCallFormat.LLAMA:
            yield from self._calls()
        yield from self._text()


class ForcedCallParser(_CallReader):
    """Turns an answer that was forced into the form of `forced_call_schema` into calls. One per answer.

    Args:
        name: the function whose arguments the whole answer is; None: the answer is an array of calls.
    """

    def __init__(self, name: str | None):
        self._name = name
        super().__init__(None, None)

    def feed(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """As of any answer; there is no content in one that was forced, and what is no call is one that was cut off."""
        _, deltas = super().feed(text)
        return "", deltas

    def _answer(self) -> _Reading[None]:
        if self._name is None:
            yield from self._calls()
        elif (yield from self._next_sign()) != _END:
            yield from self._is_call(self._arguments_of(self._name))
        yield from self._text()

    def _arguments_of(self, name: str) -> _Reading[None]:
        self._announce(name)
        yield from self._value(self._argue)


def _ignore(text: str) -> None:
    """Write nothing."""
