"""Arguments of calls that models write between tags, each parameter's value as plain text: what they are as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_PARAMETER = "<parameter="
_NAME_END = ">"
_VALUE_ENDS = ("</parameter>", "\n</parameter>")
_TEXT = frozenset({"string"})
_ENDS = ("</function>", "</tool_call>")
_WORDS = {"true": True, "false": False, "none": None, "null": None}
"""How chat templates and models write these values, in any case."""
_KINDS: dict[type, str] = {
    bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", type(None): "null",
}  # fmt: skip


class TaggedArguments:
    """Turns `<parameter=name>value</parameter>`, any number of times up to `</function>`, into the text of a JSON object, while
    it is written. A line break after the first tag and one before the second are no part of a value.

    A value is what the function's schema says of its parameter: a text as it stands where that may be nothing else, else JSON if
    it can be read so as one of the types that are allowed, else a text. Other text between parameters is passed over.

    Args:
        schema: of the function's parameters.
    """

    def __init__(self, schema: Mapping[str, Any]):
        self.is_complete = False
        """`</function>` came."""
        self._schema = schema
        self._held = ""  # the beginning of a tag, or a parameter's name
        self._is_in_name = False
        self._kinds: frozenset[str] | None = None  # of the parameter whose value is being read
        self._value: str | None = None  # so far; None: nothing of it came
        self._num_parameters = 0

    def feed(self, character: str) -> str:
        """Take in one character more. Returns what the object's text gains."""
        if self._kinds is not None:
            return self._read_value(character)
        self._held += character
        if self._is_in_name:
            return self._begin_value(self._held[:-1].strip()) if character == _NAME_END else ""
        while not any(tag.startswith(self._held) for tag in (_PARAMETER, *_ENDS)):
            self._held = self._held[1:]
        if self._held == _PARAMETER:
            self._is_in_name, self._held = True, ""
        elif self._held in _ENDS:
            self.is_complete = True
            return "}" if self._num_parameters else ""
        return ""

    def cut_off(self) -> str:
        """The answer has ended before the object: what is known of its text beside."""
        return "" if self._kinds is None or self._is_text else (self._value or "").strip()

    @property
    def _is_text(self) -> bool:
        return self._kinds == _TEXT

    def _begin_value(self, name: str) -> str:
        self._held, self._is_in_name = "", False
        self._kinds, self._value = _kinds_of(self._schema, name), None
        self._num_parameters += 1
        before = "{" if self._num_parameters == 1 else ", "
        return f"{before}{json.dumps(name, ensure_ascii=False)}: " + ('"' if self._is_text else "")

    def _read_value(self, character: str) -> str:
        if self._value is None:
            self._value = ""
            if character == "\n":
                return ""
        self._held += character
        if self._held in _VALUE_ENDS:
            return self._end_value()
        certain = ""
        while not any(end.startswith(self._held) for end in _VALUE_ENDS):
            certain, self._held = certain + self._held[0], self._held[1:]
        if self._is_text:
            return json.dumps(certain, ensure_ascii=False)[1:-1]
        self._value += certain
        return ""

    def _end_value(self) -> str:
        kinds, value = self._kinds, self._value or ""
        assert kinds is not None
        is_text = self._is_text
        self._held, self._kinds = "", None
        return '"' if is_text else json.dumps(_parsed(value, kinds), ensure_ascii=False)


def _parsed(text: str, kinds: frozenset[str]) -> Any:
    """The value of one of these types that a text is, or else the text itself."""
    word = text.strip()
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        if word.lower() not in _WORDS:
            return text
        value = _WORDS[word.lower()]
    if isinstance(value, str):  # quotes are part of a text
        return text
    kind = _KINDS[type(value)]
    is_allowed = kind in kinds or (kind == "integer" and "number" in kinds) or "string" not in kinds
    return value if is_allowed else text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _kinds_of(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """The JSON types that a parameter may have; a string where nothing is said of it."""
    properties = schema.get("properties")
    found = _types(schema, properties.get(name) if isinstance(properties, Mapping) else None, depth=8)
    return frozenset(found) or _TEXT


def _types(root: Mapping[str, Any], schema: Any, *, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or not depth:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        return _types(root, _referred(root, reference), depth=depth - 1)
    if (kinds := schema.get("type")) is not None:
        return {kinds} if isinstance(kinds, str) else {kind for kind in kinds if isinstance(kind, str)}
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    found = {_KINDS.get(type(value), "string") for value in values}
    for union in ("anyOf", "oneOf", "allOf"):
        for option in schema[union] if isinstance(schema.get(union), list) else ():
            found |= _types(root, option, depth=depth - 1)
    if not found and ("properties" in schema or "items" in schema):
        return {"object" if "properties" in schema else "array"}
    return found


def _referred(root: Any, reference: str) -> Any:
    for part in reference.removeprefix("#").strip("/").split("/"):
        root = root.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root
