"""Regular expressions, grammars and choices of guided generation, held against the limits and rewritten for xgrammar.

Nothing in xgrammar bounds the time of a compilation, and a running one cannot be stopped. What makes it slow is bounded instead:
length of the text, depth, number of repetitions, how far repetitions multiply when nested, and an estimate of the states in which
all tokens have to be tried.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stepgraph.engine import guided_repeats
from stepgraph.errors import RequestError

MAX_TEXT_BYTES = 64 * 1024
"""Of a schema, regular expression, grammar or structural tag, and of all choices together, in UTF-8."""
MAX_CHOICES = 4096
MAX_DEPTH = 64
"""Levels of a schema or JSON value, of groups in a regular expression, of brackets in a grammar,
of formats in a structural tag."""
MAX_REPETITIONS = 128
"""`?`, `*`, `+` and `{m,n}` in a request's grammar or in all its patterns. Time grows with the third power of those in a row."""
MAX_OPTIONAL = 32
"""Of those, the ones with two different finite bounds (`?`, `{2,5}`), and different lengths of strings in a schema. Many in
a row make tokens slow."""
MAX_COUNT = 100_000
"""Largest bound of a repetition or of a string's length."""
MAX_NESTED_COUNT = 1000
"""Product of the bounds of repetitions inside each other; an unbounded one inside counts as 30. The time of a *token* grows with
it: a text of a's can be cut into `(a{1,100}){1,100}` in very many ways, and all are followed."""

MAX_STATES = 16_000
"""Of a request's automaton, by estimate, in which every token of the vocabulary has to be tried: one for each class of ASCII
characters, `_WIDE` for others, times what they are repeated. Each takes 3 to 4 ms of CPU time if there are 150,000 tokens."""

UNBOUNDED_INSIDE = 30
"""What a repetition without end, or anything as long as that, counts inside another."""
_WIDE = 5
_COUNTED = 128
"""Repetitions up to which xgrammar makes states of them."""
_COUNTED_OPTIONAL = 400
"""Likewise where there may be more or fewer; twice their bound below that."""


