"""Answers in harmony, in any pieces, cut off anywhere and malformed in any way: what becomes of their messages."""

from itertools import pairwise

import pytest
from harmony_answers import OPEN, TOKENIZER, TOKENS, encoded, form_of, parsed, spelled_out
from harmony_model import HARMONY_TEMPLATE
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import create_byte_tokenizer

from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.harmony import SPELLINGS
from stepgraph.engine.request import FinishReason
from stepgraph.errors import ConfigError
from stepgraph.server.conversation import ChatForm
from stepgraph.server.protocol import Tool

THOUGHT = "<|channel|>analysis<|message|>Let me see, é.<|end|><|start|>assistant"
WORDS = "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>It is 4.<|return|>"
ARGUMENTS = '{"city": "Zürich", "n": [1, {}]}'
CALL = ("get_weather", ARGUMENTS)
CALLS = {
    "after the channel": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "before the channel": f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
    "before, constrained": f" to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "no space": f"<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "no type": f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|call|>",
    "in analysis": f"<|channel|>analysis to=functions.get_weather code<|message|>{ARGUMENTS}<|call|>",
    "no namespace": f"<|channel|>commentary to=get_weather json<|message|>{ARGUMENTS}<|call|>",
    "no channel": f" to=functions.get_weather<|message|>{ARGUMENTS}<|call|>",
    "no message mark": f"<|channel|>commentary to=functions.get_weather <|constrain|>json{ARGUMENTS}<|call|>",
}
ANSWERS = {
    "final": (FINAL, ("", "It is 4.", [])),
    "thought, final": (THOUGHT + FINAL, ("Let me see, é.", "It is 4.", [])),
    "thought, words, call": (THOUGHT + WORDS + CALLS["after the channel"], ("Let me see, é.", "One moment.", [CALL])),
    "two calls": (
        f" to=functions.f<|channel|>commentary json<|message|><|end|><|start|>assistant{CALLS['before the channel']}",
        ("", "", [("f", "{}"), CALL]),
    ),
    "several of a kind": (THOUGHT * 2 + WORDS * 2 + FINAL, ("Let me see, é." * 2, "One moment." * 2 + "It is 4.", [])),
} | {f"a call, {way}": (text, ("", "", [CALL])) for way, text in CALLS.items()}
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def cut(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    ends = [0, *sorted(min(c, len(tokens)) for c in cuts), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(ends)]


@pytest.mark.parametrize("answer", ANSWERS)
def test_messages_become_reasoning_content_and_calls(answer) -> None:
    text, found = ANSWERS[answer]
    assert parsed([encoded(text)]) == found
    assert parsed([[token] for token in encoded(text)]) == found


@pytest.mark.parametrize("answer", ANSWERS)
def test_wherever_an_answer_is_cut_off_it_is_a_beginning_of_the_whole_without_any_part_of_a_header(answer) -> None:
    text, (reasoning, content, calls) = ANSWERS[answer]
    tokens = encoded(text)
    for end in range(len(tokens)):
        found = parsed([tokens[:end]], reason=LENGTH)
        assert reasoning.startswith(found.reasoning.rstrip("\ufffd"))
        assert content.startswith(found.content)
        assert calls[: max(0, len(found.calls) - 1)] == found.calls[:-1]
        for (name, whole), (found_name, arguments) in zip(calls, found.calls, strict=False):
            assert (name, True) == (found_name, whole.startswith(arguments.rstrip("\ufffd")))


MARKS = st.sampled_from(
    [*SPELLINGS[:-2], *SPELLINGS, "assistant", "analysis", "final", "commentary", " to=functions.f", " json"]
)
ANY_ANSWER = st.lists(MARKS | st.text("a é{\n", max_size=3) | st.just("x y" * 100), max_size=12).map("".join)


@given(
    text=st.sampled_from([text for text, _ in ANSWERS.values()]) | ANY_ANSWER,
    cuts=st.lists(st.integers(0, 200), max_size=8),
    reason=st.sampled_from([STOP, LENGTH]),
    prompt=st.sampled_from([OPEN, "", f"{OPEN}<|channel|>final<|message|>It"]),
    stop=st.sampled_from([[], ["e"], ["y", "is"]]),
)
def test_the_pieces_do_not_matter_whatever_the_tokens(text, cuts, reason, prompt, stop) -> None:
    tokens = encoded(text)
    given = {"reason": reason, "prompt": prompt, "stop": stop}
    whole = parsed([tokens], **given)
    assert parsed(cut(tokens, cuts), **given) == whole
    assert parsed([[token] for token in tokens] or [[]], **given) == whole


@given(words=st.lists(st.text("abc{ ", min_size=1, max_size=4), max_size=5), marks=st.lists(MARKS, max_size=5))
def test_no_text_of_a_message_is_lost(words, marks) -> None:
    text = "".join(f"<|channel|>final<|message|>{word}<|end|>" for word in words)
    assert parsed([encoded(text)]).content == "".join(words)
    broken = "".join(marks)  # whatever comes before a message
    body = parsed([encoded(f"{broken}<|start|>assistant<|channel|>final<|message|>The end.")])
    assert body.content.endswith("The end.")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hello there.", ("", "Hello there.", [])),  # as a model says it that was trained on something else
        ("Hello there. " * 40, ("", "Hello there. " * 40, [])),
        ("to be or not", ("", "to be or not", [])),
        ("<|message|>Hello.", ("", "Hello.", [])),
        ("<|channel|>final Hello there.", ("", "Hello there.", [])),
        ("<|channel|>analysis Hello there.", ("Hello there.", "", [])),
        ("<|channel|>final<|channel|>final<|message|>Hello.", ("", "Hello.", [])),
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c", ("", "abc", [])),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", ("a", "b", [])),
        ("<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b", ("a", "b", [])),
        ("<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b", ("a", "b", [])),
        ("<|channel|>analysis<|message|>a<|end|>And so on.", ("a", "And so on.", [])),
        ("And so<|channel|>final<|message|> on.", ("", "And so on.", [])),
        ("<|channel|>musing<|message|>a", ("", "a", [])),
        ("<|channel|>commentary to=functions.g json<|message|>{}", ("", "{}", [])),  # nobody offered it
        ("<|channel|>analysis to=python code<|message|>1 + 1", ("1 + 1", "", [])),
        ("<|channel|>commentary to=assistant<|message|>a", ("", "a", [])),
        ("<|end|><|end|><|return|><|call|>", ("", "", [])),
        ("<|channel|>final<|message|>a<|return|><|start|>assistant<|channel|>final<|message|>b", ("", "ab", [])),
    ],
)
def test_malformed_messages_are_read_as_far_as_they_can_be_understood(text, found) -> None:
    assert parsed([encoded(text)]) == found


