"""Regular expressions, grammars and choices of guided generation, held against the limits and rewritten for xgrammar.

Nothing in xgrammar bounds the time of a compilation, and a running one cannot be stopped. What makes it slow is bounded instead:
length of the text, depth, number of repetitions, and how far repetitions multiply when nested.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from stepgraph.errors import RequestError

MAX_TEXT_BYTES = 64 * 1024
"""Of a schema, regular expression or grammar, and of all choices together, in UTF-8."""
MAX_CHOICES = 4096
MAX_DEPTH = 64
"""Levels of a schema or JSON value, of groups in a regular expression, of brackets in a grammar."""
MAX_REPETITIONS = 256
"""`?`, `*`, `+` and `{m,n}` in a request's grammar or in all its patterns."""
MAX_OPTIONAL = 32
"""Of those, the ones with two different finite bounds (`?`, `{2,5}`), and different lengths of strings in a schema. Each may
take a second to compile, and many in a row far more."""
MAX_COUNT = 100_000
"""Largest bound of a repetition or of a string's length."""
MAX_NESTED_COUNT = 1000
"""Product of the bounds of repetitions inside each other; an unbounded one inside counts as 30. The time of a *token* grows with
it: a text of a's can be cut into `(a{1,100}){1,100}` in very many ways, and all are followed."""

_UNBOUNDED_INSIDE = 30


