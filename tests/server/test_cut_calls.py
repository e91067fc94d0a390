"""Answers with calls, cut off anywhere and arriving in any pieces: what is part of a call never becomes content."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.server.conversation import AnswerParser, ChatForm, ToolUse
from stepgraph.server.protocol import NamedToolChoice, Tool
from stepgraph.server.tool_formats import ToolCallFormat

HERMES, LLAMA, MISTRAL = ToolCallFormat.HERMES, ToolCallFormat.LLAMA, ToolCallFormat.MISTRAL
A, B = ("get", '{"a": "é\\n{"}'), ("f", '{"b": [1, {}]}')
CALLS = [A, B]
TOOLS = [Tool(function={"name": name}) for name in ("f", "get", "get_weather")]


def written(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def late(name: str, arguments: str) -> str:
    return f'{{"arguments": {arguments}, "type": "function", "name": "{name}"}}'


ANSWERS = {
    "hermes": (HERMES, None, "\n".join(f"<tool_call>\n{written(*call)}\n</tool_call>" for call in CALLS)),
    "hermes, names last": (HERMES, None, "".join(f"<tool_call>{late(*call)}</tool_call>" for call in CALLS)),
    "hermes, text before": (HERMES, None, "See <b>.\n\n" + "\n".join(f"<tool_call>{written(*c)}</tool_call>" for c in CALLS)),
    "hermes, a list": (HERMES, None, f"<tool_call>[{written(*A)}, {written(*B)}]</tool_call>"),
    "llama": (LLAMA, None, "; ".join(written(*call, "parameters") for call in CALLS)),
    "llama, a list": (LLAMA, None, f"[{written(*A)},\n {written(*B)}]"),
    "llama, marked": (LLAMA, None, "<|python_tag|>" + written(*A, "parameters") + ";" + written(*B, "parameters")),
    "mistral, a list": (MISTRAL, None, f"[TOOL_CALLS] [{written(*A)}, {written(*B)}]"),
    "mistral": (MISTRAL, None, "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in CALLS)),
    "mistral, ids": (MISTRAL, None, "Ok. [TOOL_CALLS]" + "".join(f"{n}[CALL_ID]q1w2e3r4t[ARGS]{a}" for n, a in CALLS)),
    "required": (None, "required", f"[ {written(*A)} , {written(*B)} ]"),
    "required, compact": (HERMES, "required", f"[{written(*A)},{written(*B)}]".replace(": ", ":")),
}  # fmt: skip


def parser_of(format: ToolCallFormat | None, choice: str | dict | None) -> AnswerParser:
    form = ChatForm(ChatTemplate(None), format, thinks=False)
    return AnswerParser(form, ToolUse.of(TOOLS, choice, None), prompt=None, guided=choice is not None)


def parsed(parser: AnswerParser, pieces: list[str], reason: str = "length") -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of an answer that ends for a reason."""
    found = [parser.feed(piece) for piece in pieces] + [parser.feed("", finish_reason=reason)]
    calls: list[tuple[str, str]] = []
    for piece in found:
        for call in piece.calls:
            if call.name is not None:
                calls.append((call.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = (name, arguments + call.arguments)
    return "".join(piece.content for piece in found), calls


def check(answer: str, end: int, content: str, calls: list[tuple[str, str]]) -> None:
    """What is found in the first `end` characters of an answer."""
    _, _, text = ANSWERS[answer]
    prose = {"hermes, text before": "See <b>.", "mistral, ids": "Ok."}.get(answer, "")
    assert content.rstrip() in (prose[:end].rstrip(), prose[:end].rstrip("< "))  # a mark may begin with "<"
    expected = [(name, arguments.replace(": ", ":")) for name, arguments in CALLS] if "compact" in answer else CALLS
    whole = [call for call in expected if text.index(call[1]) + len(call[1]) <= end]
    if answer == "hermes, names last":  # what comes before its name is kept until that is there
        whole = [call for call in whole if text.index(f'"{call[0]}"') + len(call[0]) + 2 <= end]
    assert calls[: len(whole)] == whole
    if len(calls) > len(whole):  # one more was announced
        [(name, arguments)] = calls[len(whole) :]
        assert name == expected[len(whole)][0]
        assert expected[len(whole)][1].startswith(arguments)


@pytest.mark.parametrize("answer", ANSWERS)
def test_wherever_an_answer_is_cut_off_whole_calls_are_kept_and_no_part_of_one_is_content(answer) -> None:
    format, choice, text = ANSWERS[answer]
    for end in range(len(text) + 1):
        found = parsed(parser_of(format, choice), [text[:end]])
        check(answer, end, *found)
        assert parsed(parser_of(format, choice), list(text[:end])) == found, end


@pytest.mark.parametrize("answer", ANSWERS)
@given(end=st.integers(0, 150), cuts=st.lists(st.integers(0, 150), max_size=6))
def test_the_pieces_do_not_matter(answer, end, cuts) -> None:
    format, choice, text = ANSWERS[answer]
    cut = text[:end]
    pieces = [cut[a:b] for a, b in pairwise([0, *sorted(cuts), len(cut)])]
    assert parsed(parser_of(format, choice), pieces) == parsed(parser_of(format, choice), [cut])


NAMED_CHOICE = NamedToolChoice(function={"name": "get"})


def test_of_a_named_call_its_arguments_are_kept_as_far_as_they_came() -> None:
    text = f" {A[1]} \n"
    for end in range(len(text) + 1):
        for pieces in ([text[:end]], list(text[:end])):
            content, calls = parsed(parser_of(None, NAMED_CHOICE), pieces)
            assert content == ""
            assert calls == ([("get", text[1 : min(end, 1 + len(A[1]))])] if end > 1 else [])


@pytest.mark.parametrize("choice", ["required", None])
def test_an_answer_that_the_model_ended_keeps_what_turned_out_to_be_no_call(choice) -> None:
    text = '<tool_call>{"name": "g'
    content, calls = parsed(parser_of(HERMES, choice), [text], "stop")
    assert (content, calls) == ("" if choice else text, [])


@pytest.mark.parametrize(
    ("format", "text"),
    [(HERMES, "a < b"), (HERMES, "x "), (LLAMA, '{"title": "A'), (MISTRAL, "see [1"), (HERMES, "<tool_call>{'no")],
)  # fmt: skip
def test_what_cannot_become_a_call_is_content_also_of_an_answer_that_is_cut_off(format, text) -> None:
    assert parsed(parser_of(format, None), [text]) == (text, [])
