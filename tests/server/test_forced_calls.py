"""Forms of answers that force calls, or allow them beside a text of another form."""

import json

import pytest

from stepgraph.engine.guided_schema import SchemaConverter
from stepgraph.engine.guided_tags import TagConverter
from stepgraph.errors import RequestError
from stepgraph.server.forced_calls import forced_call_schema, form_or_calls
from stepgraph.server.tool_calls import ToolCallParser
from stepgraph.server.tool_formats import ToolCallFormat

HERMES, LLAMA, MISTRAL = ToolCallFormat.HERMES, ToolCallFormat.LLAMA, ToolCallFormat.MISTRAL


def tool(name, parameters=None) -> dict:
    function = {"name": name, "description": f"Says\n{name}"}
    return {"type": "function", "function": function | ({} if parameters is None else {"parameters": parameters})}


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def validates(schema, value) -> bool:
    jsonschema = pytest.importorskip("jsonschema", reason="values are checked with jsonschema, of the extra `dev`")
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def follows(schema, value) -> bool:
    """Whether xgrammar lets an answer be this value."""
    xgrammar = pytest.importorskip("xgrammar", reason="guided generation needs the extra `guidance`")
    info = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)] + [b""], stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(
        json.dumps(SchemaConverter(schema).convert())
    )
    matcher = xgrammar.GrammarMatcher(compiled)
    return matcher.accept_string(json.dumps(value, separators=(",", ":"))) and matcher.accept_token(256)


TREE = {
    "$id": "https://example.com/tree",
    "type": "object",
    "properties": {
        "root": {"$ref": "#/$defs/node"},
        "copy": {"$ref": "#/properties/root"},
        "default": {"$ref": "#/$defs/node"},
        "mark": {"const": {"$ref": "#/$defs/node"}},
    },
    "required": ["root"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
        }
    },
}
LIST = {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#"}}}}}
TOOLS = [tool("get_weather", WEATHER), tool("f"), tool("plant", TREE), tool("chain", LIST), tool("any", {})]

GOOD_ARGUMENTS = [
    ("get_weather", {"city": "Paris"}),
    ("f", {}),
    ("f", {"anything": [1]}),
    ("any", {"anything": [1]}),
    ("plant", {"root": {"value": 1, "next": {"value": 2}}, "copy": {"value": 3}, "default": {"value": 4}}),
    ("plant", {"root": {"value": 1}, "mark": {"$ref": "#/$defs/node"}}),
    ("chain", {"next": {"next": {}}}),
]
BAD_ARGUMENTS = [
    ("get_weather", {"town": "Paris"}),
    ("f", []),
    ("any", 1),
    ("plant", {"root": {"value": 1, "next": {"value": "x"}}}),
    ("plant", {"root": {"value": 1}, "copy": {}}),
    ("plant", {"root": {"value": 1}, "default": {}}),
    ("chain", {"next": 1}),
]


@pytest.mark.parametrize("check", [validates, follows])
def test_a_named_choice_forces_the_arguments_of_that_function(check) -> None:
    for name, arguments in GOOD_ARGUMENTS:
        assert check(forced_call_schema(TOOLS, name), arguments), (name, arguments)
    for name, arguments in BAD_ARGUMENTS:
        assert not check(forced_call_schema(TOOLS, name), arguments), (name, arguments)


@pytest.mark.parametrize("check", [validates, follows])
def test_a_required_choice_forces_calls_of_any_function_with_its_own_arguments(check) -> None:
    schema = forced_call_schema(TOOLS, None)
    for name, arguments in GOOD_ARGUMENTS:
        assert check(schema, [{"name": name, "arguments": arguments}]), (name, arguments)
    for name, arguments in BAD_ARGUMENTS:
        assert not check(schema, [{"name": name, "arguments": arguments}]), (name, arguments)
    two = [{"name": "f", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Rome"}}]
    assert check(schema, two)
    assert not check(forced_call_schema(TOOLS, None, parallel=False), two)
    assert check(forced_call_schema(TOOLS, None, parallel=False), two[:1])
    assert not check(schema, [])
    assert not check(schema, [{"name": "get_weather", "arguments": {}}])
    assert not check(schema, [{"name": "unknown", "arguments": {}}])
    assert not check(schema, [{"name": "f"}])


def test_forcing_leaves_the_tools_as_they_are() -> None:
    before = json.dumps(TOOLS)
    forced_call_schema(TOOLS, None)
    forced_call_schema(TOOLS, "plant")["more"] = 1
    assert json.dumps(TOOLS) == before


def test_what_cannot_be_forced_is_refused() -> None:
    with pytest.raises(RequestError, match=r"tool_choice='g' .*'get_weather'"):
        forced_call_schema(TOOLS, "g")
    with pytest.raises(RequestError, match="needs tools"):
        forced_call_schema([], None)
    deep: dict = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="nested too deep"):
        forced_call_schema([tool("f", deep)], None)


# Calls beside a form


def accepts(spec, text) -> bool:
    """Whether xgrammar lets an answer be this text."""
    xgrammar = pytest.importorskip("xgrammar", reason="guided generation needs the extra `guidance`")
    info = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)] + [b""], stop_token_ids=[256])
    tag = json.dumps(TagConverter(spec["structural_tag"]).convert())
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info, max_threads=1).compile_structural_tag(tag))
    return matcher.accept_string(text) and matcher.accept_token(256)


