import importlib.metadata
import json
import random
import re
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
from json_schemas import REGEXES, random_schema
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stepgraph.engine import guided_text
from stepgraph.engine.guidance import (
    MAX_WHITESPACE,
    XGRAMMAR_SERIES,
    GuidanceCompiler,
    Guide,
    GuideError,
    read_vocabulary,
    require_xgrammar,
)
from stepgraph.engine.sampling_params import StructuredOutputs
from stepgraph.errors import ConfigError, RequestError

pytest.importorskip("xgrammar", reason="guided generation needs the extra `guidance`")
jsonschema = pytest.importorskip("jsonschema", reason="answers are checked with jsonschema, of the extra `dev`")

END, START, TOOL = 0, 257, 258
VOCAB_SIZE = 270  # more than the tokenizer has, and no multiple of 32
CLOSING_FIRST = '"}]<>@.,:/ 0123456789nultrefasx'  # what leads to the end of an answer, most likely first


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, "<end>" and "<start>", which are special, and "<tool é>", which is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": END} | {c: i for i, c in enumerate(alphabet, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": ["<start>"]})
    fast.add_tokens(["<tool é>"])
    return fast


class Walker:
    """Writes random answers of a compiler's grammars."""

    def __init__(self, tokenizer, vocab_size, stop_token_ids) -> None:
        self.tokenizer, self.vocab_size, self.stops = tokenizer, vocab_size, set(stop_token_ids)
        self.compiler = GuidanceCompiler(read_vocabulary(tokenizer, vocab_size, stop_token_ids))
        texts = [tokenizer.decode([t]) for t in range(min(vocab_size, len(tokenizer)))]
        self.rank = np.array(
            [CLOSING_FIRST.find(text) if text and text in CLOSING_FIRST else 99 for text in texts]
            + [99] * (vocab_size - len(texts))
        )

    def allowed(self, guide) -> np.ndarray:
        mask_W = np.full(-(-self.vocab_size // 32), -1, np.int32)
        guide.fill(mask_W)
        bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")
        assert not bits[self.vocab_size :].any(), "bits beyond the vocabulary are set"
        return np.flatnonzero(bits)

    def stops_among(self, allowed_A) -> list[int]:
        return allowed_A[np.isin(allowed_A, [*self.stops])].tolist()

    def answer(self, rng, max_tokens=3000, **spec) -> str:
        guide = Guide(self.compiler.compile(StructuredOutputs(**spec)))
        tokens: list[int] = []
        while True:
            allowed_A = self.allowed(guide)
            assert len(allowed_A), f"nothing can follow {self.tokenizer.decode(tokens)!r} in {spec}"
            stops = self.stops_among(allowed_A)
            if stops and (rng.random() < 0.6 or len(stops) == len(allowed_A)):
                guide.accept(rng.choice(stops))
                assert guide.finished
                return self.tokenizer.decode(tokens, skip_special_tokens=True)
            rank_A = self.rank[allowed_A]
            if len(tokens) > 150 and rng.random() < 0.2:
                candidates_A = allowed_A[rank_A <= np.sort(rank_A)[min(9, len(rank_A) - 1)]]
            else:
                hurries = len(tokens) > 150 or rng.random() < 0.5
                candidates_A = allowed_A[rank_A == rank_A.min()] if hurries else allowed_A
            token = int(rng.choice(candidates_A))
            if token in self.stops:
                continue
            guide.accept(token)
            assert not guide.finished
            tokens.append(token)
            assert len(tokens) < max_tokens, f"no end: {self.tokenizer.decode(tokens)!r} in {spec}"


@pytest.fixture(scope="module")
def by_byte():
    return Walker(byte_tokenizer(), VOCAB_SIZE, [END])


@pytest.fixture(scope="module")
def by_word(smollm2):
    return Walker(smollm2.tokenizer(), smollm2.config.vocab_size, smollm2.config.eos_token_ids)


def check_schemas(walker, seeds) -> None:
    for seed in seeds:
        schema = random_schema(random.Random(seed))
        text = walker.answer(random.Random(seed), json=schema, disable_any_whitespace=seed % 2 == 0)
        try:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        except (ValueError, jsonschema.ValidationError) as error:
            raise AssertionError(f"seed {seed}: {text!r} breaks {schema}: {error}") from error


def check_regexes(walker, regexes) -> None:
    for i, regex in enumerate(regexes):
        text = walker.answer(random.Random(i), regex=regex)
        assert re.fullmatch(regex, text, re.ASCII), (regex, text)


def test_answers_validate_against_random_schemas(by_byte) -> None:
    check_schemas(by_byte, range(300))


def test_answers_validate_with_tokens_of_many_characters(by_word) -> None:
    check_schemas(by_word, range(1000, 1030))


def test_answers_match_regular_expressions(by_byte) -> None:
    assert len(REGEXES) >= 50
    check_regexes(by_byte, REGEXES * 2)


def test_answers_match_regular_expressions_with_tokens_of_many_characters(by_word) -> None:
    check_regexes(by_word, REGEXES[::3])


def test_sets_of_characters_hold_what_ecmascript_says(by_byte) -> None:
    for regex, text, holds in (
        (".", "\n", False),
        (".", "\r", False),
        (".", "a", True),
        (r"\s", "\n", True),
        (r"\D", "1", False),
    ):
        guide = Guide(by_byte.compiler.compile(StructuredOutputs(regex=regex)))
        assert (by_byte.tokenizer.encode(text)[0] in by_byte.allowed(guide)) == holds, (regex, text)


def test_a_choice_is_one_of_the_texts_whatever_characters_they_hold(by_byte) -> None:
    choices = [
        'say "hi"',
        "back\\slash",
        "line\nbreak",
        "a|b",
        "[x]*",
        "é😀\u2028",
        "root ::= x",
        "{1}",
        "#",
        "it's",
        "\x01",
    ]
    assert {by_byte.answer(random.Random(seed), choice=choices) for seed in range(200)} == set(choices)


def test_a_shorter_choice_can_end_where_a_longer_one_goes_on(by_byte) -> None:
    assert {by_byte.answer(random.Random(s), choice=["a", "ab"]) for s in range(40)} == {"a", "ab"}


def test_any_json_object_is_an_object(by_byte) -> None:
    for seed in range(40):
        assert isinstance(json.loads(by_byte.answer(random.Random(seed), json_object=True)), dict)


def test_without_whitespace_an_object_has_one_spelling(by_byte) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    texts = {by_byte.answer(random.Random(s), json=schema, disable_any_whitespace=True) for s in range(20)}
    assert texts == {'{"a": 1}'}


@pytest.mark.parametrize("form", ["json", "json_object", "structural_tag"])
@pytest.mark.parametrize("compact", [False, True])
def test_white_space_between_parts_is_bounded(by_byte, form, compact) -> None:
    schema = {"type": "object"}
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    spec = {"json": schema, "json_object": True, "structural_tag": tag}[form]
    most = (1 if form == "structural_tag" else 0) if compact else MAX_WHITESPACE
    guide = Guide(by_byte.compiler.compile(StructuredOutputs(**{form: spec}, disable_any_whitespace=compact)))
    brace, line_break = by_byte.tokenizer.encode("{\n")
    guide.accept(brace)
    for _ in range(most):
        guide.accept(line_break)
    assert line_break not in by_byte.allowed(guide)
    assert by_byte.tokenizer.encode("}")[0] in by_byte.allowed(guide)


def test_answers_follow_a_grammar(by_byte) -> None:
    grammar = """
        root ::= expression   # sums of products
        expression ::= term ("+" term)*
        term ::= [0-9] | "(" expression ")"
    """
    for seed in range(60):
        text = by_byte.answer(random.Random(seed), grammar=grammar)
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(text), int)


def test_a_complete_answer_allows_only_end_tokens(by_byte) -> None:
    guide = Guide(by_byte.compiler.compile(StructuredOutputs(regex="a")))
    (token,) = by_byte.tokenizer.encode("a")
    assert list(by_byte.allowed(guide)) == [token]
    guide.accept(token)
    assert not guide.finished
    assert list(by_byte.allowed(guide)) == [END]
    guide.accept(END)
    assert guide.finished
    assert list(by_byte.allowed(guide)) == [END]
    guide.accept(END)
    with pytest.raises(GuideError):
        guide.accept(token)


def test_every_end_token_is_allowed_at_the_end_and_none_before() -> None:
    ends = [END, 260, 269]  # two of them unknown to the tokenizer
    walker = Walker(byte_tokenizer(), VOCAB_SIZE, [*ends, 10**6])
    for end in ends:
        guide = Guide(walker.compiler.compile(StructuredOutputs(regex="[^b]")))
        assert not set(ends) & set(walker.allowed(guide))
        guide.accept(walker.tokenizer.encode("a")[0])
        assert list(walker.allowed(guide)) == ends
        guide.accept(end)
        assert guide.finished


def test_a_token_outside_the_grammar_is_refused_and_changes_nothing(by_byte) -> None:
    guide = Guide(by_byte.compiler.compile(StructuredOutputs(regex="ab")))
    before_A = by_byte.allowed(guide)
    for token in (*by_byte.tokenizer.encode("b"), END, START, 265, VOCAB_SIZE, -1):
        with pytest.raises(GuideError, match=f"token {token} "):
            guide.accept(token)
        np.testing.assert_array_equal(by_byte.allowed(guide), before_A)


def test_special_tokens_are_no_text_and_other_added_tokens_are(by_byte) -> None:
    guide = Guide(by_byte.compiler.compile(StructuredOutputs(regex="[^q]*")))
    allowed = set(by_byte.allowed(guide))
    assert TOOL in allowed
    assert START not in allowed
    assert not allowed & set(range(TOOL + 1, VOCAB_SIZE)), "tokens that the tokenizer lacks"
    guide = Guide(by_byte.compiler.compile(StructuredOutputs(choice=["<tool é>"])))
    assert TOOL in by_byte.allowed(guide)


def test_a_mask_is_written_into_the_callers_row_only(by_byte) -> None:
    masks_SW = np.full((3, -(-VOCAB_SIZE // 32)), 7, np.int32)
    Guide(by_byte.compiler.compile(StructuredOutputs(regex="a"))).fill(masks_SW[1])
    assert (masks_SW[[0, 2]] == 7).all()
    assert np.unpackbits(masks_SW[1].view(np.uint8)).sum() == 1


def test_guides_of_one_grammar_do_not_disturb_each_other(by_byte) -> None:
    compiled = by_byte.compiler.compile(StructuredOutputs(regex="(ab)*"))
    first, second = Guide(compiled), Guide(compiled)
    first.accept(by_byte.tokenizer.encode("a")[0])
    assert by_byte.tokenizer.decode(by_byte.allowed(first)) == "b"
    assert by_byte.tokenizer.decode(by_byte.allowed(second), skip_special_tokens=True) == "a"


def test_threads_may_compile_at_once(by_byte) -> None:
    found: list[str] = []

    def work(seed: int) -> None:
        for i in range(5):
            found.append(by_byte.answer(random.Random(seed), regex=f"x{{{i + 1}}}"))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted("x" * (i + 1) for i in range(5) for _ in threads)


INTEGER = {"type": "integer"}
TEXT = {"type": "string"}
OBJECT = {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}}


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        (INTEGER | {"multipleOf": 5}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": TEXT}, "contains"),
        ({"type": "array", "items": [INTEGER]}, "is no schema"),
        ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
        (INTEGER | {"not": {"const": 1}}, "not"),
        (OBJECT | {"if": {"required": ["a"]}}, "if"),
        (OBJECT | {"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        (OBJECT | {"dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
        (OBJECT | {"unevaluatedProperties": INTEGER}, "unevaluatedProperties"),
        (OBJECT | {"additionalProperties": TEXT}, "additionalProperties"),
        (OBJECT | {"patternProperties": {"^a": TEXT}}, "patternProperties"),
        ({"type": "object", "patternProperties": {"^a$": TEXT, "a": INTEGER}}, "patternProperties"),
        (OBJECT | {"propertyNames": {"enum": ["a"]}}, "propertyNames"),
        ({"type": "object", "propertyNames": {"maxLength": 2}}, "propertyNames"),
        (OBJECT | {"required": ["c"]}, "required"),
        ({"type": "object", "required": ["a"]}, "required"),
        ({"type": "object", "additionalProperties": INTEGER, "minProperties": 2}, "minProperties"),
        (TEXT | {"pattern": "^a*$", "maxLength": 2}, "pattern"),
        (TEXT | {"format": "date", "maxLength": 2}, "format"),
        (TEXT | {"format": "iri"}, "format"),
        (TEXT | {"pattern": 'a"'}, "without an escape"),
        (TEXT | {"pattern": r"a\\"}, "without an escape"),
        (TEXT | {"pattern": r"\n"}, "without an escape"),
        (TEXT | {"pattern": r"[\n]"}, "without an escape"),
        (TEXT | {"pattern": r"\u0022"}, "without an escape"),
        (TEXT | {"pattern": "a^b"}, "very start"),
        ({"pattern": "a"}, "add `type`"),
        ({"minimum": 2}, "add `type`"),
        ({"type": "date"}, "type"),
        ({"type": []}, "type"),
        (INTEGER | {"nullable": True}, "nullable"),
        (INTEGER | {"minimum": 1.5}, "minimum"),
        (INTEGER | {"minimum": "1"}, "minimum"),
        ({"type": "number", "maximum": 1e300}, "maximum"),
        ({"const": 1, "type": "string"}, "const"),
        ({"enum": [1, "a"], "type": "string"}, "enum"),
        ({"enum": ["a"], "minLength": 2}, "minLength"),
        ({"enum": []}, "enum"),
        ({"const": 2**64}, "64 bits"),
        ({"anyOf": [INTEGER], "minimum": 3}, "minimum"),
        (OBJECT | {"anyOf": [{"required": ["a"]}]}, "anyOf"),
        ({"anyOf": []}, "anyOf"),
        ({"allOf": [INTEGER, {"type": "integer", "minimum": 3}]}, "allOf"),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [OBJECT, OBJECT]}, "oneOf"),
        ({"oneOf": [{"const": 1}, {"enum": [1.0, 2]}]}, "oneOf"),
        ({"$ref": "#/$defs/i", "minimum": 3, "$defs": {"i": INTEGER}}, "minimum"),
        ({"$ref": "#/$defs/x", "$defs": {}}, r"\$ref"),
        ({"$ref": "#/default", "default": 3}, r"\$ref"),
        ({"$ref": "http://x/y"}, r"\$ref"),
        ({"$ref": "#name", "$defs": {"i": INTEGER | {"$anchor": "name"}}}, "anchor"),
        ({"type": "object", "properties": {"a": False}}, "#/properties/deep/properties/a"),
    ],
)
def test_a_schema_that_cannot_be_followed_exactly_is_refused_by_name(by_byte, schema, keyword) -> None:
    with pytest.raises(RequestError, match=keyword) as caught:
        by_byte.compiler.compile(
            StructuredOutputs(
                json={"type": "object", "properties": {"deep": schema}}
                | {k: schema[k] for k in ("$defs", "default") if k in schema}
            )
        )
    assert "#" in str(caught.value)


@pytest.mark.parametrize(
    "regex",
    [r"a^b", r"a$b", r"(?i)a", r"(?=a)a", r"(?!a)b", r"(?<=a)b", r"(?P<n>a)", r"\bword", r"(a)\1", r"\Aa\Z",
     r"\p{L}", r"\q", r"[\q]", r"[]a]", r"[^]", r"a{,3}", r"a{", r"a{3,1}", r"a**", r"*a", r"(a", r"a)", r"[a", r"[z-a]", "\\"],
)  # fmt: skip
def test_a_regular_expression_that_cannot_be_followed_is_refused(by_byte, regex) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.regex"):
        by_byte.compiler.compile(StructuredOutputs(regex=regex))


@pytest.mark.parametrize(
    "grammar", ["root", "root ::= missing", 'start ::= "a"', 'root ::= "a', 'root ::= "a" (= "b")', "root ::= (root)"]
)
def test_a_grammar_that_is_malformed_or_matches_nothing_is_refused(by_byte, grammar) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.grammar"):
        by_byte.compiler.compile(StructuredOutputs(grammar=grammar))


def nested(depth: int) -> dict:
    schema: dict = INTEGER
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "spec",
    [
        {"regex": "a" * (guided_text.MAX_TEXT_BYTES + 1)},
        {"grammar": 'root ::= "' + "a" * guided_text.MAX_TEXT_BYTES + '"'},
        {"choice": [str(i) for i in range(guided_text.MAX_CHOICES + 1)]},
        {"choice": ["é" * guided_text.MAX_TEXT_BYTES]},
        {"json": {"enum": ["a" * guided_text.MAX_TEXT_BYTES]}},
        {"json": nested(guided_text.MAX_DEPTH + 1)},
        {"json": {"type": "string", "maxLength": guided_text.MAX_COUNT + 1}},
        {"json": {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": i} for i in range(40)}}},
        {"regex": "(" * 100 + "a" + ")" * 100},
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "((a{1,100}){1,100}){1,100}"},
        {"regex": "(a+b?){1,1000}"},
        {"regex": ".?a?" * 20},
        {"regex": "a*b*" * 100},
        {"regex": "a{999999999999}"},
        {"json": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}},
        {"grammar": 'root ::= ("a"{1,1000}){1,1000}'},
        {"grammar": "root ::= " + '"a"? ' * 40},
        {"grammar": "root ::= " + "(" * 100 + '"a"' + ")" * 100},
    ],
    ids=lambda spec: str(spec)[:40],
)
def test_what_would_take_too_long_to_compile_is_refused_with_its_limit(by_byte, spec) -> None:
    with pytest.raises(RequestError, match=r"at most|more than"):
        by_byte.compiler.compile(StructuredOutputs(**spec))


def test_repetitions_within_the_limits_are_compiled(by_byte) -> None:
    for spec in (
        {"regex": "([a-z]{1,20} ){1,50}"},
        {"regex": "a{1,1000}"},
        {"regex": "(a{1,3}){2}"},
        {"grammar": 'root ::= "(((((?*+{" [{(?*+]{1,3} # ((({{{'},
        {"json": nested(guided_text.MAX_DEPTH)},
    ):
        by_byte.compiler.compile(StructuredOutputs(**spec))


def test_oneof_is_accepted_where_options_cannot_overlap(by_byte) -> None:
    named = {"$defs": {n: {"type": "object", "properties": {"kind": {"const": n}}, "required": ["kind"]} for n in "xy"}}
    for schema in (
        {"oneOf": [INTEGER, TEXT]},
        {"oneOf": [{"const": 1}, {"enum": [2, "1"]}]},
        {"oneOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}], "discriminator": {"propertyName": "kind"}} | named,
    ):
        by_byte.compiler.compile(StructuredOutputs(json=schema))


def test_missing_xgrammar_and_missing_end_tokens_are_explained(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        read_vocabulary(byte_tokenizer(), VOCAB_SIZE, [VOCAB_SIZE])
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ConfigError, match=r"pip install 'stepgraph\[guidance\]'"):
        read_vocabulary(byte_tokenizer(), VOCAB_SIZE, [END])


def test_a_release_that_nobody_has_tried_is_refused_by_its_number(monkeypatch) -> None:
    require_xgrammar()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.3.1")
    with pytest.raises(ConfigError, match=r"exact with xgrammar 0\.2\.x, and 0\.3\.1 is installed: pip install"):
        require_xgrammar()
    requirements = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [asked] = requirements["optional-dependencies"]["guidance"]
    assert asked == f"xgrammar>={XGRAMMAR_SERIES}8,<0.3"
