"""Random JSON schemas and a list of regular expressions, for tests of guided generation."""

import random
from typing import Any

REGEXES: list[str] = [
    r"a",
    r"abc",
    r"a|bc|def",
    r"(a|b)*c",
    r"(?:ab)+",
    r"a?b?c?d",
    r"[a-z]+",
    r"[^a-z]",
    r"[A-Za-z_][A-Za-z0-9_]*",
    r"\d{4}-\d{2}-\d{2}",
    r"\d{1,3}(\.\d{1,3}){3}",
    r"[0-9a-f]{8}-[0-9a-f]{4}",
    r"[a-z0-9._%+-]+@[a-z0-9-]+\.[a-z]{2,4}",
    r"https?://[a-z]+(\.[a-z]+)+(/[a-z0-9]*)*",
    r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?",
    r"\(\d{3}\) \d{3}-\d{4}",
    r"#[0-9A-F]{6}",
    r"(yes|no|maybe)",
    r"(Mon|Tue|Wed)day?",
    r".",
    r".{3}",
    r".{2,5}",
    r"a.b",
    r"\w+",
    r"\w+ \w+",
    r"\s\S\s",
    r"[\d_]+",
    r"[\w-]{2}",
    r"\.\*\+\?\[\]\(\)\{\}\|\^\$\\",
    r"\n\t\r",
    r"[\n\t ]x",
    r"\x41\u0042",
    r"[\x41-\x43]+",
    r"é+",
    r"[à-ü]{2}",
    r"(日本|中国)語?",
    r"😀{2}",
    r"a{0}b",
    r"a{2,}",
    r"(ab){2,3}",
    r"((a|b){2}c){2}",
    r"^start[a-c]*end$",
    r"^$",
    r"|end",
    r"x*",
    r"a+?b*?",
    r"(?:)|z",
    r"[\]-]",
    r"[$^.]",
    r"\"quoted\"",
    r"'[^']{0,9}'",
    r"<([a-z]+)>[^<]*</[a-z]+>",
]
"""Written the same for Python's `re` and for ECMAScript."""

_NAMES = ["a", "b", "name", "value", "two words", 'quo"te', "é", "type"]
_PATTERNS = ["^[a-c]{1,3}$", "^x[0-9]*$", "^(red|green)$", "^.$", "^[^aeiou]{2}$", r"^\d{2}:\d{2}$"]
_VALUES = [
    0,
    1,
    -7,
    2.5,
    0.1,
    "",
    "a",
    "two words",
    'quo"te\\',
    "line\nbreak",
    "é😀",
    True,
    False,
    None,
    [],
    [1, "x"],
    {"k": 1},
]
_FORMATS = ["date", "time", "date-time", "email", "ipv4", "uuid", "hostname"]