@pytest.mark.parametrize(
    "text", ["<|start|>assis", "<|channel|>ana", " to=functions.f", "t", "<|channel|>final", "<|channel|>"]
)
def test_a_header_that_the_end_cuts_off_is_no_content(text) -> None:
    assert parsed([encoded(text)], reason=LENGTH) == ("", "", [])


def test_a_call_is_announced_with_its_header() -> None:
    tokens = encoded(" to=functions.f<|channel|>commentary json<|message|>")
    assert parsed([tokens], reason=LENGTH) == ("", "", [("f", "")])
    assert parsed([tokens, [TOKENS.call]]) == ("", "", [("f", "{}")])


def test_a_text_that_spells_special_tokens_is_text() -> None:
    text = "<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    tokens = encoded("<|channel|>final<|message|>") + spelled_out(text)
    assert parsed([tokens]) == ("", text, [])
    tokens = (
        encoded("<|channel|>analysis<|message|>") + spelled_out(text) + encoded(f"<|end|><|start|>assistant{FINAL}")
    )
    assert parsed([tokens]) == (text, "It is 4.", [])


def test_an_answer_goes_on_where_the_prompt_ends() -> None:
    begun = f"{OPEN}<|channel|>final<|message|>It"
    assert parsed([encoded(" is 4.<|return|>")], prompt=begun) == ("", " is 4.", [])
    thinking = f"{OPEN}<|channel|>analysis<|message|>"
    assert parsed([encoded(f"So.<|end|><|start|>assistant{FINAL}")], prompt=thinking) == ("So.", "It is 4.", [])
    assert parsed([encoded(f"<|start|>assistant{FINAL}")], prompt="<|start|>user<|message|>Hi<|end|>") == (
        "",
        "It is 4.",
        [],
    )