def check_length(text: str, name: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise RequestError(
            f"structured_outputs.{name} has {size} bytes; at most {MAX_TEXT_BYTES} are allowed. Make it shorter"
        )


def grammar_of_choices(choices: Sequence[str]) -> str:
    if len(choices) > MAX_CHOICES:
        raise RequestError(f"structured_outputs.choice has {len(choices)} texts; at most {MAX_CHOICES} are allowed")
    check_length("".join(choices), "choice")
    try:
        return "root ::= " + " | ".join(f'"{"".join(map(_ebnf_character, choice))}"' for choice in choices)
    except ValueError as error:
        raise RequestError(f"structured_outputs.choice: {error}") from error


def _ebnf_character(character: str) -> str:
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF or code == 0:
        raise ValueError(f"U+{code:04X} cannot be part of an answer; remove it")
    return character if character.isascii() and character.isalnum() else f"\\U{code:08X}"


class Repetitions:
    """Counts the repetitions of a request's patterns or grammar against the limits. `where` names it in errors."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._count = self._num_optional = 0
        self._groups = [1]  # most repetitions multiplied inside each open group
        self._last = 1  # likewise inside the last element

    def element(self) -> None:
        """A character, class, literal or rule name."""
        self._last = 1

    def open(self) -> None:
        """A group begins."""
        self._groups.append(1)
        if len(self._groups) > MAX_DEPTH:
            raise RequestError(f"{self.where} has groups nested more than {MAX_DEPTH} deep; nest fewer")

    def close(self) -> None:
        """A group ends; one that never began is left to xgrammar to refuse."""
        self._last = self._groups.pop() if len(self._groups) > 1 else 1

    def repeat(self, low: int, high: int | None) -> None:
        """The last element is repeated `low` to `high` times, None is without end."""
        if max(low, high or 0) > MAX_COUNT:
            raise RequestError(f"{self.where} repeats {max(low, high or 0)} times; at most {MAX_COUNT} are allowed")
        nested = max(self._last, _UNBOUNDED_INSIDE) if high is None else self._last * high
        if self._last > 1 and nested > MAX_NESTED_COUNT:
            raise RequestError(
                f"{self.where} nests repetitions whose bounds multiply to {nested}, an unbounded one inside counted as "
                f"{_UNBOUNDED_INSIDE}; at most {MAX_NESTED_COUNT} are allowed. Lower a bound, or leave the outer one unbounded"
            )
        self._last = nested
        self._groups[-1] = max(self._groups[-1], nested)
        self._count += 1
        if self._count > MAX_REPETITIONS:
            raise RequestError(f"{self.where} has more than {MAX_REPETITIONS} repetitions; use fewer")
        if high is not None and low != high:
            self.optional()

    def optional(self) -> None:
        """Something of which there may be more or fewer, up to a bound."""
        self._num_optional += 1
        if self._num_optional > MAX_OPTIONAL:
            raise RequestError(
                f"{self.where} has more than {MAX_OPTIONAL} repetitions or lengths with an upper bound; use fewer"
            )


_QUANTIFIER = re.compile(r"[?*+]|\{(\d+)(,?)(\d*)\}")


def _quantifier(text: str, at: int, repetitions: Repetitions) -> int:
    """Take in the quantifier at a place of a regular expression or grammar; returns its length."""
    match = _QUANTIFIER.match(text, at)
    if match is None:
        raise RequestError(
            f"{repetitions.where}: {text[at : at + 8]!r} at {at} is no repetition: write {{2}}, {{2,5}} or {{2,}}"
        )
    if match[1] is None:
        low, high = {"?": (0, 1), "*": (0, None), "+": (1, None)}[match[0]]
    else:
        low = int(match[1][:9])
        high = (int(match[3][:9]) if match[3] else None) if match[2] else low
    repetitions.repeat(low, high)
    return len(match[0])


_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|([dDwWsS])|([nrtfv0])|([^a-zA-Z0-9]))"
)
_CLASS_MEMBER = re.compile(_ESCAPE.pattern + r"|[^\\\]]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?:|\?<[a-zA-Z_]\w*>|(?!\?))")

_Ranges = list[tuple[int, int]]
"""A set of characters: code points, first and last of each range."""
_CHARACTERS: _Ranges = [(1, 0xD7FF), (0xE000, 0x10FFFF)]
JSON_CHARACTERS: _Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF)]
"""What a JSON string holds as it is."""
_LINE_BREAKS: _Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_SETS: dict[str, _Ranges] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20)],
}


def _without(ranges: _Ranges, removed: _Ranges) -> _Ranges:
    for first, last in removed:
        ranges = [
            part
            for low, high in ranges
            for part in ((low, min(high, first - 1)), (max(low, last + 1), high))
            if part[0] <= part[1]
        ]
    return ranges


def character_class(ranges: _Ranges) -> str:
    """A character class for xgrammar, without negation: its negated classes let through bytes that are not UTF-8."""

    def write(code: int) -> str:
        return (
            f"\\x{code:02x}"
            if code < 0x20 or code == 0x7F
            else f"\\{chr(code)}"
            if chr(code) in "\\[]^-"
            else chr(code)
        )

    return "[" + "".join(write(low) + (f"-{write(high)}" if high > low else "") for low, high in ranges) + "]"


class Regex:
    """A regular expression in the syntax of ECMAScript, rewritten so that xgrammar reads it as meant; `rewritten` is the result.

    The whole answer (or JSON string) has to match. \\d, \\w and \\s are ASCII; U+0000 and halves of characters match nothing.
    `in_json`: it is a string's pattern in a schema, which xgrammar holds against the string as it is written, so that what JSON
    escapes matches nothing; where nothing else could match, it is refused.
    """

    def __init__(self, text: str, where: str, repetitions: Repetitions, *, in_json: bool = False) -> None:
        self._text, self._where, self._repetitions = text, where, repetitions
        self._alphabet = JSON_CHARACTERS if in_json else _CHARACTERS
        pieces = []
        at = 0
        while at < len(text):
            piece, length = self._piece(at)
            pieces.append(piece)
            at += length
        self.rewritten = "".join(pieces)

    def _refuse(self, at: int, length: int, why: str) -> RequestError:
        return RequestError(f"{self._where}: {self._text[at : at + length]!r} at {at} {why}")

    def _piece(self, at: int) -> tuple[str, int]:
        """What the text at a place becomes, and how much of the text it is."""
        text, character = self._text, self._text[at]
        if character == "(":
            group = _GROUP.match(text, at)
            if group is None:
                raise self._refuse(at, 4, "is a group that is not known; use ( ) or (?: )")
            self._repetitions.open()
            return "(", len(group[0])
        if character == ")":
            self._repetitions.close()
            return ")", 1
        if character in "?*+{":
            length = _quantifier(text, at, self._repetitions)
            # A `?` behind it asks for as few as possible, with which the same texts match.
            return text[at : at + length], length + text.startswith("?", at + length)
        if character == "|" or (character == "^" and at == 0) or (character == "$" and at + 1 == len(text)):
            return character, 1
        if character in "^$":
            raise self._refuse(
                at, 1, "may only stand at the very start (^) or end ($), as the whole text has to match; remove it"
            )
        self._repetitions.element()
        if character == ".":
            return character_class(_without(self._alphabet, _LINE_BREAKS)), 1
        if character == "[":
            return self._class_at(at)
        if character == "\\":
            match = self._member(_ESCAPE, at)
            return self._written(self._set(match, at), at, len(match[0])), len(match[0])
        return self._written([(ord(character), ord(character))], at, 1), 1

    def _member(self, pattern: re.Pattern[str], at: int) -> re.Match[str]:
        match = pattern.match(self._text, at)
        if match is None:
            raise self._refuse(at, 2, "is an escape that is not known; write the character itself")
        return match

    def _set(self, match: re.Match[str], at: int) -> _Ranges:
        """The characters that an escape, or one of a class, stands for."""
        *codes, letter, control, _ = match.groups()
        if letter:
            return _SETS[letter] if letter in _SETS else _without(_CHARACTERS, _SETS[letter.lower()])
        code = next((int(c, 16) for c in codes if c), -1)
        if code < 0:
            code = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}[control] if control else ord(match[0][-1])
        if code > 0x10FFFF:
            raise self._refuse(at, len(match[0]), "is no character; the last one is \\u{10ffff}")
        return [(code, code)]

    def _written(self, ranges: _Ranges, at: int, length: int) -> str:
        ranges = _without(self._alphabet, _without(self._alphabet, ranges))
        if not ranges:
            raise self._refuse(
                at, length, "matches nothing that an answer can hold here as it is, without an escape; leave it out"
            )
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            character = chr(ranges[0][0])
            return (
                f"\\{character}"
                if character in "\\^$.|?*+()[]{}"
                else character
                if character >= " "
                else character_class(ranges)
            )
        return character_class(ranges)

    def _class_at(self, at: int) -> tuple[str, int]:
        text = self._text
        negated = text.startswith("^", at + 1)
        start = end = at + 1 + negated
        ranges: _Ranges = []
        while end < len(text) and text[end] != "]":
            member = self._member(_CLASS_MEMBER, end)
            first = self._set(member, end)
            end = member.end()
            if text.startswith("-", end) and not text.startswith("-]", end) and end + 1 < len(text):
                member = self._member(_CLASS_MEMBER, end + 1)
                last = self._set(member, end + 1)
                if len(first) > 1 or len(last) > 1 or first[0][0] > last[0][0]:
                    raise self._refuse(
                        at, member.end() - at, "ends in a range whose first character comes after its last"
                    )
                first = [(first[0][0], last[0][0])]
                end = member.end()
            ranges += first
        if end == start or end == len(text):
            raise self._refuse(
                at, end - at, "is a class without a member or without an end; write \\] for a bracket in it"
            )
        length = end + 1 - at
        return self._written(_without(_CHARACTERS, ranges) if negated else ranges, at, length), length


_GRAMMAR_PIECE = re.compile(r'"(?:[^"\\\n]|\\.)*"|\[(?:[^\]\\\n]|\\.)*\]|\#[^\n]*|\(=|[(){?*+]|[\w.-]+|.', re.DOTALL)


def check_grammar(text: str) -> None:
    """Hold an EBNF grammar against the limits; whether it is well formed is left to xgrammar."""
    check_length(text, "grammar")
    repetitions = Repetitions("structured_outputs.grammar")
    at = 0
    while match := _GRAMMAR_PIECE.match(text, at):
        piece = match[0]
        if piece == "(=":
            raise RequestError(
                "structured_outputs.grammar: lookahead `(= )` rules out nothing here; write what follows as a rule"
            )
        if piece == "(":
            repetitions.open()
        elif piece == ")":
            repetitions.close()
        elif piece in "?*+{":
            at += _quantifier(text, at, repetitions)
            continue
        elif not piece.isspace() and piece[0] != "#":
            repetitions.element()
        at = match.end()
