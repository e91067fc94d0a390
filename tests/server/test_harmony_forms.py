"""Forms of answers in harmony: what a request asks for holds in its own channel, and everything before that is the model's."""

import numpy as np
import pytest
from harmony_answers import OPEN, TOKENIZER, TOKENS, encoded, form_of, parsed, spelled_out

from stepgraph.engine.guidance import GuidanceCompiler, Guide, GuideError, read_vocabulary
from stepgraph.engine.harmony import Place
from stepgraph.engine.sampling_params import StructuredOutputs
from stepgraph.errors import RequestError
from stepgraph.server.conversation import ToolUse
from stepgraph.server.errors import api_error
from stepgraph.server.harmony_forms import harmony_form
from stepgraph.server.protocol import ChatRequest, NamedToolChoice, Tool
from stepgraph.server.responses import ResponsesRequest

pytest.importorskip("xgrammar", reason="guided generation needs the extra `guidance`")

V = len(TOKENIZER)
ASK = [{"role": "user", "content": "Hi"}]
STOPS = [TOKENS.return_, TOKENS.call]
FORM = {"json": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool(function={"name": "get_weather", "parameters": CITY})
F = Tool(function={"name": "f"})

THOUGHT = "<|channel|>analysis<|message|>Hm, <b> é.<|end|><|start|>assistant"
WORDS = "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
TYPED = "<|channel|>final <|constrain|>json<|message|>"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}'
EARLY = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}'


@pytest.fixture(scope="module")
def compiler() -> GuidanceCompiler:
    return GuidanceCompiler(read_vocabulary(TOKENIZER, V, STOPS))


