"""Reasoning apart from content, however the answer is cut into pieces."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.engine.session import AnswerDelta
from stepgraph.server.chat import num_reasoning
from stepgraph.server.pieces import Piece
from stepgraph.server.reasoning import GEMMA4, THINK, ReasoningParser, starts_inside, tags_of

ANSWERS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", "\n", " ", "a", "é"]), max_size=14
).map("".join)


def parse(pieces, inside: bool) -> tuple[str, str]:
    parser = ReasoningParser(starts_inside=inside)
    results = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(reasoning for reasoning, _ in results), "".join(content for _, content in results)


def by_definition(answer: str, inside: bool) -> tuple[str, str]:
    begin = re.match(r"\s*<think>", answer)
    if begin is None and not inside:
        return "", answer
    reasoning, _, content = answer[begin.end() if begin else 0 :].partition("</think>")
    return reasoning.strip(), content.lstrip()


@given(ANSWERS, st.booleans(), st.lists(st.integers(0, 60)))
def test_any_answer_in_any_pieces_is_split_at_its_tags(answer, inside, cuts) -> None:
    cuts = [0, *sorted(cuts), len(answer)]
    pieces = [answer[a:b] for a, b in pairwise(cuts)]
    assert parse(pieces, inside) == by_definition(answer, inside)
    assert parse(answer, inside) == by_definition(answer, inside)


@pytest.mark.parametrize(
    ("answer", "inside", "reasoning", "content"),
    [
        ("<think>\nWell.\n</think>\n\nYes.\n", False, "Well.", "Yes.\n"),
        ("Well.\n</think>\n\nYes.", True, "Well.", "Yes."),
        ("<think>\nWell.</think>Yes.", True, "Well.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("\n Yes.", False, "", "\n Yes."),
        ("Tags are <think>such</think>.", False, "", "Tags are <think>such</think>."),
        ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
        ("<think>a\n\nb", False, "a\n\nb", ""),
        ("<think>a </thin", False, "a </thin", ""),
        ("Well", True, "Well", ""),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
    ],
)
def test_an_answer_is_split_into_reasoning_and_content(answer, inside, reasoning, content) -> None:
    assert parse([answer], inside) == (reasoning, content)


def test_only_what_may_be_a_tag_and_whitespace_before_it_are_held_back() -> None:
    parser = ReasoningParser(starts_inside=False)
    fed = ["<think>", "Let me", " see \n", "a < b", " <", "/b", "\n</th", "ink>", "\n\n", "Yes. <", "think>"]
    assert [parser.feed(text) for text in fed] == [
        ("", ""),
        ("Let me", ""),
        (" see", ""),
        (" \na < b", ""),
        ("", ""),
        (" </b", ""),
        ("", ""),
        ("", ""),
        ("", ""),
        ("", "Yes. <"),
        ("", "think>"),
    ]


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|Assistant|><think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_an_answer_starts_inside_if_its_prompt_ends_with_the_tag(prompt, inside) -> None:
    assert starts_inside(prompt) == inside


def test_a_model_thinks_if_its_chat_template_has_the_tags() -> None:
    assert tags_of("{% if enable_thinking %}<think>\n{% endif %}") == THINK
    assert tags_of("{{ content.split('</think>')[-1] }}") == THINK
    assert tags_of("{{ content.split('<channel|>')[-1] }}<|channel>thought") == GEMMA4
    assert tags_of("<|channel|>{{ content }}") is None
    assert tags_of(None) is None


@pytest.mark.parametrize(
    ("num_tokens", "text", "reasoning", "expected"),
    [
        (1, "a", "a", 1),
        (1, "a", "", 0),
        (4, "", "held back", 4),
        (3, "abc", "<abc", 3),  # with what was held back before
        (4, "ab</think>de", "ab", 1),
        (1, "ab</think>", "ab", 1),
        (5, "abcd e", "abc", 3),
    ],
)
def test_tokens_that_come_together_are_reasoning_as_far_as_their_text_is(num_tokens, text, reasoning, expected) -> None:
    delta = AnswerDelta(0, text, tuple(range(num_tokens)), None, None, None)
    assert num_reasoning(delta, Piece(reasoning, "", [])) == expected
