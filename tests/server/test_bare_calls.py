"""Calls with bare names and texts between tokens, as Gemma 4 writes them, and its reasoning."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.server import reasoning
from stepgraph.server.bare_arguments import BareArguments
from stepgraph.server.conversation import ChatForm, ToolUse
from stepgraph.server.forced_calls import form_or_calls
from stepgraph.server.protocol import Tool
from stepgraph.server.tool_formats import ToolCallFormat, detect_format

TOOLS = [Tool(function={"name": name}) for name in ("f", "tools.get-it")]
TEMPLATE = "<|turn>model {{ messages }}<|channel>thought\n<channel|><|tool_call>call:{}<tool_call|>"
FORM = ChatForm.of(ChatTemplate(None, TEMPLATE), tool_call_parser="auto", reasoning_parser="auto")


def written(value) -> str:
    """As the model's chat template writes it."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{written(item)}" for name, item in value.items()) + "}"
    return f"[{','.join(map(written, value))}]" if isinstance(value, list) else json.dumps(value)


def call_of(name: str, arguments: dict) -> str:
    return f"<|tool_call>call:{name}{written(arguments)}<tool_call|>"


def parse(*pieces: str, reason: str = "stop") -> tuple[str, str, list[tuple[str, str]]]:
    parser = FORM.parser(ToolUse.of(TOOLS, None, None), prompt="<|turn>model\n", guided=False)
    found = [parser.feed(piece) for piece in pieces] + [parser.feed("", finish_reason=reason)]
    calls: list[tuple[str, str]] = []
    for call in (call for piece in found for call in piece.calls):
        calls += [(call.name, "")] if call.name is not None else []
        name, arguments = calls[call.index]
        calls[call.index] = (name, arguments + call.arguments)
    return "".join(piece.reasoning for piece in found), "".join(piece.content for piece in found), calls


VALUES = st.recursive(
    st.text('a "{}[],:\\\n<|é', max_size=8) | st.integers() | st.booleans() | st.none() | st.floats(-9, 9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from("abé"), values, max_size=2),
    max_leaves=6,
)
CALLS = st.tuples(st.sampled_from(["f", "tools.get-it"]), st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3))


@given(
    thought=st.sampled_from(["", "Let me see."]),
    prose=st.sampled_from(["", "See <b>."]),
    calls=st.lists(CALLS, max_size=3),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_reasoning_words_and_calls_are_found_in_any_pieces(thought, prose, calls, cuts) -> None:
    channel = f"<|channel>thought\n{thought}<channel|>" if thought else ""
    text = channel + prose + "".join(call_of(*call) for call in calls)
    found_thought, content, found = parse(*(text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])))
    assert (found_thought, content) == (thought, prose)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_wherever_an_answer_is_cut_off_its_calls_are_beginnings() -> None:
    text = "Ok. " + call_of("f", {"a": 'é"<', "b": [1, {"c": True}], "d": "x"})
    _, _, [(_, whole)] = parse(text)
    for end in range(len(text)):
        for pieces in ([text[:end]], list(text[:end])):
            _, content, calls = parse(*pieces, reason="length")
            assert content.rstrip() == text[: min(end, 3)]
            assert all(name == "f" and whole.startswith(arguments) for name, arguments in calls)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("{}", {}),
        ("{a:[],}", {"a": []}),
        ("{a:[1,2,],b:[ ]}", {"a": [1, 2], "b": []}),
        ('{<|"|>k:1<|"|>:2}', {"k:1": 2}),
        ('{"a, b":"x\\"y\n",c:hello there}', {"a, b": 'x"y\n', "c": "hello there"}),
        ("{ a : 1 , b : None , c : False}", {"a": 1, "b": None, "c": False}),
        ("{a:NaN,b:-1.5e3,c:01,d:}", {"a": "NaN", "b": -1500.0, "c": "01", "d": ""}),
        ("{a:1]}", {"a": 1}),
        ("{" + "a:[" * 500 + "]" * 500 + "}", None),
    ],
)
def test_what_is_written_otherwise_is_read_as_far_as_it_can_be_understood(text, arguments) -> None:
    reader = BareArguments()
    found = "".join(map(reader.feed, text))
    if arguments is not None:
        assert (json.loads(found), reader.is_complete) == (arguments, True)


@pytest.mark.parametrize(
    "text", ["<|tool_call>call:g{a:1}<tool_call|>", "<|tool_call>f{a:1}<tool_call|>", "<|tool_call>call:f"]
)
def test_what_is_no_call_is_content(text) -> None:
    assert parse(text) == ("", text, [])


def test_the_template_shows_the_format_and_its_tokens_are_kept_in_the_text() -> None:
    assert detect_format(TEMPLATE) is ToolCallFormat.GEMMA4
    assert (FORM.thinks, FORM.tags) == (True, reasoning.GEMMA4)
    nothing = ToolUse.of([], None, None)
    assert FORM.needs_special_tokens(nothing)
    plain = ChatForm.of(ChatTemplate(None, TEMPLATE), tool_call_parser="auto", reasoning_parser="none")
    assert not plain.needs_special_tokens(nothing)
    assert plain.needs_special_tokens(ToolUse.of(TOOLS, None, None))


def test_beside_a_form_calls_may_be_written_with_any_values() -> None:
    pytest.importorskip("xgrammar", reason="guided generation needs the extra `guidance`")
    from test_forced_calls import FORM as ANSWER
    from test_forced_calls import accepts, tool

    spec = form_or_calls(ANSWER, [tool("f")], ToolCallFormat.GEMMA4, parallel=True)
    for text in ('{"answer": "Rome"}', call_of("f", {"a": "b"}), call_of("f", {}) * 2):
        assert accepts(spec, text), text
    assert not accepts(spec, call_of("g", {}))
