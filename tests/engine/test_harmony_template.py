"""Conversations of gpt-oss: what its chat template makes of turns, calls, results and reasoning, as clients send them."""

import json
import re

import pytest
from harmony_model import create_harmony_tokenizer
from small_tokenizers import create_byte_tokenizer

from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.harmony import SPELLINGS, HarmonyTokens, Place, known_effort
from stepgraph.errors import RequestError

TEMPLATE = ChatTemplate(create_harmony_tokenizer())
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK = {"role": "user", "content": "u1"}


def called(*cities, **fields) -> dict:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for n, city in enumerate(cities)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls} | fields


def result(text: str, number: int = 0) -> dict:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


def said(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def rendered(*messages, tools=(TOOL,), **variables) -> str:
    """Behind the two messages in front of a conversation with tools."""
    prompt = TEMPLATE.render(messages, tools, variables=variables)
    return re.sub(r"^<\|start\|>system.*?<\|end\|><\|start\|>developer.*?<\|end\|>", "", prompt, flags=re.DOTALL)


CALL = '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "A"}<|call|>'
RESULT = '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"r1"<|end|>'
USER = "<|start|>user<|message|>u1<|end|>"
OPEN = "<|start|>assistant"


def thought(text: str) -> str:
    return f"<|start|>assistant<|channel|>analysis<|message|>{text}<|end|>"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_calls_is_shown_until_the_turn_has_its_answer(name) -> None:
    turn = [ASK, called("A", **{name: "t1"}), result("r1")]
    assert rendered(*turn) == USER + thought("t1") + CALL + RESULT + OPEN
    final = "<|start|>assistant<|channel|>final<|message|>a1<|end|>"
    answered = [*turn, said("assistant", "a1") | {name: "t2"}, said("user", "u2")]
    assert rendered(*answered) == USER + CALL + RESULT + final + USER.replace("u1", "u2") + OPEN


def test_reasoning_and_words_before_a_call_share_the_one_place_that_the_template_has() -> None:
    turn = [ASK, called("A", content="p1", reasoning_content="t1"), result("r1")]
    assert rendered(*turn) == USER + thought("t1\n\np1") + CALL + RESULT + OPEN
    assert rendered(ASK, called("A", content="p1"), result("r1")) == USER + thought("p1") + CALL + RESULT + OPEN


def test_calls_of_one_message_are_shown_one_by_one_each_before_its_result() -> None:
    second = CALL.replace("A", "B"), RESULT.replace("r1", "r2")
    turn = [ASK, called("A", "B", reasoning_content="t1"), result("r2", 1), result("r1")]
    assert rendered(*turn) == USER + thought("t1") + CALL + RESULT + "".join(second) + OPEN


@pytest.mark.parametrize(
    "messages",
    [
        [said("system", "s1"), said("developer", "d1"), ASK],
        [said("developer", "s1"), said("developer", "d1"), ASK],
        [said("system", "s1"), ASK, said("assistant", "a1"), said("developer", "d1"), said("user", "u2")],
    ],
)
def test_what_the_template_would_drop_of_the_developers_words_is_said_elsewhere(messages) -> None:
    prompt = TEMPLATE.render(messages, [])
    assert [prompt.count(message["content"]) for message in messages] == [1] * len(messages)
    assert "<|start|>developer<|message|>s1" in prompt


def test_tools_without_a_description_are_shown_where_the_template_takes_that_for_granted() -> None:
    for more in ({}, {"description": "Of a city."}):
        tool = {"type": "function", "function": {"name": "weather", **more}}
        shown = f"// {more.get('description', '')} weather<|end|>"
        assert shown in TEMPLATE.render([ASK], [tool])


def test_effort_is_the_templates_variable() -> None:
    for variables, shown in (({}, "medium"), ({"reasoning_effort": "low"}, "low")):
        assert f"Reasoning: {shown}<|end|>" in TEMPLATE.render([ASK], [], variables=variables)


def test_efforts_that_the_model_does_not_know_are_the_nearest_or_refused() -> None:
    asked = ("low", "medium", "high", "none", "minimal", "xhigh", "max")
    assert [known_effort(effort) for effort in asked] == ["low", "medium", "high", "low", "low", "high", "high"]
    with pytest.raises(
        RequestError, match=r"reasoning_effort='lots' is not known to the model; use low, medium or high"
    ):
        known_effort("lots")


def test_a_tokenizer_without_one_of_the_tokens_or_with_one_as_text_has_none_of_the_format() -> None:
    assert HarmonyTokens.of(None) is None
    for is_special in (True, False):
        tokenizer = create_byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(SPELLINGS[:-1])})
        assert HarmonyTokens.of(tokenizer) is None
        tokenizer.add_tokens([SPELLINGS[-1]], special_tokens=is_special)
        assert (HarmonyTokens.of(tokenizer) is not None) == is_special


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        (f"{USER}{OPEN}", Place(True, None)),
        (USER, Place(False, None)),
        ("hello", Place(False, None)),
        (f"{USER}{OPEN}<|channel|>final<|message|>It is", Place(True, "final")),
        (f"{USER}{OPEN}<|channel|>analysis to=x <|constrain|>json<|message|>", Place(True, "analysis")),
        (f"{OPEN}<|message|>It", Place(True, "")),
        (f"{USER}{thought('t1')}", Place(False, None)),
        (CALL, Place(False, None)),
    ],
)
def test_where_an_answer_goes_on_is_read_from_the_prompts_end(prompt, place) -> None:
    assert Place.behind(prompt) == place


def test_a_last_message_that_is_gone_on_with_stays_open() -> None:
    prompt = TEMPLATE.render(
        [ASK, said("assistant", "It is")], [], add_generation_prompt=False, continue_final_message=True
    )
    assert prompt.endswith("<|start|>assistant<|channel|>final<|message|>It is")
