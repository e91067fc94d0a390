"""Calls between tags, as Qwen3-Coder and Qwen3.5 write them: values are texts, and become what the function's schema says."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.server.forced_calls import form_or_calls
from stepgraph.server.tagged_arguments import TaggedArguments
from stepgraph.server.tool_calls import ToolCallParser
from stepgraph.server.tool_formats import ToolCallFormat, detect_format

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "size": {"type": "number"},
        "on": {"type": "boolean"},
        "list": {"type": "array"},
        "map": {"type": "object"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "kind": {"$ref": "#/$defs/Kind"},
        "level": {"enum": [1, 2]},
        "inner": {"properties": {"a": {}}},
    },
    "$defs": {"Kind": {"enum": ["a", "b"], "type": "string"}},
}
NAMES = ("f", "get")


def written(name: str, parameters: dict[str, str], *, outer: bool = True) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    call = f"<function={name}>\n{inside}</function>"
    return f"<tool_call>\n{call}\n</tool_call>" if outer else call


def parse(*pieces: str, is_cut: bool = False) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(ToolCallFormat.QWEN3_CODER, NAMES, {"f": SCHEMA})
    found = [parser.feed(piece) for piece in pieces] + [parser.finish(cut=is_cut)]
    calls: list[tuple[str, str]] = []
    for call in (call for _, deltas in found for call in deltas):
        calls += [(call.name, "")] if call.name is not None else []
        name, arguments = calls[call.index]
        calls[call.index] = (name, arguments + call.arguments)
    return "".join(content for content, _ in found), calls


def arguments_of(parameters: dict[str, str]) -> dict:
    content, [(name, arguments)] = parse(written("f", parameters))
    assert (content, name) == ("", "f")
    return json.loads(arguments)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "12", "12"),
        ("text", "a\n\nb\n", "a\n\nb\n"),
        ("text", "", ""),
        ("text", 'if a < b && c: print("é\\n")', 'if a < b && c: print("é\\n")'),
        ("text", "</param></parameter", "</param></parameter"),
        ("text", "null", "null"),
        ("count", "12", 12),
        ("count", " 12 ", 12),
        ("count", "twelve", "twelve"),
        ("size", "1.5", 1.5),
        ("size", "NaN", "NaN"),
        ("on", "true", True),
        ("on", "False", False),
        ("list", '["a", 1]', ["a", 1]),
        ("list", "['a']", "['a']"),
        ("map", '{"a": {"b": null}}', {"a": {"b": None}}),
        ("maybe", "None", None),
        ("maybe", "x", "x"),
        ("maybe", '"x"', '"x"'),
        ("maybe", "12", "12"),
        ("either", "12", 12),
        ("either", "x", "x"),
        ("kind", "1", "1"),
        ("level", "2", 2),
        ("inner", '{"a": 1}', {"a": 1}),
        ("unknown", "12", "12"),
    ],
)
def test_a_value_is_what_the_schema_says_of_its_parameter(name, text, value) -> None:
    assert arguments_of({name: text}) == {name: value}


TEXTS = st.text('a<é>"\\\n/parmet', max_size=12).filter(lambda text: "</parameter>" not in f"{text}\n")
CALLS = st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(["text", "a b", "é"]), TEXTS, max_size=3))


@given(
    calls=st.lists(CALLS, max_size=3),
    outer=st.booleans(),
    prose=st.sampled_from(["", "See <b>.", "a < b"]),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_calls_and_the_words_before_them_are_found_in_any_pieces(calls, outer, prose, cuts) -> None:
    text = "\n".join(filter(None, [prose, *(written(*call, outer=outer) for call in calls)]))
    content, found = parse(*(text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])))
    assert content == prose
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("outer", [True, False])
def test_wherever_an_answer_is_cut_off_its_calls_are_beginnings(outer) -> None:
    text = "Ok. " + written("f", {"text": "é\n<", "count": "12", "maybe": "x"}, outer=outer)
    [(_, whole)] = parse(text)[1]
    for end in range(len(text)):
        for pieces in ([text[:end]], list(text[:end])):
            content, calls = parse(*pieces, is_cut=True)
            assert content.rstrip() == text[: min(end, 3)]
            assert all(name == "f" and whole.startswith(arguments.rstrip("x")) for name, arguments in calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (written("g", {"a": "1"}), written("g", {"a": "1"}), []),  # nobody offered it
        (written("g", {"a": "1"}, outer=False), written("g", {"a": "1"}, outer=False), []),
        ("<tool_call>\n<function=get>\n</function>\n</tool_call>", "", [("get", "{}")]),
        ("<tool_call><function=get></tool_call> Done.", " Done.", [("get", "{}")]),  # an end is missing
        (
            "<tool_call><function=get>so: <parameter=a>1</parameter>,</function></tool_call>",
            "",
            [("get", '{"a": "1"}')],
        ),
        ('<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>', "", [("get", '{"a": 1}')]),
        ("<function", "<function", []),
        ("<tool_call>\n<parameter=a>", "<tool_call>\n<parameter=a>", []),
    ],
)
def test_what_is_malformed_is_read_as_far_as_it_can_be_understood(text, content, calls) -> None:
    assert parse(text) == (content, calls)


def test_a_text_is_given_while_it_is_written() -> None:
    arguments = TaggedArguments(SCHEMA)
    begin = "".join(map(arguments.feed, "<parameter=text>\n"))
    assert [begin, *map(arguments.feed, "ab\n"), arguments.feed("c")] == ['{"text": "', "a", "b", "", "\\nc"]


def test_references_without_end_are_followed_for_a_while_only() -> None:
    loop = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/A"}}}
    broken = {"properties": {"a": {"$ref": "#/$defs/None"}, "b": 5, "c": {"type": 5 * [{}]}}}
    for schema in (loop, broken, {"properties": 5}, {}):
        arguments = TaggedArguments(schema)
        given = "".join(f"<parameter={name}>{value}</parameter>" for name, value in {"a": 1, "b": 1, "c": "x"}.items())
        text = "".join(map(arguments.feed, f"{given}</function>"))
        assert json.loads(text) == {"a": "1", "b": "1", "c": "x"}


def test_a_template_with_its_tags_shows_the_format() -> None:
    shown = "<tool_call>\n<function=name>\n<parameter=a>\n"
    assert detect_format(shown) is ToolCallFormat.QWEN3_CODER
    assert detect_format("<tool_call>") is ToolCallFormat.HERMES


def test_beside_a_form_calls_may_be_written_with_any_values() -> None:
    pytest.importorskip("xgrammar", reason="guided generation needs the extra `guidance`")
    from test_forced_calls import FORM, accepts, tool

    format = ToolCallFormat.QWEN3_CODER
    spec = form_or_calls(FORM, [tool("f", SCHEMA), tool("get")], format, parallel=True)
    call, other = written("f", {"text": "a < b", "count": "1"}), written("get", {})
    for text in ('{"answer": "Rome"}', call, other, f"{call}\n{other}"):
        assert accepts(spec, text), text
    for text in ("Rome", call.replace("=f", "=g"), f"{call} Done.", call + '{"answer": "Rome"}'):
        assert not accepts(spec, text), text