def random_schema(rng: random.Random) -> dict[str, Any]:
    """A schema of objects, arrays, texts, numbers, fixed values, unions, references and recursion, three levels deep at most."""
    definitions = {"leaf": _schema(rng, 1, ()), "node": {}}
    definitions["node"] = {
        "type": "object",
        "properties": {"value": _schema(rng, 1, ("leaf",)), "next": {"$ref": "#/$defs/node"}},
        "required": ["value"],
    }
    return (
        {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        | _schema(rng, 3, ("leaf", "node"))
        | {"$defs": definitions}
    )


def _schema(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> dict[str, Any]:
    kinds = [_text, _text, _integer, _number, _fixed, _simple]
    if definitions:
        kinds.append(lambda rng: {"$ref": f"#/$defs/{rng.choice(definitions)}"})
    if depth:
        kinds += 3 * [
            lambda rng: _object(rng, depth - 1, definitions),
            lambda rng: _array(rng, depth - 1, definitions),
            lambda rng: _union(rng, depth - 1, definitions),
        ]
    schema = rng.choice(kinds)(rng)
    return schema | ({"description": "ignored"} if rng.random() < 0.2 else {})


def _object(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> dict[str, Any]:
    if rng.random() < 0.2:  # a map
        names = rng.choice(
            [{}, {"propertyNames": {"enum": ["k", "l"]}}, {"propertyNames": {"pattern": "^[a-z]{1,2}$"}}]
        )
        if rng.random() < 0.3:
            return {
                "type": "object",
                "patternProperties": {"^[xy]$": _schema(rng, depth, definitions)},
                "additionalProperties": False,
            }
        return {
            "type": "object",
            "additionalProperties": _schema(rng, depth, definitions),
            "minProperties": rng.choice([0, 1]),
        } | names
    names = rng.sample(_NAMES, rng.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(rng, depth, definitions) for name in names},
        "required": [name for name in names if rng.random() < 0.5],
    }
    if rng.random() < 0.3:
        schema["additionalProperties"] = False
    if rng.random() < 0.2:
        schema["maxProperties"] = max(1, len(schema["required"]))
    if names and rng.random() < 0.2:
        schema["minProperties"] = 1
    return schema


def _array(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> dict[str, Any]:
    if rng.random() < 0.25:
        return {
            "type": "array",
            "prefixItems": [_schema(rng, depth, definitions) for _ in range(rng.randint(1, 3))],
            "items": rng.choice([False, {"type": "null"}]),
        }
    schema: dict[str, Any] = {"type": "array"}
    if rng.random() < 0.9:
        schema["items"] = _schema(rng, depth, definitions)
    low = rng.randint(0, 2)
    return schema | rng.choice([{}, {"minItems": low}, {"maxItems": low}, {"minItems": low, "maxItems": low + 2}])


def _union(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "x": _schema(rng, depth, definitions)},
                    "required": ["kind"],
                }
                for kind in ("circle", "square")
            ]
        }
    if rng.random() < 0.2:
        return {"allOf": [_schema(rng, depth, definitions)]}
    return {"anyOf": [_schema(rng, depth, definitions) for _ in range(rng.randint(1, 3))]}


def _text(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(0, 3)
    return {"type": "string"} | rng.choice(
        [
            {},
            {"minLength": low},
            {"maxLength": low},
            {"minLength": low, "maxLength": low + 3},
            {"pattern": rng.choice(_PATTERNS)},
            {"format": rng.choice(_FORMATS)},
        ]
    )


def _integer(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-1200, 300)
    return {"type": "integer"} | rng.choice(
        [
            {},
            {"minimum": low},
            {"maximum": low},
            {"exclusiveMinimum": low},
            {"exclusiveMaximum": low},
            {"minimum": low, "maximum": low + rng.randint(0, 2000)},
            {"exclusiveMinimum": low, "exclusiveMaximum": low + 2},
        ]
    )


def _number(rng: random.Random) -> dict[str, Any]:
    low = rng.choice([0, -0.5, 0.001, 1e3, -123.75, round(rng.uniform(-200, 200), 3)])
    return {"type": "number"} | rng.choice(
        [
            {},
            {"minimum": low},
            {"maximum": low},
            {"exclusiveMinimum": low},
            {"exclusiveMaximum": low},
            {"minimum": low, "maximum": low + rng.randint(0, 20) / 8},
            {"exclusiveMinimum": low, "exclusiveMaximum": low + 2.25},
        ]
    )


def _fixed(rng: random.Random) -> dict[str, Any]:
    values = rng.sample(_VALUES, rng.randint(1, 4))
    return rng.choice([{"enum": values}, {"const": values[0]}, {"const": "x", "type": "string"}])


def _simple(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            {},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "object"},
            {"type": "array"},
            {"type": ["string", "null"]},
            {"type": ["integer", "string"], "minimum": 3, "maxLength": 2},
        ]
    )


def check(value: Any, schema: dict[str, Any]) -> None:
    """`jsonschema.ValidationError` if a value breaks a schema, which is valid: to find that out takes twenty times as long."""
    from jsonschema import Draft202012Validator  # which those who check need

    Draft202012Validator(schema).validate(value)