def check_text(text: str, where: str) -> None:
    """RequestError if a text is longer than MAX_TEXT_BYTES or cannot be written in UTF-8; `where` names it."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} holds U+{ord(text[error.start]):04X}, which is half of a character; remove it", param=where
        ) from error
    if size > MAX_TEXT_BYTES:
        raise RequestError(
            f"{where} has {size} bytes; at most {MAX_TEXT_BYTES} are allowed. Make it shorter", param=where
        )


def grammar_of_choices(choices: Sequence[str]) -> str:
    """A grammar that allows these texts. RequestError if they are over a limit, or hold what no answer can."""
    if len(choices) > MAX_CHOICES:
        raise RequestError(
            f"structured_outputs.choice has {len(choices)} texts; at most {MAX_CHOICES} are allowed",
            param="structured_outputs.choice",
        )
    for choice in choices:
        check_answer(choice, "structured_outputs.choice")
    check_text("".join(choices), "structured_outputs.choice")
    return "root ::= " + " | ".join(f'"{"".join(map(_ebnf_character, choice))}"' for choice in choices)


def check_answer(text: str, where: str) -> None:
    """RequestError if a text cannot be part of an answer."""
    if "\0" in text:
        raise RequestError(f"{where} holds U+0000, which cannot be part of an answer; remove it", param=where)


def _ebnf_character(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"\\U{ord(character):08X}"


@dataclass
class _Group:
    """An open group of a pattern or grammar."""

    size: int = 0  # elements
    most_repeats: int = 1  # of repetitions multiplied


class Limits:
    """Counts what a request's patterns, schemas or grammar need against the limits.

    Attributes:
        param: the field that is being read.
        patterns: of schemas, rewritten. xgrammar compiles equal ones once, so that they count once.
        lengths: bounds of texts in schemas, for the same reason.
    """

    def __init__(self, param: str) -> None:
        self.param = param
        self._place = ""
        self.patterns: dict[str, str] = {}
        self.lengths: set[tuple[int, int | None]] = set()
        self._num_repetitions = self._num_optional = self._num_states = 0
        self._groups = [_Group()]
        self._last_repeats = 1  # most repetitions multiplied inside the last element
        self._last_states = 0  # of the last element, where a repetition copies them

    @property
    def where(self) -> str:
        """What is being read, for errors."""
        return f"{self.param}: {self._place}" if self._place else self.param

    def read(self, param: str, place: str = "") -> None:
        """Something else is read now: this field, or what stands at a place in it."""
        self.param, self._place = param, place

    def element(self, num_states: int = 0, *, repeats: int = 1) -> None:
        """A character, class, literal or rule name, or something that repeats what is inside it."""
        self.add_states(num_states)
        self._append(repeats, num_states)

    def open(self) -> None:
        """A group begins."""
        self._groups.append(_Group())
        if len(self._groups) > MAX_DEPTH + 1:
            raise RequestError(
                f"{self.where} has groups nested more than {MAX_DEPTH} deep; nest fewer", param=self.param
            )

    def close(self, *, repeats: int | None = None) -> None:
        """A group ends; one that never began is left to xgrammar to refuse. `repeats` replaces what was counted inside."""
        group = self._groups.pop() if len(self._groups) > 1 else _Group()
        self._append(repeats or group.most_repeats, self._last_states if group.size == 1 else 0)

    def _append(self, repeats: int, num_states: int) -> None:
        self._last_repeats, self._last_states = repeats, num_states
        self._groups[-1].size += 1
        self._groups[-1].most_repeats = max(self._groups[-1].most_repeats, repeats)

    def add_states(self, num_states: int) -> None:
        """Something takes time or memory like these states of an automaton."""
        self._num_states += num_states
        if self._num_states > MAX_STATES:
            raise RequestError(
                f"{self.where} would take too long to compile: up to there it needs about {self._num_states} states, at most "
                f"{MAX_STATES} are allowed. Use fewer character classes, lower bounds, or the same bound in several places",
                param=self.param,
            )

    def repeat(self, low: int, high: int | None) -> None:
        """The last element is repeated `low` to `high` times, None is without end."""
        if max(low, high or 0) > MAX_COUNT:
            raise RequestError(
                f"{self.where} repeats {max(low, high or 0)} times; at most {MAX_COUNT} are allowed", param=self.param
            )
        inside = self._last_repeats
        nested = max(inside, UNBOUNDED_INSIDE) if high is None else inside * high
        if inside > 1 and nested > MAX_NESTED_COUNT:
            raise RequestError(
                f"{self.where} nests repetitions whose bounds multiply to {nested}, an unbounded one inside counted as "
                f"{UNBOUNDED_INSIDE}; at most {MAX_NESTED_COUNT} are allowed. Lower a bound, or leave the outer one unbounded",
                param=self.param,
            )
        copies = min(max(low, 1), _COUNTED) if high is None or low == high else min(2 * high, _COUNTED_OPTIONAL)
        self.add_states(self._last_states * (copies - 1))
        self._last_repeats, self._last_states = nested, 0
        self._groups[-1].most_repeats = max(self._groups[-1].most_repeats, nested)
        self._num_repetitions += 1
        if self._num_repetitions > MAX_REPETITIONS:
            raise RequestError(f"{self.where} has more than {MAX_REPETITIONS} repetitions; use fewer", param=self.param)
        if high is not None and low != high:
            self.optional()

    def optional(self) -> None:
        """Something of which there may be more or fewer, up to a bound."""
        self._num_optional += 1
        if self._num_optional > MAX_OPTIONAL:
            raise RequestError(
                f"{self.where} has more than {MAX_OPTIONAL} repetitions or lengths with an upper bound; use fewer",
                param=self.param,
            )


_QUANTIFIER = re.compile(r"[?*+]|\{(\d+)(,?)(\d*)\}")


def _quantifier(text: str, at: int, limits: Limits) -> tuple[int, int | None, int]:
    """The quantifier at a place of a regular expression or grammar: how often, at least and at most, and its length."""
    match = _QUANTIFIER.match(text, at)
    if match is None:
        raise RequestError(
            f"{limits.where}: {text[at : at + 8]!r} at {at} is no repetition: write {{2}}, {{2,5}} or {{2,}}",
            param=limits.param,
        )
    if match[1] is None:
        low, high = {"?": (0, 1), "*": (0, None), "+": (1, None)}[match[0]]
    else:
        low = int(match[1][:9])
        high = (int(match[3][:9]) if match[3] else None) if match[2] else low
    return low, high, len(match[0])


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
    removed = sorted(removed)
    kept = []
    for low, high in ranges:
        for first, last in removed:
            if low < first <= high:
                kept.append((low, first - 1))
            if first <= high:
                low = max(low, last + 1)
        if low <= high:
            kept.append((low, high))
    return kept


def states_of_class(ranges: _Ranges) -> int:
    """What a character class counts towards MAX_STATES."""
    return _WIDE if any(last > 0x7F for _, last in ranges) else 1


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

    def __init__(self, text: str, limits: Limits, *, in_json: bool = False) -> None:
        self._text, self._limits = text, limits
        self._alphabet = JSON_CHARACTERS if in_json else _CHARACTERS
        pieces: list[guided_repeats.Piece] = []
        at = depth = 0
        while at < len(text):
            piece, length = self._piece(at)
            if piece is not None:
                pieces.append(piece)
                depth += isinstance(piece, guided_repeats.Open) - isinstance(piece, guided_repeats.Close)
            if depth > MAX_DEPTH:
                raise RequestError(
                    f"{limits.where} has groups nested more than {MAX_DEPTH} deep; nest fewer", param=limits.param
                )
            at += length
        node = guided_repeats.parse(pieces)
        if node is None:
            raise RequestError(
                f"{limits.where} is no regular expression: a group lacks its other bracket, or a repetition has nothing before "
                "it or its bounds in the wrong order; write \\( or \\* for the character itself",
                param=limits.param,
            )
        guided_repeats.count(node, limits)
        self.rewritten = guided_repeats.written(node) or "()"

    def _refuse(self, at: int, length: int, why: str) -> RequestError:
        return RequestError(
            f"{self._limits.where}: {self._text[at : at + length]!r} at {at} {why}", param=self._limits.param
        )

    def _piece(self, at: int) -> tuple[guided_repeats.Piece | None, int]:
        """What the text at a place stands for, None for nothing, and how much of the text it is."""
        text, character = self._text, self._text[at]
        if character == "(":
            group = _GROUP.match(text, at)
            if group is None:
                raise self._refuse(at, 4, "is a group that is not known; use ( ) or (?: )")
            return guided_repeats.Open(), len(group[0])
        if character == ")":
            return guided_repeats.Close(), 1
        if character in "?*+{":
            low, high, length = _quantifier(text, at, self._limits)
            # A `?` behind it asks for as few as possible, with which the same texts match.
            return guided_repeats.Times(low, high), length + text.startswith("?", at + length)
        if character == "|":
            return guided_repeats.Bar(), 1
        if (character == "^" and at == 0) or (character == "$" and at + 1 == len(text)):
            return None, 1
        if character in "^$":
            raise self._refuse(
                at, 1, "may only stand at the very start (^) or end ($), as the whole text has to match; remove it"
            )
        if character == ".":
            return self._atom(_without(self._alphabet, _LINE_BREAKS), at, 1), 1
        if character == "[":
            return self._class_at(at)
        if character == "\\":
            match = self._member(_ESCAPE, at)
            return self._atom(self._set(match, at), at, len(match[0])), len(match[0])
        return self._atom([(ord(character), ord(character))], at, 1), 1

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

    def _atom(self, ranges: _Ranges, at: int, length: int) -> guided_repeats.Atom:
        ranges = _without(self._alphabet, _without(self._alphabet, ranges))
        if not ranges:
            raise self._refuse(
                at, length, "matches nothing that an answer can hold here as it is, without an escape; leave it out"
            )
        if len(ranges) > 1 or ranges[0][0] != ranges[0][1]:
            return guided_repeats.Atom(character_class(ranges), states_of_class(ranges))
        character = chr(ranges[0][0])
        if character < " ":
            return guided_repeats.Atom(character_class(ranges))
        return guided_repeats.Atom(f"\\{character}" if character in "\\^$.|?*+()[]{}" else character)

    def _class_at(self, at: int) -> tuple[guided_repeats.Atom, int]:
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
        return self._atom(_without(_CHARACTERS, ranges) if negated else ranges, at, length), length


_GRAMMAR_PIECE = re.compile(
    r"""
    (?P<literal> "(?:[^"\\\n]|\\.)*" )
    | (?P<options> ^[ \t]*[\w.-]+\[[^\]\n]*\]\s*::= )
    | (?P<class> \[(?:[^\]\\\n]|\\.)*\] )
    | (?P<unclosed> ["\[] )
    | (?P<skipped> \#[^\n]* | \n | [^\S\n]+ )
    | (?P<lookahead> \(= )
    | (?P<open> \( )
    | (?P<close> \) )
    | (?P<quantifier> [?*+{] )
    | (?P<tokens> (?:Token|ExcludeToken|TokenTagDispatch)\s*\( )
    | (?P<free> TagDispatch(?=\s*\() )
    | (?P<other> [\w.-]+ | . )
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_GRAMMAR_REFUSALS = {
    "options": "options of a rule are not supported; remove the brackets",
    "unclosed": "what begins here does not end on its line; close it, or escape it with a backslash",
    "lookahead": "lookahead rules out nothing here; write what follows as a rule",
    "tokens": "tokens cannot be named; write their text",
}


def check_grammar(text: str, limits: Limits) -> None:
    """Hold an EBNF grammar against the limits; whether it is well formed is left to xgrammar."""
    check_text(text, limits.param)
    at = 0
    while match := _GRAMMAR_PIECE.match(text, at):
        kind = match.lastgroup
        if kind in _GRAMMAR_REFUSALS:
            raise RequestError(
                f"{limits.where}: {match[0]!r:.80} at {at}: {_GRAMMAR_REFUSALS[kind]}", param=limits.param
            )
        if kind == "quantifier":
            low, high, length = _quantifier(text, at, limits)
            limits.repeat(low, high)
            at += length
            continue
        if kind == "open":
            limits.open()
        elif kind == "close":
            limits.close()
        elif kind == "class":
            limits.element(1 if re.fullmatch(r"\[[^^\\][^\\]*\]", match[0]) and match[0].isascii() else _WIDE)
        elif kind == "free":
            count_free_text(limits)
        elif kind != "skipped":
            limits.element()
        at = match.end()


def count_free_text(limits: Limits) -> None:
    """A stretch of any text."""
    limits.element(_WIDE)
    limits.repeat(0, None)
