"""Answers in harmony at a terminal: what is printed of them, and what is kept of a conversation."""

import pytest
from harmony_answers import TOKENIZER, TOKENS, deltas_of, encoded

from stepgraph.chat.printed_answer import PrintedAnswer
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.harmony import HarmonyTokens
from stepgraph.engine.request import FinishReason

THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
WORDS = "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>It is 4, é.<|return|>"


def printed(text: str, size: int, capsys, harmony=TOKENS, reason=FinishReason.STOP) -> tuple[str, str]:
    """What is printed of an answer that comes by so many tokens, and its text."""
    answer = PrintedAnswer(harmony)
    tokens = encoded(text)
    batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    for output in deltas_of(batches, reason, lambda session: [session.output()]):
        answer.show(output)
    return capsys.readouterr().out, answer.text


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_it_thinks_is_printed_between_tags_and_what_it_says_is_its_text(size, capsys) -> None:
    said = "It is 4, é."
    assert printed(FINAL, size, capsys) == (said, said)
    thought = "<think>\nLet me see.\n</think>\n\n"
    assert printed(THOUGHT + FINAL, size, capsys) == (thought + said, said)
    both = "One moment.\n\nIt is 4, é."
    assert printed(THOUGHT + WORDS + FINAL, size, capsys) == (thought + both, both)
    assert printed(THOUGHT.partition("<|end|>")[0], size, capsys, reason=FinishReason.LENGTH) == (
        "<think>\nLet me see.",
        "",
    )


def test_other_answers_are_printed_as_they_are(capsys) -> None:
    text = "analysisLet me see.assistantfinalIt is 4, é."
    assert printed(THOUGHT + FINAL, 5, capsys, harmony=None) == (text, text)


def test_a_model_writes_the_format_if_its_template_and_tokenizer_do() -> None:
    assert HarmonyTokens.written(TOKENIZER, ChatTemplate(TOKENIZER).text) == TOKENS
    assert HarmonyTokens.written(TOKENIZER, "{{ messages }}") is None