FORM = {"json": {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}}
ANSWER = '{"answer": "Rome"}'
WRITTEN = {
    HERMES: (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call>',
        "\n",
    ),
    LLAMA: ('{"name": "get_weather", "parameters": {"city": "Rome"}}', '{"name": "f", "parameters": {"x": [1]}}', "; "),
    MISTRAL: ('[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', '[TOOL_CALLS]f[ARGS]{"x": [1]}', ""),
}


@pytest.mark.parametrize("format", WRITTEN)
def test_an_answer_is_of_the_form_or_calls_as_the_model_writes_them(format) -> None:
    first, second, separator = WRITTEN[format]
    spec = form_or_calls(FORM, TOOLS[:2], format, parallel=True)
    for text in (ANSWER, first, second, first + separator + second):
        assert accepts(spec, text), text
    for text in (
        "Rome",
        '{"question": 1}',
        ANSWER + first,
        first + ANSWER,
        first.replace('"city": "Rome"', '"city": 1'),
    ):
        assert not accepts(spec, text), text
    assert not accepts(form_or_calls(FORM, TOOLS[:2], format, parallel=False), first + separator + second)

    def parse(text):
        parser = ToolCallParser(format, ["get_weather", "f"])
        content, calls = parser.feed(text)
        rest, more = parser.finish()
        return content + rest, [(call.name, call.arguments) for call in calls + more]

    assert parse(first + separator + second) == ("", [("get_weather", '{"city": "Rome"}'), ("f", '{"x": [1]}')])
    assert parse(ANSWER) == (ANSWER, [])


def test_any_object_is_a_form_too() -> None:
    spec = form_or_calls({"json_object": True}, TOOLS[:1], HERMES, parallel=True)
    assert accepts(spec, '{"a": 1}')
    assert accepts(spec, WRITTEN[HERMES][0])
    assert not accepts(spec, "[1]")


def test_a_structural_tag_has_its_own_place_for_calls() -> None:
    spec = {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}}
    assert form_or_calls(spec, TOOLS, HERMES, parallel=True) == spec


def test_a_function_whose_schema_cannot_be_followed_may_be_called_with_any_object() -> None:
    tools = [tool("f", {"properties": {"x": {"not": {}}}}), tool("get_weather", WEATHER)]
    with pytest.raises(RequestError):
        SchemaConverter(forced_call_schema(tools, "f")).convert()
    spec = form_or_calls(FORM, tools, HERMES, parallel=True)
    first, second, _ = WRITTEN[HERMES]
    assert accepts(spec, first)
    assert accepts(spec, second)
    assert not accepts(spec, first.replace("city", "town"))
    many = [tool(f"f{i}", {"properties": {"x": {"type": "string", "pattern": f"a?b{{2,{i + 3}}}"}}}) for i in range(60)]
    assert accepts(form_or_calls(FORM, many, HERMES, parallel=True), second.replace('"f"', '"f7"'))
