"""Reduce a vendor's OpenAPI document to the JSON Schema of what its server says, for tests that hold ours against it.

    python scripts/reduce_openapi.py SPEC OUT COMPONENT [COMPONENT ...]

Writes the components and all that they refer to under ``$defs`` of one JSON Schema (2020-12), without prose and examples, one
definition a line. A ``$comment`` says what it was made of, and with --note where that comes from. OpenAI's is made by

    python scripts/reduce_openapi.py openai.yml tests/data/openai_schema.json CreateChatCompletionResponse \\
        CreateChatCompletionStreamResponse CreateCompletionResponse Response ResponseStreamEvent ListModelsResponse ErrorResponse

What OpenAPI says in its own words becomes JSON Schema's. ``oneOf`` becomes ``anyOf``: vendors write it for unions whose members
overlap, which no value of such a member could satisfy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

_PROSE = frozenset(
    {"title", "description", "example", "examples", "externalDocs", "default", "deprecated", "discriminator", "format"}
    | {"readOnly", "writeOnly", "$recursiveAnchor"}
)
"""Keywords that refuse no value."""
_MAPS = frozenset({"properties", "patternProperties", "$defs"})
"""Their keys are names, not keywords."""
_PREFIX = "#/components/schemas/"


def json_schema(node: Any, component: str) -> Any:
    """A schema of an OpenAPI document's component as JSON Schema, whose references lead to ``$defs``."""
    if isinstance(node, list):
        return [json_schema(one, component) for one in node]
    if not isinstance(node, dict):
        return node
    schema: dict[str, Any] = {}
    for keyword, value in node.items():
        if keyword in _PROSE or keyword.startswith("x-") or keyword == "nullable":
            continue
        if keyword == "$recursiveRef":
            schema["$ref"] = f"#/$defs/{component}"
        elif keyword == "$ref":
            schema["$ref"] = value.replace(_PREFIX, "#/$defs/")
        elif keyword in _MAPS:
            schema[keyword] = {name: json_schema(one, component) for name, one in value.items()}
        elif keyword in ("enum", "const", "required"):
            schema[keyword] = value
        else:
            schema["anyOf" if keyword == "oneOf" else keyword] = json_schema(value, component)
    if len(schema.get("enum", ())) == 1:
        schema["const"] = schema.pop("enum")[0]
    if "const" in schema:
        schema.pop("type", None)
    return {"anyOf": [schema, {"type": "null"}]} if node.get("nullable") else schema


def references(schema: Any) -> set[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return set().union(*map(references, schema))
    if not isinstance(schema, dict):
        return set()
    found = set().union(*map(references, schema.values()))
    target = schema.get("$ref")
    return found | {target.removeprefix("#/$defs/")} if isinstance(target, str) else found


def reduced(spec: dict[str, Any], components: list[str]) -> dict[str, Any]:
    """The JSON Schema of these components, and all that they refer to; KeyError for one that is not there."""
    known, found, open_names = spec["components"]["schemas"], {}, list(components)
    while open_names:
        name = open_names.pop()
        if name not in found:
            found[name] = json_schema(known[name], name)
            open_names += references(found[name])
    return {name: found[name] for name in sorted(found)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("spec", type=Path, metavar="SPEC", help="an OpenAPI document, YAML or JSON")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("components", nargs="+", metavar="COMPONENT", help="a name under components.schemas")
    parser.add_argument("--note", default="", help="where the document comes from, and its licence")
    given = parser.parse_args()
    spec = yaml.load(given.spec.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    definitions = reduced(spec, given.components)
    comment = f"Made by scripts/reduce_openapi.py of {' '.join(given.components)}. {given.note}".strip()
    lines = ",\n".join(
        f"{json.dumps(name)}:{json.dumps(one, separators=(',', ':'), sort_keys=True)}"
        for name, one in definitions.items()
    )
    head = (
        f'{{"$schema":"https://json-schema.org/draft/2020-12/schema",\n"$comment":{json.dumps(comment)},\n"$defs":{{\n'
    )
    given.out.write_text(f"{head}{lines}\n}}}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
