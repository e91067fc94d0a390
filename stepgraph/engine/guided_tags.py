"""Structural tags of guided generation, free text with structures in it: what xgrammar follows exactly is rewritten for it, the
rest refused. What it follows was found by experiment with xgrammar 0.2.8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stepgraph.engine.guided_schema import SchemaConverter
from stepgraph.engine.guided_text import (
    MAX_COUNT,
    Limits,
    Regex,
    check_answer,
    check_grammar,
    check_text,
    count_free_text,
)
from stepgraph.errors import RequestError

_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "const_string": (("value",), ()),
    "json_schema": (("json_schema",), ("style", "any_order", "max_whitespace_cnt", "excludes")),
    "regex": (("pattern",), ()),
    "grammar": (("grammar",), ()),
    "any_text": ((), ("excludes", "max_tokens", "max_chars")),
    "sequence": (("elements",), ()),
    "or": (("elements",), ()),
    "optional": (("content",), ()),
    "star": (("content",), ()),
    "plus": (("content",), ()),
    "repeat": (("min", "max", "content"), ()),
    "tag": (("begin", "content", "end"), ()),
    "tags_with_separator": (("tags", "separator"), ("at_least_one", "stop_after_first")),
    "triggered_tags": (("triggers", "tags"), ("at_least_one", "stop_after_first", "excludes")),
    "dispatch": (("rules",), ("loop", "excludes")),
    "token": (("token",), ()),
}
"""Fields that each format in a structural tag must have, and those that it may have. Of the formats of tokens there is that of a
special one by its id, for models whose answers such tokens set in parts."""
_ONLY_VALUES: dict[tuple[str, str], Any] = {
    ("json_schema", "style"): "json",
    ("json_schema", "any_order"): False,
    ("json_schema", "max_whitespace_cnt"): None,
    ("json_schema", "excludes"): [],
    ("any_text", "max_tokens"): None,
    ("any_text", "max_chars"): None,
}
"""Of fields that are accepted for their default only. With `any_order`, answers need not validate."""
_MAX_TRIGGERS = 256


class TagConverter:
    """Turns a structural tag into one that xgrammar follows exactly; RequestError for what it cannot, by its place.

    It has a `format`, as in xgrammar, or `structures` and `triggers`, the older form. No trigger appears in free text without its
    structure, and schemas, regular expressions and grammars in it are held to the same rules as those that stand alone. JSON in
    it has at most `max_whitespace` characters of white space between two of its parts.
    """

    def __init__(self, tag: Mapping[str, Any], *, max_whitespace: int | None = None) -> None:
        self._max_whitespace = max_whitespace
        self._limits = Limits("structured_outputs.structural_tag")
        try:
            text = json.dumps(tag, allow_nan=False, ensure_ascii=False)
            self._tag: dict[str, Any] = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{self._limits.where} is not JSON: {error}", param=self._limits.param) from error
        check_text(text, self._limits.param)
        self._is_older = "format" not in tag
        self.token_ids: set[int] = set()
        """Special tokens that the converted tag names."""
        self.grammars: list[str] = []
        """Grammars in it."""
        self.newer: dict[str, Any] = {}
        """Its `format` once it is converted, of the older form as the newer one would have it."""

    def convert(self) -> dict[str, Any]:
        """The structural tag for xgrammar."""
        tag = self._tag
        if tag.get("type") != "structural_tag":
            raise self._refuse("type", f"is {tag.get('type')!r:.80}; it must be structural_tag")
        if not self._is_older:
            self._check_fields(tag, "", ("type", "format"), ())
            self.newer = tag["format"]
            return {"type": "structural_tag", "format": self._format(tag["format"], "format")}
        self._check_fields(tag, "", ("type", "structures", "triggers"), ())
        tags = []
        for i, structure in enumerate(self._list(tag["structures"], "structures")):
            self._check_fields(structure, f"structures[{i}]", ("begin", "schema", "end"), ())
            content = {"type": "json_schema", "json_schema": structure["schema"]}
            tags.append({"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]})
        triggered = {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}
        self.newer = triggered
        return {"type": "structural_tag", "format": self._format(triggered, "format")}

    def _place(self, path: str) -> str:
        """A path in the newer form, as the user knows it."""
        if self._is_older:
            path = path.replace("format.tags[", "structures[").replace("content.json_schema", "schema")
            path = path.removeprefix("format.")
        return f"structured_outputs.structural_tag.{path:.200}"

    def _refuse(self, path: str, why: str) -> RequestError:
        place = self._place(path)
        return RequestError(f"{place} {why}", param=place)

    def _check_fields(self, node: Any, path: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
        if not isinstance(node, dict):
            raise self._refuse(path, f"is {node!r:.80}; it must be an object")
        known = ", ".join(required + optional)
        for name in required:
            if name not in node:
                raise self._refuse(f"{path}.{name}".lstrip("."), f"is missing; the fields are {known}")
        for name in node:
            if name not in required + optional:
                raise self._refuse(f"{path}.{name}".lstrip("."), f"is not known; the fields are {known}")

    def _format(self, node: Any, path: str) -> dict[str, Any]:
        kind = node.get("type") if isinstance(node, dict) else None
        if not isinstance(kind, str) or kind not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise self._refuse(path, f"is {node!r:.80}; it must be an object with a type that is supported: {known}")
        required, optional = _FORMATS[kind]
        self._check_fields(node, path, ("type", *required), optional)
        self._limits.read(self._place(path))
        self._limits.open()
        converted: dict[str, Any] = {"type": kind}
        for name in filter(node.__contains__, required + optional):
            if (kind, name) not in _ONLY_VALUES:
                converted[name] = self._field(name, node[name], f"{path}.{name}")
            elif node[name] != (only := _ONLY_VALUES[kind, name]):
                raise self._refuse(f"{path}.{name}", f"is {node[name]!r:.80}; only {only!r} is supported")
        if kind == "json_schema":
            converted["max_whitespace_cnt"] = self._max_whitespace
        self._limits.read(self._place(path))
        self._limits.close()
        self._count_repetitions(converted, path)
        if kind == "triggered_tags":
            self._check_triggers(converted["triggers"], converted, path)
            self._check_tags(converted, path)
        elif kind == "dispatch":
            self._check_triggers([trigger for trigger, _ in converted["rules"]], converted, path)
        return converted

    def _field(self, name: str, value: Any, path: str) -> Any:
        """The value of a format's field; fields of one name mean the same in all formats."""
        match name:
            case "value" | "begin" | "separator":
                return self._text(value, path)
            case "end" if isinstance(value, list):
                return [self._text(end, f"{path}[{i}]") for i, end in enumerate(self._list(value, path))]
            case "end":
                return self._text(value, path)
            case "triggers":
                return [self._text(text, f"{path}[{i}]", least=1) for i, text in enumerate(self._list(value, path))]
            case "excludes":
                texts = self._list(value, path, least=0)
                return [self._text(text, f"{path}[{i}]", least=1) for i, text in enumerate(texts)]
            case "content":
                return self._format(value, path)
            case "elements":
                return [self._format(element, f"{path}[{i}]") for i, element in enumerate(self._list(value, path))]
            case "tags":
                tags = [self._format(tag, f"{path}[{i}]") for i, tag in enumerate(self._list(value, path))]
                for i, tag in enumerate(tags):
                    if tag["type"] != "tag":
                        raise self._refuse(f"{path}[{i}].type", f"is {tag['type']!r}; it must be tag")
                return tags
            case "rules":
                return [self._rule(rule, f"{path}[{i}]") for i, rule in enumerate(self._list(value, path))]
            case "min" | "max":
                least = 0 if name == "min" else -1
                if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
                    raise self._refuse(path, f"is {value!r:.80}; it must be a whole number from {least} to {MAX_COUNT}")
                return value
            case "at_least_one" | "stop_after_first" | "loop":
                if not isinstance(value, bool):
                    raise self._refuse(path, f"is {value!r:.80}; it must be true or false")
                return value
            case "json_schema":
                return self._schema(value, path)
            case "token":
                if isinstance(value, bool) or not isinstance(value, int):
                    raise self._refuse(path, f"is {value!r:.80}; it must be the id of a special token")
                self.token_ids.add(value)
                return value
        text = self._text(value, path, least=1)
        self._limits.read(self._place(path))
        if name == "pattern":
            return Regex(text, self._limits).rewritten
        assert name == "grammar", name
        check_grammar(text, self._limits)
        self.grammars.append(text)
        return text

    def _schema(self, value: Any, path: str) -> Any:
        where = self._place(path)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{where} is not JSON: {error}", param=where) from error
        return SchemaConverter(value, where, self._limits).convert()

    def _rule(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise self._refuse(path, f"is {value!r:.80}; it must be a list of a text and a format")
        return [self._text(value[0], f"{path}[0]", least=1), self._format(value[1], f"{path}[1]")]

    def _text(self, value: Any, path: str, *, least: int = 0) -> str:
        if not isinstance(value, str) or len(value) < least:
            raise self._refuse(path, f"is {value!r:.80}; it must be a text{' that is not empty' if least else ''}")
        check_answer(value, self._place(path))
        return value

    def _list(self, value: Any, path: str, *, least: int = 1) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise self._refuse(path, f"is {value!r:.80}; it must be a list{' that is not empty' if least else ''}")
        return value

    def _count_repetitions(self, converted: dict[str, Any], path: str) -> None:
        match converted["type"]:
            case "any_text":
                count_free_text(self._limits)
            case "optional":
                self._limits.repeat(0, 1)
            case "plus":
                self._limits.repeat(1, None)
            case "star" | "tags_with_separator" | "triggered_tags" | "dispatch":
                self._limits.repeat(0, None)
            case "repeat":
                low, high = converted["min"], None if converted["max"] == -1 else converted["max"]
                if high is not None and high < low:
                    raise self._refuse(
                        f"{path}.max", f"is {high}, below min, which is {low}; it may be -1 for no bound"
                    )
                self._limits.repeat(low, high)

    def _check_triggers(self, triggers: list[str], converted: dict[str, Any], path: str) -> None:
        """Each can be recognized, as soon as it appears."""
        if len(triggers) > _MAX_TRIGGERS:
            raise self._refuse(f"{path}.triggers", f"are {len(triggers)}; at most {_MAX_TRIGGERS} are allowed")
        for i, trigger in enumerate(triggers):
            for other in triggers[:i] + triggers[i + 1 :]:
                if other in trigger:
                    raise self._refuse(
                        path, f"has the trigger {other!r:.80} twice, or inside another, {trigger!r:.80}; leave one out"
                    )
            for excluded in converted.get("excludes", ()):
                if excluded in trigger:
                    raise self._refuse(
                        f"{path}.excludes",
                        f"has {excluded!r:.80}, which rules out the trigger {trigger!r:.80}; remove one",
                    )

    def _check_tags(self, converted: dict[str, Any], path: str) -> None:
        """Each trigger leads to a tag, and each tag has a trigger."""
        triggers, begins = converted["triggers"], [tag["begin"] for tag in converted["tags"]]
        for i, begin in enumerate(begins):
            if not begin.startswith(tuple(triggers)):
                raise self._refuse(
                    f"{path}.tags[{i}].begin", f"is {begin!r:.80}, which starts with none of the triggers"
                )
        for i, trigger in enumerate(triggers):
            if not any(begin.startswith(trigger) for begin in begins):
                raise self._refuse(f"{path}.triggers[{i}]", f"is {trigger!r:.80}, with which no tag begins; remove it")
