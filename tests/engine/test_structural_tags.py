"""Structural tags: free text in which structures begin at triggers, and the formats of the newer form."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schemas import check, random_schema
from test_guidance import END, START, TOOL, VOCAB_SIZE, Walker, byte_tokenizer
from test_guided_requests import llm_byte
from tiny import EOS, drain

from stepgraph.engine import guided_text
from stepgraph.engine.guidance import Guide
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.errors import RequestError

pytest.importorskip("xgrammar", reason="guided generation needs the extra `guidance`")

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
TIME = {"type": "object", "properties": {"zone": {"enum": ["utc", "</function>"]}, "hour": {"type": "integer"}}}
OLDER = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<function=city>", "schema": CITY, "end": "</function>"},
        {"begin": "<function=time>", "schema": json.dumps(TIME), "end": "</function>"},
        {"begin": "[call]", "schema": {"type": "object"}, "end": ""},
    ],
    "triggers": ["<function=", "[call"],
}
STRUCTURES = {
    "<function=city>": (CITY, "</function>"),
    "<function=time>": (TIME, "</function>"),
    "[call]": ({"type": "object"}, ""),
}


def newer(format_: dict) -> dict:
    return {"type": "structural_tag", "format": format_}


def schema_format(schema) -> dict:
    return {"type": "json_schema", "json_schema": schema}


def triggered(structures, triggers, **more) -> dict:
    tags = [{"type": "tag", "begin": b, "content": schema_format(s), "end": e} for b, (s, e) in structures.items()]
    return newer({"type": "triggered_tags", "triggers": triggers, "tags": tags} | more)


def is_free(text, structures, triggers) -> bool:
    """Whether a text ends outside its structures, all of which are then known to be valid and closed."""
    at = 0
    while starts := [start for trigger in triggers if (start := text.find(trigger, at)) >= 0]:
        start = min(starts)
        begin = next((b for b in structures if text.startswith(b, start)), None)
        if begin is None:
            assert any(b.startswith(text[start:]) for b in structures), f"{text[start:]!r} is no structure"
            return False
        schema, end = structures[begin]
        try:
            value, stop = json.JSONDecoder().raw_decode(text, start + len(begin))
        except ValueError:  # not complete
            return False
        check(value, schema)
        if not text.startswith(end, stop):
            assert end.startswith(text[stop:]), f"{text[stop:]!r} is not {end!r}"
            return False
        at = stop + len(end)
    return True


def free_text_with_structures(walker, rng, tag, structures, triggers, num_tokens=150) -> str:
    """A random answer; at each of its tokens the end is allowed in free text, and nowhere else."""
    guide = Guide(walker.compiler.compile(StructuredOutputs(structural_tag=tag)))
    tokens: list[int] = []
    wanted: list[int] = []  # tokens of a structure's begin, or a part of it
    while True:
        text = walker.tokenizer.decode(tokens)
        free = is_free(text, structures, triggers)
        allowed_A = walker.allowed(guide)
        assert bool(walker.stops_among(allowed_A)) == free, text
        if free and not wanted and (len(tokens) > num_tokens or rng.random() < 0.02):
            guide.accept(next(iter(walker.stops)))
            assert guide.finished
            return text
        if free and not wanted and rng.random() < 0.2:
            begin = rng.choice([*structures])
            wanted = walker.tokenizer.encode(begin[: rng.randint(1, len(begin))], add_special_tokens=False)
        if wanted:
            token = wanted.pop(0)
            assert token in allowed_A, f"{walker.tokenizer.decode([token])!r} cannot follow {text!r}"
        else:
            rank_A = walker.rank[allowed_A]
            hurries = not free and (len(tokens) > num_tokens or rng.random() < 0.7)
            token = int(
                rng.choice(allowed_A[rank_A <= np.sort(rank_A)[min(2, len(rank_A) - 1)]] if hurries else allowed_A)
            )
            if token in walker.stops:
                continue
        guide.accept(token)
        tokens.append(token)
        assert len(tokens) < 3000, f"no end: {text!r}"


@pytest.fixture(scope="module")
def by_byte():
    return Walker(byte_tokenizer(), VOCAB_SIZE, [END])


@pytest.fixture(scope="module")
def by_word(smollm2):
    return Walker(smollm2.tokenizer(), smollm2.config.vocab_size, smollm2.config.eos_token_ids)


@pytest.mark.parametrize("tag", [OLDER, triggered(STRUCTURES, OLDER["triggers"])], ids=["older", "newer"])
def test_structures_are_enforced_from_their_trigger_on_and_the_end_is_allowed_in_free_text(by_byte, tag) -> None:
    texts = [
        free_text_with_structures(by_byte, random.Random(seed), tag, STRUCTURES, OLDER["triggers"])
        for seed in range(20)
    ]
    assert sum(begin in text for text in texts for begin in STRUCTURES) > 20


def test_tokens_that_reach_over_the_borders_of_structures_are_held_to_them(by_word) -> None:
    for seed in range(8):
        free_text_with_structures(by_word, random.Random(seed), OLDER, STRUCTURES, OLDER["triggers"], num_tokens=60)


def test_structures_follow_random_schemas(by_byte) -> None:
    for seed in range(12):
        schema = {
            "type": "object",
            "properties": {"a": random_schema(random.Random(seed)) | {"$defs": {}}},
            "required": ["a"],
        }
        schema["$defs"] = random_schema(random.Random(seed))["$defs"]
        structures = {"<f>": (schema, "</f>")}
        free_text_with_structures(
            by_byte, random.Random(seed), triggered(structures, ["<f"]), structures, ["<f"], num_tokens=60
        )


def test_a_structure_that_must_come_first_does(by_byte) -> None:
    tag = triggered({"<f>": (CITY, "</f>")}, ["<f"], at_least_one=True, stop_after_first=True)
    for seed in range(10):
        text = by_byte.answer(random.Random(seed), structural_tag=tag)
        assert text.startswith("<f>")
        assert text.endswith("</f>")
        check(json.loads(text[3:-4]), CITY)


def const(text) -> dict:
    return {"type": "const_string", "value": text}


def tag(content, begin="<t>", end="</t>") -> dict:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


ANY = {"type": "any_text"}
FORMATS = [
    (const('a"\\\n|é😀'), re.escape('a"\\\n|é😀')),
    ({"type": "regex", "pattern": r"^[a-c]{2,4}\d?$"}, r"[a-c]{2,4}\d?"),
    ({"type": "grammar", "grammar": 'root ::= x "," x\nx ::= [0-9]+'}, r"[0-9]+,[0-9]+"),
    ({"type": "sequence", "elements": [const("a"), {"type": "regex", "pattern": "b+"}, const("")]}, "ab+"),
    ({"type": "or", "elements": [const("a"), const("bc"), tag(const("x"))]}, "a|bc|<t>x</t>"),
    ({"type": "sequence", "elements": [{"type": "optional", "content": const("a")}, const("b")]}, "a?b"),
    ({"type": "star", "content": const("ab")}, "(ab)*"),
    ({"type": "plus", "content": {"type": "or", "elements": [const("a"), const("b")]}}, "[ab]+"),
    ({"type": "repeat", "min": 2, "max": 4, "content": const("ab")}, "(ab){2,4}"),
    ({"type": "repeat", "min": 2, "max": -1, "content": const("ab")}, "(ab){2,}"),
    (tag(const("x"), end=["</t>", "!"]), "<t>x(</t>|!)"),
    (tag(ANY), "<t>(?:(?!</t>).)*</t>"),
    (tag(ANY | {"excludes": ["a", "bc"]}), "<t>(?:(?!</t>|a|bc).)*</t>"),
    (tag(ANY, end=["</t>", "<e>"]), "<t>(?:(?!</t>|<e>).)*(</t>|<e>)"),
    (tag(tag(ANY, "<u>", "</u>")), "<t><u>(?:(?!</u>).)*</u></t>"),
    ({"type": "tags_with_separator", "tags": [tag(const("x"))], "separator": ","}, "|<t>x</t>(,<t>x</t>)*"),
    (
        {"type": "tags_with_separator", "tags": [tag(const("x"))], "separator": "", "at_least_one": True},
        "(<t>x</t>)+",
    ),
    ({"type": "dispatch", "rules": [["<a>", const("1")], ["<b>", const("2")]]}, "(?:<a>1|<b>2|(?!<a>|<b>).)*"),
    (
        {"type": "dispatch", "rules": [["<a>", const("1")]], "loop": False, "excludes": ["z"]},
        "(?:(?!<a>|z).)*(<a>1)?",
    ),
    (
        {"type": "triggered_tags", "triggers": ["<t"], "tags": [tag(const("x"))], "excludes": ["q"]},
        "(?:<t>x</t>|(?!<t|q).)*",
    ),
    (schema_format({"const": 7}) | {"style": "json", "any_order": False, "excludes": []}, "7"),
]


def answer_with(walker, rng, pieces, **spec) -> str:
    """A random answer in which some texts are likely."""
    guide = Guide(walker.compiler.compile(StructuredOutputs(**spec)))
    tokens: list[int] = []
    while len(tokens) < 3000:
        allowed = walker.allowed(guide).tolist()
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.2):
            return walker.tokenizer.decode(tokens)
        piece = walker.tokenizer.encode(rng.choice(pieces)) if rng.random() < 0.5 else []
        for token in piece or [rng.choice(allowed)]:
            if token == END or token not in walker.allowed(guide):
                break
            guide.accept(token)
            tokens.append(token)
    raise AssertionError(f"no end: {walker.tokenizer.decode(tokens)!r}")


@pytest.mark.parametrize(("format_", "expression"), FORMATS, ids=lambda value: str(value)[:60])
def test_answers_match_their_format(by_byte, format_, expression) -> None:
    pieces = ["<t>", "</t>", "<t", "</", "<u>", "</u>", "<e>", "<a>1", "<b>", "<a", "x"]
    for seed in range(30):
        text = answer_with(by_byte, random.Random(seed), pieces, structural_tag=newer(format_))
        assert re.fullmatch(expression, text, re.DOTALL), text


def test_free_text_is_any_text_without_special_tokens(by_byte) -> None:
    for format_ in (ANY, triggered(STRUCTURES, OLDER["triggers"])["format"]):
        guide = Guide(by_byte.compiler.compile(StructuredOutputs(structural_tag=newer(format_))))
        allowed = set(by_byte.allowed(guide).tolist())
        assert allowed >= {END, TOOL, *by_byte.tokenizer.encode("".join(map(chr, range(128))))}
        assert not allowed & {START, *range(TOOL + 1, VOCAB_SIZE)}


def older_with(**changes) -> dict:
    return OLDER | {"structures": [OLDER["structures"][0] | changes]} | {"triggers": ["<function="]}


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "structural_tag.type is None; it must be structural_tag"),
        ({"type": "json_schema", "format": ANY}, "type is 'json_schema'"),
        ({"type": "structural_tag"}, "structural_tag.structures is missing"),
        (newer(ANY) | {"triggers": ["a"]}, "structural_tag.triggers is not known"),
        (OLDER | {"structures": []}, "structural_tag.structures is .* not empty"),
        (OLDER | {"triggers": [""]}, r"structural_tag.triggers\[0\] is '';"),
        (OLDER | {"triggers": "<function="}, "structural_tag.triggers is '<function=';"),
        (older_with(begin="<f"), r"structures\[0\].begin is '<f', which starts with none"),
        (older_with(begin=5), r"structures\[0\].begin is 5; it must be a text"),
        (older_with(extra=5), r"structures\[0\].extra is not known"),
        (older_with(schema="{"), r"structures\[0\].schema is not JSON"),
        (older_with(schema=[]), r"structures\[0\].schema: \[\] at # is no schema"),
        (older_with(schema={"type": "array", "uniqueItems": True}), r"structures\[0\].schema: uniqueItems at #"),
        (older_with(end="\0"), r"structures\[0\].end holds U\+0000"),
        (older_with(end="\ud800"), r"structural_tag holds U\+D800"),
        (OLDER | {"triggers": ["<function=", "[call", "<x"]}, r"triggers\[2\] is '<x', with which no tag begins"),
        (OLDER | {"triggers": ["<function=", "[call", "function"]}, "'function' twice, or inside another"),
        (OLDER | {"triggers": ["<function=", "[call", "[call"]}, "twice"),
        (newer(5), "structural_tag.format is 5; it must be an object with a type"),
        (newer({"type": "token", "token": 3}), "names the token 3, which does not set answers of this model in parts"),
        (newer({"type": "exclude_token"}), "structural_tag.format is .* a type that is supported: const_string"),
        (newer({"type": "any_tokens"}), "a type that is supported"),
        (newer({"type": "qwen_xml_parameter", "json_schema": {}}), "a type that is supported"),
        (newer({"type": "const_string"}), "structural_tag.format.value is missing"),
        (newer(ANY | {"exclude": ["a"]}), "structural_tag.format.exclude is not known"),
        (newer(ANY | {"max_tokens": 5}), "format.max_tokens is 5; only None"),
        (newer(ANY | {"excludes": [""]}), r"format.excludes\[0\] is ''"),
        (newer(schema_format({}) | {"style": "qwen_xml"}), "format.json_schema|format.style is 'qwen_xml'; only 'json'"),
        (newer(schema_format({}) | {"any_order": True}), "format.any_order is True"),
        (newer(schema_format({"type": "integer", "multipleOf": 3})), "format.json_schema: multipleOf at #"),
        (newer(tag(tag(schema_format({"items": {"not": {}}})))), "content.content.json_schema: not at #/items"),
        (newer({"type": "regex", "pattern": "(?=a)"}), r"format.pattern: '\(\?=a' at 0"),
        (newer({"type": "regex", "pattern": ""}), "format.pattern is ''"),
        (newer({"type": "grammar", "grammar": 'root ::= "a" (= "b")'}), "format.grammar: .* lookahead"),
        (newer({"type": "sequence", "elements": [const("a"), {"type": "or", "elements": []}]}), r"elements\[1\].elements"),
        (newer({"type": "repeat", "min": 3, "max": 2, "content": const("a")}), "format.max is 2, below min"),
        (newer({"type": "repeat", "min": True, "max": 2, "content": const("a")}), "format.min is True"),
        (newer({"type": "star", "content": const("a"), "loop": True}), "format.loop is not known"),
        (newer({"type": "dispatch", "rules": [["a"]]}), r"format.rules\[0\] is \['a'\]"),
        (newer({"type": "dispatch", "rules": [["ab", ANY]], "excludes": ["b"]}), "excludes has 'b', which rules out"),
        (newer({"type": "tags_with_separator", "tags": [const("a")], "separator": ","}), r"tags\[0\].type is 'const_string'"),
        (newer(tag(ANY, end="")), "structural_tag cannot be used: .*end string must be non-empty"),
        (newer(const("")) | {"type": 5}, "type is 5"),
        # what would take too long
        (newer(const("a" * guided_text.MAX_TEXT_BYTES)), "at most"),
        (newer({"type": "sequence", "elements": [ANY] * 200}), "more than .* repetitions"),
        (newer({"type": "repeat", "min": 0, "max": 10**6, "content": const("a")}), "format.max is"),
        (newer({"type": "repeat", "min": 0, "max": 100, "content": {"type": "regex", "pattern": "a{1,100}"}}), "at most"),
        (newer({"type": "repeat", "min": 0, "max": 100, "content": schema_format({"type": "integer"})}), "at most"),
        (OLDER | {"triggers": [f"<{i}>" for i in range(300)]}, "at most"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_structural_tag_that_cannot_be_followed_is_refused_by_place(by_byte, given_, message) -> None:
    with pytest.raises(RequestError, match=message):
        by_byte.compiler.compile(StructuredOutputs(structural_tag=given_))


def test_formats_may_be_nested_as_deep_as_schemas_and_no_deeper(by_byte) -> None:
    format_ = const("a")
    for _ in range(guided_text.MAX_DEPTH - 1):
        format_ = {"type": "or", "elements": [format_]}
    by_byte.compiler.compile(StructuredOutputs(structural_tag=newer(format_)))
    with pytest.raises(RequestError, match="more than 64 deep"):
        by_byte.compiler.compile(StructuredOutputs(structural_tag=newer({"type": "star", "content": format_})))


def test_schemas_of_one_tag_share_one_budget(by_byte) -> None:
    def tools(bounds) -> dict:
        schemas = [{"type": "object", "properties": {"a": {"type": "string", "maxLength": bound}}} for bound in bounds]
        return triggered({f"<f{i}>": (schema, "</f>") for i, schema in enumerate(schemas)}, ["<f"])

    by_byte.compiler.compile(StructuredOutputs(structural_tag=tools([400] * 60)))
    with pytest.raises(
        RequestError, match=r"format.tags\[\d+\].content.json_schema: length at #/properties/a would take"
    ):
        by_byte.compiler.compile(StructuredOutputs(structural_tag=tools(range(400, 460))))


def test_a_tag_may_be_text(by_byte) -> None:
    assert StructuredOutputs(structural_tag=json.dumps(OLDER)).structural_tag == OLDER
    assert SamplingParams(structured_outputs={"structural_tag": OLDER}).structured_outputs.structural_tag == OLDER


def test_requests_with_structural_tags_share_steps_with_a_free_one(create_engine) -> None:
    engine = create_engine()
    letters = {chr(llm_byte(token)): token for token in range(1, 257)}
    structures = {"<f>": (TIME, "</f>")}
    guided = SamplingParams(
        temperature=1, seed=3, min_tokens=20, max_tokens=600, logit_bias={EOS: 6.0, letters["<"]: 6.0}
    )
    first = triggered(structures, ["<"], at_least_one=True)
    requests = [
        engine.add_request(
            f"guided-{i}", [1, 2], replace(guided, structured_outputs=StructuredOutputs(structural_tag=form))
        )
        for i, form in enumerate([{"type": "structural_tag", "triggers": ["<"], "structures": [
            {"begin": "<f>", "schema": TIME, "end": "</f>"}]}, first])
    ]  # fmt: skip
    free = SamplingParams(temperature=1, seed=5, max_tokens=40, ignore_eos=True)
    beside = engine.add_request("free", [4], free)
    drain(engine)
    for request in requests:
        assert request.finish_reason is FinishReason.STOP, request.error
        text = engine.tokenizer.decode(request.output_token_ids[:-1])
        assert is_free(text, structures, ["<"])
        assert "<f>{" in text
    alone = engine.add_request("alone", [4], free)
    drain(engine)
    assert alone.output_token_ids == beside.output_token_ids


KEYWORDS = [
    "type", "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum",
    "exclusiveMaximum", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "uniqueItems", "a",
    "begin", "end", "schema", "structures", "triggers", "tags", "content", "value", "json_schema", "elements", "excludes",
    "rules", "min", "max", "separator", "grammar", "loop", "style",
]  # fmt: skip
WORDS = [
    "object", "array", "string", "integer", "number", "null", "boolean", "a", "#", "#/$defs/a", "#/properties/a", "date", "uri",
    "^[a-z]{2,5}$", "(a|b)*", "root ::= \"a\" | [b-z]{1,3}", "root ::= TagDispatch((\"a\", b))\nb ::= \"c\"", "<f=", "<f=a>",
    "structural_tag", "tag", "triggered_tags", "const_string", "json_schema", "sequence", "or", "star", "repeat", "any_text",
    "regex", "grammar", "dispatch", "tags_with_separator", "optional", "plus",
]  # fmt: skip
TEXTS = st.sampled_from(WORDS) | st.text(alphabet=st.characters(), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([0, 1, 2, 10**30]) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYWORDS) | TEXTS, inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=400)
@given(kind=st.sampled_from(["json", "regex", "choice", "grammar", "structural_tag"]), value=VALUES)
def test_any_value_is_compiled_or_refused_with_a_reason(by_byte, kind, value) -> None:
    if kind == "structural_tag" and isinstance(value, dict):
        value |= {"type": "structural_tag"}
    reason = kind
    try:
        by_byte.compiler.compile(StructuredOutputs(**{kind: value}))
    except RequestError as error:
        reason = str(error)
    assert kind in reason


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {}}, "required": [["a"]]},
        {"type": "string", "format": ["date"]},
        {"oneOf": [{"type": "object", "properties": {}, "required": [{}]}, {"type": "object", "required": [[]]}]},
        {"const": json.loads("[" * 900 + "]" * 900)},
        {"const": "\ud800"},
        {"oneOf": [{"const": i} for i in range(1000)]},
        {"type": "object", "properties": {f"{i:x}": {} for i in range(3000)}},
        {"type": "object", "properties": {f"p{i}": {} for i in range(300)}, "maxProperties": 290},
        {"type": "object", "properties": {f"p{i}": {"type": "string", "minLength": 90 - i} for i in range(80)}},
        {"type": "object", "properties": {f"p{i}": {"type": "string", "format": "uri"} for i in range(1000)}},
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_a_schema_that_would_break_or_hold_up_the_compiler_is_refused(by_byte, schema) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.json"):
        by_byte.compiler.compile(StructuredOutputs(json=schema))


@pytest.mark.parametrize(
    "spec",
    [
        {"regex": "." * 4000},
        {"regex": "[a-z]{1,150}[A-Z]{1,150}" * 10 + ".{1,250}é{1,2}" * 6},
        {"regex": "(?:(.)){200}(?:(.)|é){100}" * 40},
        {"regex": ".*é*" * 65},
        {"grammar": "root ::= " + "[^a] " * 4000},
        {"grammar": "root ::= " + "TagDispatch() " * 130},
        {"grammar": "root ::= " + "[" * 60_000},
        {"grammar": "root[temperature=0.5] ::= [a-z]"},
        {"grammar": "root ::= Token(5)"},
        {"grammar": 'root ::= "\ud800"'},
    ],
    ids=lambda spec: str(spec)[:40],
)
def test_a_pattern_that_would_break_or_hold_up_the_compiler_is_refused(by_byte, spec) -> None:
    with pytest.raises(RequestError, match=r"at most|more than|not supported|cannot be named|half of|does not end"):
        by_byte.compiler.compile(StructuredOutputs(**spec))
