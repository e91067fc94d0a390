"""JSON schemas of guided generation: what xgrammar follows exactly is rewritten for it, the rest refused.

xgrammar reads past much of what it cannot express. What it does express was found by experiment with xgrammar 0.2.8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from stepgraph.engine.guided_text import (
    JSON_CHARACTERS,
    MAX_COUNT,
    MAX_DEPTH,
    UNBOUNDED_INSIDE,
    Limits,
    Regex,
    character_class,
    check_text,
    states_of_class,
)
from stepgraph.errors import RequestError

_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "discriminator", "contentMediaType", "contentEncoding", "contentSchema",
})  # fmt: skip
"""Keywords of a schema that rule out nothing."""
_DEFINITIONS = ("$defs", "definitions")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "null": (),
    "boolean": (),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties", "maxProperties",
    ),
}  # fmt: skip
"""What xgrammar follows, by type."""
_MAX_JSON_DEPTH = 3 * MAX_DEPTH
"""Of a schema as JSON: two levels for each schema, and the values in it."""
_MAX_COMPARISONS = 250_000
"""Of values and options, to see that no value matches two options of a `oneOf`."""
_STATES_OF_TEXT = 50
"""What a text with a pattern or format counts as states of an automaton: xgrammar keeps up to 1.3 MB for each, equal or not."""
_FORMATS = frozenset({
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "json-pointer", "relative-json-pointer", "uri",
    "uri-reference", "uri-template", "uuid",
})  # fmt: skip


class SchemaConverter:
    """Turns a JSON schema into one that xgrammar follows exactly; RequestError for what it cannot, by keyword and path.

    Exactly: every answer validates. Not every valid answer is allowed: properties come in the order of the schema, objects that
    list `properties` have no others, patterns match whole strings, and strings with a length or pattern hold no escapes.
    Formats are followed in form; 2023-02-31 is a date.
    """

    def __init__(
        self, schema: Mapping[str, Any] | bool, where: str = "structured_outputs.json", limits: Limits | None = None
    ) -> None:
        try:
            text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
            self._root = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON: {error}", param=where) from error
        check_text(text, where)
        self._where = where
        self._limits = limits or Limits(where)
        self._num_comparisons = 0
        self._places: set[str] = set()  # paths of all subschemas
        self._references: list[tuple[str, str]] = []  # path and target

    def convert(self) -> Any:
        """The schema for xgrammar."""
        if _depth_of(self._root) > _MAX_JSON_DEPTH:
            raise RequestError(
                f"{self._where} is nested more than {_MAX_JSON_DEPTH} deep as JSON; flatten it, or use $ref",
                param=self._where,
            )
        self._limits.open()
        converted = self._node(self._root, "#", 0)
        self._limits.close(repeats=UNBOUNDED_INSIDE)  # each value in it has an end of its own
        for path, target in self._references:
            if target not in self._places:
                raise self._refuse(
                    path,
                    "$ref",
                    f"points to {target!r:.80}, which is no schema in this document; point to #/$defs/NAME",
                )
        return converted

    def _refuse(self, path: str, keyword: str, why: str) -> RequestError:
        return RequestError(f"{self._where}: {keyword} at {path:.200} {why}", param=self._where)

    def _node(self, node: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise RequestError(
                f"{self._where} is nested more than {MAX_DEPTH} deep at {path:.200}; flatten it, or use $ref",
                param=self._where,
            )
        self._places.add(path)
        if node is True:
            return {}
        if not isinstance(node, dict):
            raise RequestError(
                f"{self._where}: {node!r:.80} at {path:.200} is no schema that allows a value; use an object or true",
                param=self._where,
            )
        if path != "#" and "$id" in node:
            raise self._refuse(path, "$id", "moves references to another document; remove it")
        definitions = {
            key: {
                name: self._node(sub, f"{path}/{key}/{name}", depth + 1)
                for name, sub in self._dict(node, key, path).items()
            }
            for key in _DEFINITIONS
            if key in node
        }
        keywords = {k: v for k, v in node.items() if k not in _ANNOTATIONS and k not in _DEFINITIONS}
        return definitions | self._assertions(keywords, path, depth)

    def _assertions(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in node:
                for other in node.keys() - {keyword}:
                    raise self._refuse(
                        path, other, f"cannot be combined with {keyword}; move it into what {keyword} names"
                    )
                return self._reference(node, path) if keyword == "$ref" else self._union(keyword, node, path, depth)
        if "const" in node or "enum" in node:
            return self._values(node, path)
        types = node.get("type", [])
        types = types if isinstance(types, list) else [types]
        for type_ in types:
            if not isinstance(type_, str) or type_ not in _KEYWORDS:
                raise self._refuse(path, "type", f"is {type_!r:.80}; known are {', '.join(_KEYWORDS)}")
        if node.get("uniqueItems") is False:
            node = {k: v for k, v in node.items() if k != "uniqueItems"}
        if not node:
            return {}
        if not types:
            types = ["object"] if "properties" in node else ["array"] if node.keys() & {"items", "prefixItems"} else []
        if "type" in node and not types:
            raise self._refuse(path, "type", "is empty; name a type")
        for keyword in node.keys() - {"type"}:
            if not any(keyword in _KEYWORDS[type_] for type_ in types):
                if any(keyword in known for known in _KEYWORDS.values()):
                    raise self._refuse(path, keyword, "needs the type it belongs to beside it; add `type`")
                raise self._refuse(
                    path, keyword, "is not supported in guided generation; remove it and check the answer yourself"
                )
        converted: dict[str, Any] = {"type": types if len(types) > 1 else types[0]}
        for keyword in _BOUNDS:
            if keyword in node:
                converted[keyword] = self._number(node[keyword], keyword, path, whole="integer" in types)
        if "string" in types:
            converted |= self._string(node, path)
        if "array" in types:
            converted |= self._array(node, path, depth)
        if "object" in types:
            converted |= self._object(node, path, depth)
        return converted

    def _reference(self, node: dict[str, Any], path: str) -> dict[str, Any]:
        target = node["$ref"]
        if not isinstance(target, str) or not re.fullmatch(r"#(/[^~%]*)?", target):
            raise self._refuse(
                path, "$ref", f"is {target!r:.80}; use a place in this document without ~ and %, such as #/$defs/NAME"
            )
        self._references.append((path, target))
        return {"$ref": target}

    def _union(self, keyword: str, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        options = node[keyword]
        if not isinstance(options, list) or not options:
            raise self._refuse(path, keyword, "must be a list of schemas")
        if keyword == "allOf" and len(options) > 1:
            raise self._refuse(path, keyword, f"has {len(options)} schemas; only one is supported. Merge them")
        if keyword == "oneOf":
            for i, option in enumerate(options):
                for other in options[:i]:
                    if not self._are_disjoint(option, other):
                        raise self._refuse(
                            path,
                            keyword,
                            f"has options that one value might match both, such as the one at {path:.200}/oneOf/{i}; use anyOf, "
                            "or a required property with another `const` in each",
                        )
        converted = [self._node(option, f"{path}/{keyword}/{i}", depth + 1) for i, option in enumerate(options)]
        return {"allOf" if keyword == "allOf" else "anyOf": converted}

    def _resolved(self, node: Any) -> Any:
        """What a schema's references lead to; not a dict if they lead nowhere."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or not isinstance(node.get("$ref"), str):
                return node
            target: Any = self._root
            for name in node["$ref"].split("/")[1:]:
                target = target.get(name) if isinstance(target, dict) else None
            node = target
        return None

    def _are_disjoint(self, left: Any, right: Any) -> bool:
        """Whether it is plain that no value matches both."""
        self._compare(1)
        left, right = self._resolved(left), self._resolved(right)
        if not isinstance(left, dict) or not isinstance(right, dict):
            return False
        types = [_types_of(schema) for schema in (left, right)]
        if types[0] and types[1] and not types[0] & types[1]:
            return True
        values = [_values_of(schema) for schema in (left, right)]
        if values[0] is not None and values[1] is not None:
            return self._have_none_in_common(*values)
        if types[0] == types[1] == {"object"}:
            first, second = _required_of(left), _required_of(right)
            return any(
                self._have_none_in_common(_values_of(self._resolved(first[n])), _values_of(self._resolved(second[n])))
                for n in first
                if n in second
            )
        return False

    def _have_none_in_common(self, left: list[Any] | None, right: list[Any] | None) -> bool:
        if left is None or right is None:
            return False
        self._compare(len(left) * len(right))
        return not any(a == b for a in left for b in right)

    def _compare(self, num_comparisons: int) -> None:
        self._num_comparisons += num_comparisons
        if self._num_comparisons > _MAX_COMPARISONS:
            raise RequestError(
                f"{self._where}: options of oneOf take more than {_MAX_COMPARISONS} comparisons to tell apart; use fewer options "
                "or values, or anyOf",
                param=self._where,
            )

    def _values(self, node: dict[str, Any], path: str) -> dict[str, Any]:
        keyword = "const" if "const" in node else "enum"
        for other in node.keys() - {keyword, "type"}:
            raise self._refuse(path, other, f"cannot be combined with {keyword}; list only values that it allows")
        values = _values_of(node)
        if not values:
            raise self._refuse(path, keyword, "must be a list of at least one value")
        for value in values:
            self._check_value(value, keyword, path)
            if "type" in node and not _types_of({"const": value}) & _types_of({"type": node["type"]}):
                raise self._refuse(path, keyword, f"has {value!r:.80}, which is not of type {node['type']!r:.80}")
        return {keyword: node[keyword]}

    def _check_value(self, value: Any, keyword: str, path: str) -> None:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise self._refuse(path, keyword, f"has {value!r:.80}, which does not fit 64 bits")
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self._check_value(inner, keyword, path)

    def _number(self, value: Any, keyword: str, path: str, *, whole: bool) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(path, keyword, f"is {value!r:.80}; it must be a number")
        if whole and (value != int(value) or not -(2**62) < value < 2**62):
            raise self._refuse(
                path, keyword, f"is {value!r:.80}; for integers it must be a whole number of at most 62 bits"
            )
        if abs(value) > 1e15 or (value and abs(value) < 1e-5):
            raise self._refuse(path, keyword, f"is {value!r:.80}; its size must be 0 or between 1e-5 and 1e15")
        return int(value) if whole else value

    def _count(self, node: dict[str, Any], keyword: str, path: str) -> int | None:
        value = node.get(keyword)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT):
            raise self._refuse(path, keyword, f"is {value!r:.80}; it must be a whole number, and at most {MAX_COUNT}")
        return value

    def _string(self, node: dict[str, Any], path: str) -> dict[str, Any]:
        low, high = self._count(node, "minLength", path), self._count(node, "maxLength", path)
        if len({"pattern", "format", "length"} & {k.replace("min", "").replace("max", "").lower() for k in node}) > 1:
            raise self._refuse(
                path, "pattern", "and format and lengths cannot be combined; keep one, such as ^[a-z]{2,5}$"
            )
        if "format" in node:
            if not isinstance(node["format"], str) or node["format"] not in _FORMATS:
                known = ", ".join(sorted(_FORMATS))
                raise self._refuse(path, "format", f"is {node['format']!r:.80}; known are {known}")
            self._limits.read(self._where, f"format at {path:.200}")
            self._limits.add_states(_STATES_OF_TEXT)
            return {"format": node["format"]}
        if "pattern" in node:
            return {"pattern": self._pattern(node["pattern"], f"pattern at {path}")}
        if low is None and high is None:
            return {}
        low = low or 0
        if high is not None and high < low:
            raise self._refuse(path, "minLength", f"is {low}, above maxLength {high}")
        if (low, high) not in self._limits.lengths:
            self._limits.lengths.add((low, high))
            self._limits.read(self._where, f"length at {path:.200}")
            self._limits.element(states_of_class(JSON_CHARACTERS))
            self._limits.repeat(low, high)
        # As a pattern, since xgrammar lets control characters into strings of limited length as they are.
        return {"pattern": f"^{character_class(JSON_CHARACTERS)}{{{low},{'' if high is None else high}}}$"}

    def _pattern(self, pattern: Any, where: str) -> str:
        self._limits.read(self._where, f"{where:.200}")
        if not isinstance(pattern, str):
            raise RequestError(f"{self._limits.where} is {pattern!r:.80}; it must be a text", param=self._where)
        self._limits.add_states(_STATES_OF_TEXT)
        if pattern not in self._limits.patterns:
            self._limits.patterns[pattern] = Regex(pattern, self._limits, in_json=True).rewritten
        return self._limits.patterns[pattern]

    def _array(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for keyword in ("minItems", "maxItems"):
            if (count := self._count(node, keyword, path)) is not None:
                converted[keyword] = count
        if "prefixItems" in node:
            if not isinstance(node["prefixItems"], list):
                raise self._refuse(path, "prefixItems", "must be a list of schemas")
            converted["prefixItems"] = [
                self._node(item, f"{path}/prefixItems/{i}", depth + 1) for i, item in enumerate(node["prefixItems"])
            ]
        if node.get("items") is False:
            return converted | {"items": False}
        if "items" in node or "prefixItems" not in node:
            converted["items"] = self._node(node.get("items", True), f"{path}/items", depth + 1)
        return converted

    def _object(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        properties = self._dict(node, "properties", path)
        converted: dict[str, Any] = {}
        if "properties" in node:
            converted["properties"] = {
                n: self._node(s, f"{path}/properties/{n}", depth + 1) for n, s in properties.items()
            }
        extra: list[str] = [k for k in ("patternProperties", "propertyNames") if k in node]
        if node.get("additionalProperties", False) is not False:
            extra.append("additionalProperties")
            converted["additionalProperties"] = self._node(
                node["additionalProperties"], f"{path}/additionalProperties", depth + 1
            )
        elif "additionalProperties" in node:
            converted["additionalProperties"] = False
        if (
            extra and properties
        ):  # a name can be written with escapes, which hides from xgrammar that it is a listed one
            raise self._refuse(
                path, extra[0], "cannot be combined with properties; leave it out, or set additionalProperties to false"
            )
        if len(extra) > 1 and "patternProperties" in extra:
            raise self._refuse(path, extra[1], "cannot be combined with patternProperties; remove one")
        if "patternProperties" in node:
            patterns = self._dict(node, "patternProperties", path)
            if len(patterns) != 1:
                raise self._refuse(path, "patternProperties", f"has {len(patterns)} patterns; exactly one is supported")
            ((pattern, schema),) = patterns.items()
            converted["patternProperties"] = {
                self._pattern(pattern, f"patternProperties at {path}"): self._node(
                    schema, f"{path}/patternProperties/{pattern}", depth + 1
                )
            }
        if "propertyNames" in node:
            names = node["propertyNames"]
            if not isinstance(names, dict) or not ("pattern" in names or "enum" in names):
                raise self._refuse(path, "propertyNames", "is only supported with `pattern` or `enum`; use one of them")
            names = {"type": "string"} | names
            converted["propertyNames"] = self._node(names, f"{path}/propertyNames", depth + 1)
        required = node.get("required", [])
        if not isinstance(required, list) or any(not isinstance(n, str) or n not in properties for n in required):
            raise self._refuse(path, "required", f"is {required!r:.80}; each name in it must be one of properties")
        if required:
            converted["required"] = required
        for keyword in ("minProperties", "maxProperties"):
            if (count := self._count(node, keyword, path)) is not None:
                converted[keyword] = count
        if converted.get("minProperties", 0) > 1 and not properties:  # a name that comes twice counts once
            raise self._refuse(
                path, "minProperties", "above 1 is only supported with properties; lower it, or list properties"
            )
        if {"minProperties", "maxProperties"} & converted.keys() and not extra and "properties" not in node:
            converted["additionalProperties"] = {}
        self._limits.read(self._where, f"properties at {path:.200}")
        self._limits.add_states(_states_of_object(len(properties), converted))
        return converted

    def _dict(self, node: dict[str, Any], keyword: str, path: str) -> dict[str, Any]:
        value = node.get(keyword, {})
        if not isinstance(value, dict):
            raise self._refuse(path, keyword, f"is {value!r:.80}; it must be an object")
        return value


def _depth_of(value: Any) -> int:
    """Levels of lists and dicts, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    return depth


def _states_of_object(num_properties: int, bounds: Mapping[str, Any]) -> int:
    """What an object counts towards the limit of states, fitted to measurements: xgrammar tries every set of properties that may
    still come, and with bounds every number of them."""
    num_states = num_properties**3 // 150_000
    if bounds.get("minProperties") or "maxProperties" in bounds:
        num_states += num_properties**2 * min(bounds.get("maxProperties", num_properties), num_properties) // 250
    return num_states


def _required_of(schema: dict[str, Any]) -> dict[str, Any]:
    """Schemas of the properties that an object must have."""
    required, properties = schema.get("required"), schema.get("properties")
    if not isinstance(required, list) or not isinstance(properties, dict):
        return {}
    return {name: properties[name] for name in required if isinstance(name, str) and name in properties}


def _types_of(schema: dict[str, Any]) -> set[str]:
    """The types that a schema's `type`, or its values, leave; empty if it does not say. Numbers include integers."""
    values = _values_of(schema)
    if values is not None:
        names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
        found = {names.get(type(value), "null") for value in values}
        found |= {"integer"} if any(isinstance(value, float) and value == int(value) for value in values) else set()
    else:
        types = schema.get("type", [])
        found = {t for t in (types if isinstance(types, list) else [types]) if isinstance(t, str)}
    return found | ({"integer"} if "number" in found and values is None else set())


def _values_of(schema: Any) -> list[Any] | None:
    """The values that a schema's `const` or `enum` lists; None if it has neither."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None
