"""Calls of tools: forms of answers that force the model to write them, or let it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stepgraph.engine.guided_tags import TagConverter
from stepgraph.errors import RequestError
from stepgraph.server.tool_formats import ToolCallFormat


def forced_call_schema(
    tools: Sequence[Mapping[str, Any]], name: str | None, *, parallel: bool = True
) -> dict[str, Any]:
    """The JSON schema of an answer that consists of calls, for a grammar that forces the model to call. See
    `tool_calls.ForcedCallParser`.

    Args:
        tools: as the OpenAI API has them.
        name: of the function to call, which gives the schema of its arguments; None: the schema of an array of calls
            `{"name": ..., "arguments": ...}`, at least one, of any of the functions.
        parallel: the array may hold more than one call.

    Raises:
        RequestError: no tool has this name, there are no tools, or a schema is nested too deep.
    """
    functions = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if name is not None and name not in functions:
        raise RequestError(
            f"tool_choice={name!r} is not among tools, which are {sorted(functions)}; name one of those",
            param="tool_choice",
        )
    if not functions:
        raise RequestError(
            "tool_choice='required' needs tools, of which there are none; add the functions to call",
            param="tool_choice",
        )
    if name is not None:
        return object_schema(functions[name])
    calls, definitions = [], {}
    for i, (function, parameters) in enumerate(functions.items()):
        arguments = {key: value for key, value in object_schema(parameters).items() if key != "$id"}
        place = f"tools.{i}.parameters"  # errors name it; a function's name may hold what references cannot
        try:
            definition = _moved(arguments, f"#/$defs/{place}")
        except RecursionError as error:
            where = f"tools[{i}].function.parameters"
            raise RequestError(f"{where} of {function!r:.80} is nested too deep; flatten it", param=where) from error
        if (
            definition != arguments
        ):  # it has references, which must not lead through an array: xgrammar cannot follow those
            definitions[place] = definition
            arguments = {"$ref": f"#/$defs/{place}"}
        calls.append({
            "type": "object",
            "properties": {"name": {"const": function}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "$defs": definitions}
    return schema if parallel else schema | {"maxItems": 1}


def object_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of objects, which arguments are also where the schema of parameters does not say so."""
    says_more = parameters.keys() & {"$ref", "anyOf", "oneOf", "allOf"}
    return dict(parameters) if says_more else {"type": "object"} | dict(parameters)


_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords of a schema whose values are no schemas."""
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
"""Keywords whose values are schemas by names, which are no keywords."""


def _moved(node: Any, root: str) -> Any:
    """A schema, or part of one, as it must be where its root has the place `root` in another schema: its references follow."""
    if isinstance(node, list):
        return [_moved(item, root) for item in node]
    if not isinstance(node, dict):
        return node
    moved: dict[str, Any] = {}
    for key, value in node.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            moved[key] = {name: _moved(schema, root) for name, schema in value.items()}
        else:
            moved[key] = value if key in _VALUES else _moved(value, root)
    return moved


class _Spelling(NamedTuple):
    """What stands before a call's name, between that and the arguments, after those, and between calls."""

    before: str
    between: str
    after: str
    separator: str
    quote: bool
    """The name is JSON text."""
    is_json: bool = True
    """So are the arguments; else they are any text."""


_SPELLINGS = {
    ToolCallFormat.HERMES: _Spelling('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>", "\n", True),
    ToolCallFormat.LLAMA: _Spelling('{"name": ', ', "parameters": ', "}", "; ", True),
    ToolCallFormat.MISTRAL: _Spelling("[TOOL_CALLS]", "[ARGS]", "", "", False),
    ToolCallFormat.QWEN3_CODER: _Spelling(
        "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", "\n", False, False
    ),
    ToolCallFormat.GEMMA4: _Spelling("<|tool_call>call:", "{", "}<tool_call|>", "", False, False),
}
ANY_OBJECT = {"type": "object"}
"""A schema."""
FORM_BESIDE_CALLS = "structural_tag.format.elements[0].json_schema"
"""Where `form_or_calls` puts the schema of a text answer."""


def form_or_calls(
    spec: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], format: ToolCallFormat, *, parallel: bool
) -> dict[str, Any]:
    """What an answer must be that is either of a form, or calls of tools as the model writes them.

    Arguments follow the schema of their function, or are any object where that cannot be followed exactly: nobody asked for more.
    Takes milliseconds.

    Args:
        spec: the form, as SamplingParams takes it: `json`, `json_object` or `structural_tag`. The last has its own place for
            calls, and stays as it is.
        tools: as the OpenAI API has them; at least one.
        format: how the model writes calls.
        parallel: there may be several.
    """
    if "structural_tag" in spec:
        return dict(spec)
    form = {"type": "json_schema", "json_schema": spec.get("json", ANY_OBJECT)}
    schemas = followed_schemas(tools)
    either = {"type": "or", "elements": [form, _calls(schemas, format, parallel=parallel)]}
    if not can_be_followed(
        either
    ):  # together they are too much, or the form is to blame, which is said where it is compiled
        either["elements"] = [form, _calls(dict.fromkeys(schemas, ANY_OBJECT), format, parallel=parallel)]
    return {"structural_tag": {"type": "structural_tag", "format": either}}


def followed_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schemas of functions' arguments by their names; any object where one cannot be followed exactly."""
    schemas = {tool["function"]["name"]: object_schema(tool["function"].get("parameters") or {}) for tool in tools}
    return {
        name: schema if can_be_followed({"type": "json_schema", "json_schema": schema}) else ANY_OBJECT
        for name, schema in schemas.items()
    }


def _calls(schemas: Mapping[str, Any], format: ToolCallFormat, *, parallel: bool) -> dict[str, Any]:
    spelling = _SPELLINGS[format]
    tags = [
        {
            "type": "tag",
            "begin": spelling.before
            + (json.dumps(name, ensure_ascii=False) if spelling.quote else name)
            + spelling.between,
            "content": {"type": "json_schema", "json_schema": schema} if spelling.is_json else {"type": "any_text"},
            "end": spelling.after,
        }
        for name, schema in schemas.items()
    ]
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": spelling.separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def can_be_followed(form: Mapping[str, Any]) -> bool:
    """Whether a `format` of a structural tag holds nothing that is refused. Takes milliseconds."""
    try:
        TagConverter({"type": "structural_tag", "format": form}).convert()
    except RequestError:
        return False
    return True