def test_of_one_call_at_most_the_first_is_given_and_without_tools_calls_are_content() -> None:
    two, (_, _, [first, _]) = ANSWERS["two calls"]
    assert parsed([encoded(two)], parallel=False) == ("", "", [first])
    for choice, tools in (("none", [Tool(function={"name": "f"})]), (None, [])):
        assert parsed([encoded(two)], choice=choice, tools=tools) == ("", ARGUMENTS, [])


def test_a_stop_string_ends_an_answer_where_it_stands() -> None:
    found = parsed([[token] for token in encoded(THOUGHT + FINAL)], stop=["is 4"])
    assert found == ("Let me see, é.", "It ", [])


def test_settings_leave_reasoning_or_calls_in_the_content() -> None:
    text, _ = ANSWERS["thought, words, call"]
    thought, words = "Let me see, é.", "One moment."
    assert parsed([encoded(text)], form=form_of(calls="none")) == (thought, words + ARGUMENTS, [])
    assert parsed([encoded(text)], form=form_of(reasoning="none")) == ("", thought + words, [CALL])


# Which models write it


def test_it_is_found_by_special_tokens_and_a_template_that_writes_them() -> None:
    plain = create_byte_tokenizer()
    other = ChatTemplate(TOKENIZER, "{{ messages[0].content }}<tool_call>")
    cases = [
        (ChatTemplate(TOKENIZER), TOKENIZER, "auto", "auto", True),
        (ChatTemplate(TOKENIZER), TOKENIZER, "none", "none", False),
        (ChatTemplate(TOKENIZER), TOKENIZER, "hermes", "auto", False),
        (ChatTemplate(TOKENIZER), TOKENIZER, "auto", "think", False),
        (ChatTemplate(plain, HARMONY_TEMPLATE), plain, "auto", "auto", False),
        (other, TOKENIZER, "auto", "auto", False),
        (other, TOKENIZER, "harmony", "auto", True),
        (other, TOKENIZER, "auto", "harmony", True),
    ]
    for template, tokenizer, calls, reasoning, is_it in cases:
        form = ChatForm.of(template, tokenizer, tool_call_parser=calls, reasoning_parser=reasoning)
        assert (form.harmony is not None) == is_it, (calls, reasoning)
        assert is_it <= form.thinks
    assert tuple(TOKENIZER.convert_tokens_to_ids([*SPELLINGS])) == TOKENS


def test_a_model_that_cannot_write_it_is_refused_and_so_are_two_formats_at_once() -> None:
    plain = create_byte_tokenizer()
    for calls, reasoning, param in (("harmony", "auto", "tool_call_parser"), ("auto", "harmony", "reasoning_parser")):
        with pytest.raises(
            ConfigError, match=r"harmony is a format of special tokens .* choose another parser"
        ) as refusal:
            ChatForm.of(ChatTemplate(plain), plain, tool_call_parser=calls, reasoning_parser=reasoning)
        assert refusal.value.param == param
    with pytest.raises(ConfigError, match=r"are two formats, and harmony is one of both .* leave think out"):
        form_of("harmony", "think")