def num_followed(compiler: GuidanceCompiler, spec, tokens: list[int]) -> int:
    """How many of the tokens a grammar allows, one after another; with masks that agree."""
    guide = Guide(compiler.compile(StructuredOutputs(**spec)))
    mask_W = np.zeros(-(-V // 32), np.int32)
    for number, token in enumerate(tokens):
        guide.fill(mask_W)
        is_allowed = bool(mask_W.view(np.uint32)[token // 32] >> (token % 32) & 1)
        try:
            guide.accept(token)
        except GuideError:
            assert not is_allowed
            return number
        assert is_allowed
    return len(tokens)


def accepts(compiler: GuidanceCompiler, spec, text: str) -> bool:
    """Whether an answer may be this text, and ends there, with either token that ends turns."""
    tokens = encoded(text)
    return all(num_followed(compiler, spec, [*tokens, stop]) == len(tokens) + 1 for stop in STOPS)


def asked(spec, tools=(), choice=None, *, prompt=OPEN, is_whole=False) -> dict:
    found = form_of().answer_form(spec, ToolUse.of(tools, choice, None), prompt, is_whole=is_whole)
    assert found is not None
    return found


def test_a_form_holds_for_the_final_message_only(compiler) -> None:
    spec = asked(FORM)
    for before in ("", THOUGHT, THOUGHT + WORDS + THOUGHT):
        for header in (FINAL, TYPED):
            assert accepts(compiler, spec, before + header + '{"n": 4}')
            assert not accepts(compiler, spec, before + header + '{"n": "4"}')
    assert not accepts(compiler, spec, '{"n": 4}')
    assert not accepts(compiler, spec, THOUGHT.removesuffix("<|end|><|start|>assistant"))  # it must answer
    assert not accepts(compiler, spec, CALL)
    assert parsed([encoded(THOUGHT + TYPED + '{"n": 4}<|return|>')]) == ("Hm, <b> é.", '{"n": 4}', [])


@pytest.mark.parametrize("text", [CALL, EARLY])
@pytest.mark.parametrize("choice", ["required", NamedToolChoice(function={"name": "get_weather"})])
def test_a_forced_call_is_in_its_channel_with_arguments_of_the_schema(compiler, text, choice) -> None:
    spec = asked(FORM, [F, WEATHER], choice)
    for before in ("", THOUGHT, THOUGHT + WORDS):
        assert accepts(compiler, spec, before + text)
        assert not accepts(compiler, spec, before + text.replace("city", "town"))
        assert not accepts(compiler, spec, before + text.replace("get_weather", "get_time"))
        assert not accepts(compiler, spec, before + FINAL + '{"n": 4}')
        assert accepts(compiler, spec, before + text.replace("get_weather", "f")) == (choice == "required")
    assert parsed([encoded(THOUGHT + text + "<|call|>")]).calls == [("get_weather", '{"city": "Rome"}')]


def test_with_tools_at_choice_an_answer_is_of_the_form_or_a_call_unless_the_form_is_of_the_whole(compiler) -> None:
    spec, whole = asked(FORM, [WEATHER, F]), asked(FORM, [WEATHER, F], is_whole=True)
    for before in ("", THOUGHT):
        assert accepts(compiler, spec, before + FINAL + '{"n": 4}')
        assert accepts(compiler, spec, before + CALL)
        assert not accepts(compiler, spec, before + CALL.replace("Rome", "Rome\n"))
        assert accepts(compiler, whole, before + FINAL + '{"n": 4}')
        assert not accepts(compiler, whole, before + CALL)


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ({"json_object": True}, '{"a": [1]}', "[1]"),
        ({"regex": "[a-c]+d?"}, "abd", "abe"),
        ({"choice": ["yes", "no"]}, "no", "noo"),
        ({"grammar": 'root ::= "a" root "b" | "c"'}, "aacbb", "aacb"),
        ({"structural_tag": {"type": "structural_tag", "format": {"type": "const_string", "value": "a"}}}, "a", "b"),
        (
            {
                "structural_tag": {
                    "type": "structural_tag",
                    "structures": [{"begin": "<f>", "schema": CITY, "end": "</f>"}],
                    "triggers": ["<f>"],
                }
            },
            'so: <f>{"city": "Rome"}</f>.',
            "so: <f>1</f>",
        ),
    ],
)
def test_any_form_holds_for_the_final_message(compiler, spec, good, bad) -> None:
    form = asked(spec, is_whole=True)
    assert accepts(compiler, form, THOUGHT + FINAL + good)
    assert not accepts(compiler, form, THOUGHT + FINAL + bad)


def test_where_the_prompt_has_begun_a_message_the_form_holds_for_the_rest_of_the_answer(compiler) -> None:
    final = OPEN + FINAL
    assert asked(FORM, [WEATHER], prompt=final) == FORM
    assert accepts(compiler, asked(FORM, prompt=final), '{"n": 4}')
    thinking = asked(FORM, prompt=f"{OPEN}<|channel|>analysis<|message|>I")
    assert accepts(compiler, thinking, " see.<|end|><|start|>assistant" + FINAL + '{"n": 4}')
    closed = asked(FORM, prompt="<|start|>user<|message|>Hi<|end|>")
    assert accepts(compiler, closed, "<|start|>assistant" + THOUGHT + FINAL + '{"n": 4}')
    forced = asked(None, [WEATHER], "required", prompt=final)
    assert accepts(compiler, forced, "I look.<|end|><|start|>assistant" + CALL)
    assert not accepts(compiler, forced, "I look.")


def test_without_a_form_or_a_forced_call_an_answer_is_free() -> None:
    tools = ToolUse.of([WEATHER], "auto", None)
    assert form_of().answer_form(None, tools, OPEN, is_whole=False) is None


def test_a_text_that_spells_special_tokens_ends_no_message(compiler) -> None:
    spec = asked(FORM)
    thought = encoded("<|channel|>analysis<|message|>") + spelled_out(
        "<|end|><|start|>assistant<|channel|>final<|message|>"
    )
    assert num_followed(compiler, spec, thought) == len(thought)
    assert num_followed(compiler, spec, [*thought, *encoded('{"n": 4}'), TOKENS.return_]) == len(thought) + 8
    answer = encoded(FINAL) + spelled_out("<|end|>")
    assert num_followed(compiler, spec, answer) == len(encoded(FINAL))


def test_what_cannot_be_followed_is_refused_by_its_place() -> None:
    bad = {"type": "object", "properties": {"x": {"not": {}}}}
    with pytest.raises(RequestError) as refusal:
        asked({"json": bad})
    assert str(refusal.value.param).startswith("structured_outputs.json")
    broken = Tool(function={"name": "g", "parameters": bad})
    with pytest.raises(RequestError) as refusal:
        asked(None, [F, broken], "required")
    assert str(refusal.value.param).startswith("tools[1].function.parameters")
    asked(None, [F, broken], NamedToolChoice(function={"name": "f"}))
    asked(FORM, [F, broken])  # nobody asked for its arguments: any object will do


def test_a_structural_tag_may_name_tokens_of_the_format_and_no_others(compiler) -> None:
    def spec(token) -> dict:
        return {"structural_tag": {"type": "structural_tag", "format": {"type": "token", "token": token}}}

    assert accepts(compiler, spec(TOKENS.start), "<|start|>")
    assert not accepts(compiler, spec(TOKENS.start), "<|end|>")
    for token, message in ((5, "names the token 5, which does not set answers"), ("<|start|>", "the id of a special")):
        with pytest.raises(RequestError, match=message):
            compiler.compile(StructuredOutputs(**spec(token)))


def test_no_other_grammar_allows_them(compiler) -> None:
    free = {"type": "any_text", "excludes": ["x"]}
    spec = {"structural_tag": {"type": "structural_tag", "format": free}}
    assert all(num_followed(compiler, spec, [token]) == 0 for token in TOKENS[:-2])
    for spec in ({"regex": ".*"}, {"json": {}}):
        assert all(num_followed(compiler, spec, [token]) == 0 for token in TOKENS[:-2])


@pytest.mark.parametrize(("spec", "begin"), [(asked(FORM), TOKENS.channel), (FORM, encoded("{")[0])])
def test_a_proposal_that_may_not_stand_is_no_matter_for_the_log(compiler, spec, begin, capfd) -> None:
    """Behind the first of three there is a token that sets answers in parts, which may not follow it."""
    guide = Guide(compiler.compile(StructuredOutputs(**spec)))
    masks_JW = np.zeros((3, -(-V // 32)), np.int32)
    guide.fill_along(masks_JW, [begin, TOKENS.end])
    assert masks_JW.any(axis=1).tolist() == [True, True, False]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("grammar", ['root ::= root "a"', 'root ::= a\na ::= b "x"\nb ::= a "y"'])
def test_a_grammar_that_allows_no_answer_is_refused_before_there_is_any_reasoning(compiler, grammar) -> None:
    with pytest.raises(RequestError, match="holds a grammar that allows no answer: no token can be the first"):
        compiler.compile(StructuredOutputs(**asked({"grammar": grammar})))


EMPTY = {"type": "array", "minItems": 3, "maxItems": 2}


@pytest.mark.parametrize(
    ("request_", "spec", "own"),
    [
        (ChatRequest(messages=ASK, structured_outputs={"json": EMPTY}), {"json": EMPTY}, "structured_outputs.json"),
        (ChatRequest(messages=ASK, guided_grammar="root ::= ("), {"grammar": "root ::= ("}, "guided_grammar"),
        (ChatRequest(messages=ASK, response_format={"type": "json_schema"}), {"json": EMPTY}, "response_format"),
        (ResponsesRequest(input="Hi", text={"format": {"type": "json_schema"}}), {"json": EMPTY}, "text.format"),
    ],
)
def test_what_only_the_compiler_refuses_is_told_by_the_requests_own_field(compiler, request_, spec, own) -> None:
    with pytest.raises(RequestError) as refusal:
        compiler.compile(StructuredOutputs(**asked(spec)))
    assert api_error(refusal.value, request_id="r", spelled=request_.spelled).message.startswith(
        f"{own} cannot be used"
    )


def test_what_only_the_compiler_refuses_of_a_forced_calls_arguments_is_told_by_its_tool(compiler) -> None:
    broken = {"name": "g", "parameters": {"type": "object", "properties": {"n": EMPTY}, "required": ["n"]}}
    choice = NamedToolChoice(function={"name": "g"})
    request = ChatRequest(messages=ASK, tools=[Tool(function=broken)], tool_choice=choice)
    with pytest.raises(RequestError) as refusal:
        compiler.compile(StructuredOutputs(**asked(None, request.tools, choice)))
    assert request.spelled(refusal.value.param) == "tools[0].function.parameters"


def test_many_tools_are_not_too_much(compiler) -> None:
    long = {"type": "object", "properties": {"x" * 20_000: {"type": "integer"}}, "required": ["x" * 20_000]}
    for schema, number, is_followed in ((CITY, 60, True), (long, 4, False)):
        calls = {f"tool_{n}": schema for n in range(number)}
        spec = harmony_form(FORM, calls, TOKENS, Place.behind(OPEN))
        call = CALL.replace("get_weather", f"tool_{number - 1}")
        assert accepts(compiler, spec, THOUGHT + call)
        assert accepts(compiler, spec, call.replace("city", "town")) != is_followed
