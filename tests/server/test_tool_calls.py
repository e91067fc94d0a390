"""Calls of tools in answers, however those are cut into pieces; schemas that force calls."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.engine.chat_messages import tools_prompt
from stepgraph.server.tool_calls import ForcedCallParser, ToolCallDelta, ToolCallParser
from stepgraph.server.tool_formats import ToolCallFormat, detect_format

HERMES, LLAMA, MISTRAL = ToolCallFormat.HERMES, ToolCallFormat.LLAMA, ToolCallFormat.MISTRAL
NAMES = ("f", "get_weather", "get")

PARSERS = {
    **{str(format): lambda format=format: ToolCallParser(format, NAMES) for format in ToolCallFormat},
    "forced": lambda: ForcedCallParser("f"),
    "forced array": lambda: ForcedCallParser(None),
}


def collect(parser, pieces) -> tuple[str, list[tuple[str, str]]]:
    """Content, and names with arguments."""
    results = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    calls: list[tuple[str, str]] = []
    for _, deltas in results:
        for delta in deltas:
            assert (delta.name is not None) == (delta.index == len(calls))
            if delta.name is not None:
                calls.append((delta.name, ""))
            assert delta.name is not None or delta.arguments, "a delta that says nothing"
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.arguments)
    assert parser.num_calls == len(calls)
    return "".join(content for content, _ in results), calls


def parse(format, *pieces):
    return collect(ToolCallParser(format, NAMES), pieces)


def cut(text, cuts) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]


CUTS = st.lists(st.integers(0, 120))
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *(
                "<tool_call>",
                "</tool_call>",
                "<|python_tag|>",
                "[TOOL_CALLS]",
                "[ARGS]",
                "[CALL_ID]",
                "<tool",
                "f",
                "get",
            ),
            *(
                '{"name": "f"',
                '{"name": "f", "arguments": ',
                '"name"',
                '"arguments":',
                '"parameters": "',
                '"id"',
                '{"a": 1}',
            ),
            *(
                "{",
                "}",
                "[",
                "]",
                '"',
                ":",
                ",",
                ";",
                "\\",
                "\\u00",
                "\\ud83d",
                "null",
                "-1.5e3",
                "tru",
                " ",
                "\n",
                "é",
                "\0",
            ),
        ]
    )
    | st.characters(),
    max_size=16,
).map("".join)


@pytest.mark.parametrize("parser", PARSERS)
@given(text=FRAGMENTS, cuts=CUTS)
def test_what_is_found_in_any_text_does_not_depend_on_its_pieces(parser, text, cuts) -> None:
    whole = collect(PARSERS[parser](), [text])
    assert collect(PARSERS[parser](), cut(text, cuts)) == whole
    assert collect(PARSERS[parser](), text) == whole


@pytest.mark.parametrize("format", ToolCallFormat)
@given(text=FRAGMENTS)
def test_a_text_without_calls_is_content_to_the_last_character(format, text) -> None:
    content, calls = parse(format, text)
    assert calls or content == text
    assert collect(ToolCallParser(format, ()), text) == (text, [])


@given(text=FRAGMENTS)
def test_content_that_cannot_begin_a_call_is_given_at_once(text) -> None:
    text = text.replace("<", "")
    assert ToolCallParser(HERMES, NAMES).feed(text) == (text.rstrip(), [])


# Answers as models write them


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)
SPACE = st.text(" \n\t", max_size=2)
PROSE = st.text("ab é.}]:\n ", max_size=6)


@st.composite
def calls(draw, key="arguments"):
    """A call as an object, and the name and arguments that it is."""
    name = draw(st.sampled_from(NAMES))
    arguments = json.dumps(draw(OBJECTS), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
    form = draw(st.sampled_from(["object", "object", "string", "missing"]))
    members = [f'"name":{draw(SPACE)}{json.dumps(name)}']
    if form == "object":
        members.insert(draw(st.integers(0, 1)), f'"{key}"{draw(SPACE)}:{arguments}')
    elif form == "string":
        members.insert(draw(st.integers(0, 1)), f'"{key}": {json.dumps(arguments, ensure_ascii=False)}')
    else:
        arguments = "{}"
    if draw(st.booleans()):
        members.insert(0, '"type": "function"')
    if draw(st.booleans()):
        members.append('"id": "q1[\\"}"')
    separator = draw(SPACE) + "," + draw(SPACE)
    return "{" + draw(SPACE) + separator.join(members) + draw(SPACE) + "}", (name, arguments)


@st.composite
def hermes_answers(draw):
    """An answer, its content and its calls."""
    answer = content = ""
    found = []
    for call in [*draw(st.lists(calls(), max_size=3)), None]:
        prose = draw(PROSE)
        answer += prose
        if found and prose.isspace():
            prose = ""
        content += prose if call is None else prose.rstrip()
        if call is not None:
            answer += f"<tool_call>{draw(SPACE)}{call[0]}{draw(SPACE)}</tool_call>"
            found.append(call[1])
    return answer, content, found


@given(answer=hermes_answers(), cuts=CUTS)
def test_calls_between_tags_are_found_with_the_text_around_them(answer, cuts) -> None:
    text, content, found = answer
    assert parse(HERMES, *cut(text, cuts)) == (content, found)


@st.composite
def llama_answers(draw):
    found = draw(st.lists(calls("parameters"), min_size=1, max_size=3))
    texts = [text for text, _ in found]
    if draw(st.booleans()):
        answer = f"[{draw(SPACE)}{', '.join(texts)}{draw(SPACE)}]"
    else:
        answer = draw(st.sampled_from([";", "; ", "\n", ""])).join(texts)
    prefix = draw(st.sampled_from(["", "<|python_tag|>", "\n<|python_tag|> ", " "]))
    return prefix + answer + draw(SPACE), [call for _, call in found]


@given(answer=llama_answers(), cuts=CUTS)
def test_calls_that_are_the_whole_answer_are_found(answer, cuts) -> None:
    text, found = answer
    assert parse(LLAMA, *cut(text, cuts)) == ("", found)


@st.composite
def mistral_answers(draw):
    found = draw(st.lists(calls(), min_size=1, max_size=3))
    if draw(st.booleans()):
        return f"[TOOL_CALLS]{draw(SPACE)}[{', '.join(text for text, _ in found)}]", [call for _, call in found]
    between = draw(st.sampled_from(["[TOOL_CALLS]", "", "\n"]))
    id = draw(st.sampled_from(["", "[CALL_ID]AbC123xyz"]))
    found = [call for _, call in found]
    return "[TOOL_CALLS]" + between.join(f"{name}{id}[ARGS]{arguments}" for name, arguments in found), found


@given(answer=mistral_answers(), prose=PROSE.map(str.rstrip), cuts=CUTS)
def test_calls_after_their_mark_are_found(answer, prose, cuts) -> None:
    text, found = answer
    assert parse(MISTRAL, *cut(prose + text, cuts)) == (prose, found)


@given(answer=hermes_answers(), end=st.integers(0, 200))
def test_an_answer_that_is_cut_short_keeps_the_calls_it_announced(answer, end) -> None:
    text, _, found = answer
    content, early = parse(HERMES, text[:end])
    assert len(early) <= len(found)
    for (name, arguments), (early_name, early_arguments) in zip(found, early, strict=False):
        assert early_name == name
        assert arguments.startswith(early_arguments)
    if not early:
        assert content == text[:end]


# Cases


def deltas_of(format, *pieces) -> list[list[ToolCallDelta]]:
    parser = ToolCallParser(format, NAMES)
    return [parser.feed(piece)[1] for piece in pieces]


@pytest.mark.parametrize(
    ("format", "opening", "after_name"),
    [
        (HERMES, '<tool_call>\n{"name": "get_weather"', ', "arguments": '),
        (LLAMA, '{"name": "get_weather"', ', "parameters": '),
        (LLAMA, '<|python_tag|>[{"name": "get_weather"', ', "arguments": '),
        (MISTRAL, '[TOOL_CALLS][{"name": "get_weather"', ', "arguments": '),
        (MISTRAL, "[TOOL_CALLS]get_weather[ARGS]", ""),
        (MISTRAL, "[TOOL_CALLS]get_weather[CALL_ID]", "x1[ARGS]"),
    ],
)
def test_a_call_is_announced_with_its_name_and_its_arguments_flow(format, opening, after_name) -> None:
    pieces = [opening[:-1], opening[-1], after_name, '{"city', '": "P', '"}']
    assert deltas_of(format, *pieces) == [
        [],
        [ToolCallDelta(0, "get_weather", "")],
        [],
        [ToolCallDelta(0, None, '{"city')],
        [ToolCallDelta(0, None, '": "P')],
        [ToolCallDelta(0, None, '"}')],
    ]


def test_arguments_in_a_string_flow_too() -> None:
    pieces = ['{"name": "f", "parameters": "', '{\\"a\\"', ": ", "\\", '"', "\\u00", "e9", '\\"}"', "}"]
    parts = [delta.arguments for deltas in deltas_of(LLAMA, *pieces) for delta in deltas]
    assert parts == ["", '{"a"', ": ", '"', "é", '"}']


def test_one_piece_gives_each_call_one_delta() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "get", "arguments": {"b'
    assert ToolCallParser(HERMES, NAMES).feed(text) == (
        "",
        [ToolCallDelta(0, "f", '{"a": 1}'), ToolCallDelta(1, "get", '{"b')],
    )


def test_arguments_before_the_name_wait_for_it() -> None:
    pieces = ['<tool_call>{"arguments": {"a": 1}, "na', 'me": "f"', "}</tool_call>"]
    assert deltas_of(HERMES, *pieces) == [[], [ToolCallDelta(0, "f", '{"a": 1}')], []]


def test_only_whitespace_and_what_may_be_a_mark_are_held_back() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    pieces = ["a ", "< b", " <tool", "s>", "\n<tool_call>\n{", "x}", "</tool_call>"]
    assert [parser.feed(piece)[0] for piece in pieces] == [
        "a",
        " < b",
        "",
        " <tools>",
        "",
        "\n<tool_call>\n{x}",
        "</tool_call>",
    ]


@pytest.mark.parametrize(
    ("format", "text", "held"),
    [
        (LLAMA, '{"title": "A', ""),
        (LLAMA, "[1", ""),
        (LLAMA, '{"name": "Alice"', ""),
        (LLAMA, '{"name": "f', '{"name": "f'),
        (MISTRAL, "[TOOL_CALLS]we", ""),
        (MISTRAL, "[TOOL_CALLS]ge", "[TOOL_CALLS]ge"),
        (HERMES, '<tool_call>{"name": 1', ""),
    ],
)
def test_text_is_given_as_soon_as_it_is_no_call(format, text, held) -> None:
    assert ToolCallParser(format, NAMES).feed(text) == (text.removesuffix(held) if held else text, [])


CALL = '{"name": "f", "arguments": {"a": 1}}'
UNKNOWN = '{"name": "g"}'
F = ("f", '{"a": 1}')


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"\n\n<tool_call>{CALL}</tool_call>\n", ""),
        (f"Let me see.\n\n<tool_call>{CALL}</tool_call>\n\n", "Let me see."),
        (f"<tool_call>{CALL}</tool_call>\nThere.", "\nThere."),
        (f"One \n<tool_call>{CALL}</tool_call>\n two ", "One\n two "),
    ],
)
def test_whitespace_before_a_call_and_after_the_last_is_no_content(text, content) -> None:
    assert parse(HERMES, text) == (content, [F])


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        # not offered
        (HERMES, f"<tool_call>{UNKNOWN}</tool_call>", None, []),
        (LLAMA, '{"name": "Alice", "parameters": 3}', None, []),
        (MISTRAL, "[TOOL_CALLS]ge[ARGS]{}", None, []),
        (HERMES, f"<tool_call>{UNKNOWN}</tool_call>\n<tool_call>{CALL}</tool_call>", f"<tool_call>{UNKNOWN}</tool_call>", [F]),
        # no call
        (LLAMA, '{"answer": [1, 2]}', None, []),
        (LLAMA, '{"arguments": {"a": 1}}', None, []),
        (LLAMA, '[{"a": 1}]', None, []),
        (LLAMA, "{}", None, []),
        (LLAMA, '<|python_tag|>print("hi")', None, []),
        (LLAMA, f"Like so: {CALL}", None, []),
        (MISTRAL, "[TOOL_CALLS] []", None, []),
        (LLAMA, f"; {CALL}", None, []),
        (LLAMA, f"{CALL}]", "]", [F]),
        (HERMES, "<tool_call></tool_call>", None, []),
        (HERMES, f"<tool_call>\n<tool_call>{CALL}</tool_call>", "<tool_call>", [F]),
        (HERMES, f"{CALL}</tool_call>", None, []),
        # malformed before the call is announced
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name: "f"}</tool_call>', None, []),
        (HERMES, "<tool_call>{'name': 'f'}</tool_call>", None, []),
        (HERMES, '<tool_call>{"name": f}</tool_call>', None, []),
        # malformed after that
        (HERMES, f"<tool_call>{CALL}}}\n</tool_call>", "}", [F]),
        (HERMES, f"<tool_call>{CALL[:-1]}\n</tool_call>\nDone.", "\nDone.", [F]),
        (HERMES, f"<tool_call>{CALL}\n<tool_call>{CALL}", "", [F, F]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>', "", [("f", '{"a": 1\n')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": oops}</tool_call>', ', "arguments": oops}', [("f", "")]),
        (MISTRAL, f"[TOOL_CALLS][{CALL}, {UNKNOWN}]", f", {UNKNOWN}]", [F]),
        # more keys, or keys that come twice
        (LLAMA, '{"type": "function", "name": "f", "why": [{}], "parameters": {"a": 1}, "id": "1"}', "", [F]),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}, "arguments": {"b": 2}, "name": "get"}', "", [F]),
        # arguments of other kinds
        (LLAMA, '{"name": "f", "parameters": null}', "", [("f", "{}")]),
        (LLAMA, '{"name": "f", "parameters": ""}', "", [("f", "{}")]),
        (LLAMA, '{"name": "f"}', "", [("f", "{}")]),
        (LLAMA, '{"name": "f", "parameters": [1, 2]}', "", [("f", "[1, 2]")]),
        (LLAMA, '{"name": "f", "parameters": -1.5}', "", [("f", "-1.5")]),
        (LLAMA, '{"name": "f", "parameters": {"a": "<}\\"\\\\"}}', "", [("f", '{"a": "<}\\"\\\\"}')]),
        (LLAMA, '{"name": "f", "arguments": "\\ud83d\\ude00 \\n \\x"}', "", [("f", "\\ud83d\\ude00 \n \\x")]),
        (LLAMA, '{"n\\u0061me": "\\u0066"}', "", [("f", "{}")]),
        # the end comes early
        (HERMES, "<tool_c", None, []),
        (HERMES, '<tool_call>\n{"name": "f', None, []),
        (HERMES, '<tool_call>{"name": "f", "argu', "", [("f", "")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\', "", [("f", '{"a')]),
        (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_", "\n<tool_", [F]),
        (MISTRAL, "[TOOL_CALLS]f[CALL_ID]12", "", [("f", "")]),
        # more than one call
        (LLAMA, f"{CALL}; {CALL}; Done.", "; Done.", [F, F]),
        (HERMES, f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", [F, F]),
    ],
)  # fmt: skip
def test_nothing_is_lost_that_is_no_call(format, text, content, calls) -> None:
    assert parse(format, text) == (text if content is None else content, calls)


@pytest.mark.parametrize("format", ToolCallFormat)
def test_the_time_is_proportional_to_the_length(format) -> None:
    reads = 0

    class Counted(ToolCallParser):
        def _hold(self) -> None:
            nonlocal reads
            reads += 1
            super()._hold()

    text = '<tool_call>{"arguments": "<tool_call>{\\"arguments\\": [TOOL_CALLS][{"id": {"' * 50
    collect(Counted(format, NAMES), [text])
    assert reads == len(text)


# Chat templates


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{{ '<tool_call>\n' }}{{ ipython }}", HERMES),
        ("{{ '[TOOL_CALLS][' }}", MISTRAL),
        ("{{ 'Environment: ipython\n' }}", LLAMA),
        ("{{ '<|python_tag|>' }}", LLAMA),
        ("{{ content }}", HERMES),
        (None, HERMES),
    ],
)
def test_the_format_is_that_of_the_chat_template(template, format) -> None:
    assert detect_format(template) is format


def tool(name, parameters=None) -> dict:
    function = {"name": name, "description": f"Says\n{name}"}
    return {"type": "function", "function": function | ({} if parameters is None else {"parameters": parameters})}


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_the_prompt_has_each_function_on_a_line_and_shows_the_format_that_is_parsed() -> None:
    tools = [tool("get_weather", WEATHER), tool("f")]
    prompt = tools_prompt(tools)
    lines = prompt.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line) for line in lines] == [tool["function"] for tool in tools]
    assert detect_format(prompt) is HERMES
    _, [call] = collect(ToolCallParser(HERMES, ["NAME"]), [prompt])
    assert call == ("NAME", '{"PARAMETER": "VALUE"}')


# Forced calls


def test_an_answer_that_is_all_arguments_is_one_call() -> None:
    parser = ForcedCallParser("f")
    pieces = [" ", "{", '"a": "<}"', "}", "\n"]
    results = [*map(parser.feed, pieces), parser.finish()]
    assert results == [
        ("", []),
        ("", [ToolCallDelta(0, "f", "{")]),
        ("", [ToolCallDelta(0, None, '"a": "<}"')]),
        ("", [ToolCallDelta(0, None, "}")]),
        ("", []),
        ("", []),
    ]
    assert collect(ForcedCallParser("f"), []) == ("", [])


@given(found=st.lists(calls(), min_size=1, max_size=3), space=SPACE, cuts=CUTS)
def test_an_array_of_calls_is_those_calls(found, space, cuts) -> None:
    text = f"{space}[{space}{f',{space}'.join(text for text, _ in found)}{space}]{space}"
    assert collect(ForcedCallParser(None), cut(text, cuts)) == ("", [call for _, call in found])
