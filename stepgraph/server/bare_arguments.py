"""Arguments of calls as Gemma 4 writes them, with bare names and texts between tokens: what they are as JSON."""

from __future__ import annotations

import json
from enum import Enum, auto

QUOTE = '<|"|>'
"""Before a text and behind it. Nothing in the text is escaped."""
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}


class _Place(Enum):
    """What comes next."""

    VALUE = auto()
    NAME = auto()
    TEXT = auto()
    JSON_TEXT = auto()
    SCALAR = auto()
    AFTER_VALUE = auto()


class BareArguments:
    """Turns `{name:<|"|>text<|"|>,other:[1,{name:true}]}` into the text of a JSON object, while it is written. Texts and names in
    quotation marks are taken too, and what is no JSON value is a text.
    """

    def __init__(self) -> None:
        self.is_complete = False
        """The object has ended."""
        self._place = _Place.VALUE
        self._ends: list[str] = []  # of the objects and lists that are open
        self._comma = ""  # for what comes next, if anything does
        self._held = ""
        self._is_escaped = False

    def feed(self, character: str) -> str:
        """Take in one character more. Returns what the object's text gains."""
        match self._place:
            case _Place.VALUE:
                return self._begin_value(character)
            case _Place.NAME:
                return self._read_name(character)
            case _Place.TEXT:
                return self._read_text(character)
            case _Place.JSON_TEXT:
                return self._read_json_text(character)
            case _Place.SCALAR if character in ",}]":
                value, self._held = _value_of(self._held), ""
                return value + self._end_or_go_on(character)
            case _Place.SCALAR:
                self._held += character
                return ""
        return self._end_or_go_on(character)

    def cut_off(self) -> str:
        """The answer has ended before the object: what is known of its text beside."""
        return self._held.strip() if self._place is _Place.SCALAR else ""

    def _begin_value(self, character: str) -> str:
        if not self._held:
            if character.isspace() or (self._ends and character == self._ends[-1] == "]"):
                return self._end_or_go_on(character)
            if character in '{["':
                before, self._comma = self._comma, ""
                self._ends += {"{": "}", "[": "]"}.get(character, "")
                self._place = {"{": _Place.NAME, "[": _Place.VALUE}.get(character, _Place.JSON_TEXT)
                return before + character
        self._held += character
        if self._held != QUOTE and QUOTE.startswith(self._held):
            return ""
        before, self._comma = self._comma, ""
        if self._held == QUOTE:
            self._held, self._place = "", _Place.TEXT
            return before + '"'
        read, self._held, self._place = self._held, "", _Place.SCALAR
        return before + "".join(map(self.feed, read))

    def _read_name(self, character: str) -> str:
        name = self._held.strip()
        is_open = any(name.startswith(quote) and (name == quote or not name.endswith(quote)) for quote in (QUOTE, '"'))
        if not name and character == "}":
            self._held = ""
            return self._end_or_go_on(character)
        if character != ":" or is_open:
            self._held += character
            return ""
        before, self._comma = self._comma, ""
        self._held, self._place = "", _Place.VALUE
        for quote in (QUOTE, '"'):
            name = name.removeprefix(quote).removesuffix(quote)
        return f"{before}{json.dumps(name, ensure_ascii=False)}: "

    def _read_text(self, character: str) -> str:
        self._held += character
        if self._held == QUOTE:
            self._held, self._place = "", _Place.AFTER_VALUE
            return '"'
        certain = ""
        while not QUOTE.startswith(self._held):
            certain, self._held = certain + self._held[0], self._held[1:]
        return json.dumps(certain, ensure_ascii=False)[1:-1]

    def _read_json_text(self, character: str) -> str:
        if character == '"' and not self._is_escaped:
            self._place = _Place.AFTER_VALUE
            return character
        self._is_escaped = character == "\\" and not self._is_escaped
        return character if character in '"\\' else json.dumps(character, ensure_ascii=False)[1:-1]

    def _end_or_go_on(self, character: str) -> str:
        """Read what follows a value, or stands where none has begun."""
        if character == ",":
            self._comma = ", "
            self._place = _Place.NAME if self._ends[-1] == "}" else _Place.VALUE
        elif character == self._ends[-1] if self._ends else False:
            self._comma, self._place = "", _Place.AFTER_VALUE
            self.is_complete = len(self._ends) == 1
            return self._ends.pop()
        elif self._place is _Place.SCALAR:
            self._place = _Place.AFTER_VALUE
        return ""


def _value_of(text: str) -> str:
    """A number, true, false or null as JSON; anything else as a text."""
    word = text.strip()
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        is_number = isinstance(json.loads(word, parse_constant=str), (int, float))
    except (ValueError, RecursionError):
        is_number = False
    return word if is_number else json.dumps(word, ensure_ascii=False)
