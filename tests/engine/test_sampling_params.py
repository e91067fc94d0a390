"""SamplingParams: vLLM's names, defaults and ranges; nothing is ignored."""

import json
from dataclasses import fields, replace

import pytest

from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs, bad_word_token_ids
from stepgraph.errors import RequestError
from stepgraph.step.shape import Variant

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


class Model:
    """Gives its schema as pydantic's models do."""

    @classmethod
    def model_json_schema(cls) -> dict:
        return SCHEMA


class WordTokenizer:
    """Knows some texts, with their tokens."""

    def __init__(self, **tokens: list[int]):
        self.tokens = tokens

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.tokens[text.replace(" ", "_").replace("\n", "newline")]


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert (params.seed, params.stop_token_ids, params.ignore_eos) == (None, (), False)
    assert (params.detokenize, params.skip_special_tokens) == (True, True)
    assert (params.n, params.min_p, params.repetition_penalty) == (1, 0.0, 1.0)
    assert (params.presence_penalty, params.frequency_penalty, params.min_tokens) == (0.0, 0.0, 0)
    assert (params.stop, params.bad_words, params.include_stop_str_in_output) == ((), (), False)
    assert (params.logit_bias, params.allowed_token_ids, params.structured_outputs) == (None, None, None)
    assert (params.logprobs, params.prompt_logprobs) == (None, None)


def test_minus_one_keeps_all_tokens_like_zero() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_stop_token_ids_are_taken_from_a_list_or_none() -> None:
    assert SamplingParams(stop_token_ids=[5, 6]).stop_token_ids == (5, 6)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("temperature", (-0.1, 100.5, float("nan"), "1", None, True), r"between 0 \(greedy\) and 100"),
        ("top_p", (0, -0.5, 1.01, float("nan"), "0.9", None), "above 0 and at most 1"),
        ("top_k", (-2, 2**31, 1.5, "5", None), r"0 or -1 \(all tokens\), or a positive count"),
        ("max_tokens", (0, -1, 2.5, "16"), r"between 1 and 2\*\*63 - 1, or None"),
        ("seed", (-(2**63) - 1, 2**64, 1.5, "7", True), r"between -2\*\*63 and 2\*\*64 - 1, or None"),
        ("stop_token_ids", ((-1,), (2**31,), (1.5,), ("a",), (True,), 5, "56"), "token ids"),
        ("n", (0, 65, 1.5, "2", None, True), "between 1 and 64"),
        ("min_p", (-0.1, 1.1, float("nan"), "0.1", None), r"between 0 \(all tokens\) and 1"),
        ("presence_penalty", (-2.1, 2.1, float("nan"), "1", None), "between -2 and 2"),
        ("frequency_penalty", (-2.1, 2.1, float("nan"), "1", None), "between -2 and 2"),
        ("repetition_penalty", (0, -1, 10.1, 1e-50, float("nan"), "1", None), "between 0.01 and 10"),
        ("min_tokens", (-1, 17, 1.5, "4", None), "between 0 and max_tokens, which is 16"),
        (
            "stop",
            ([""], ["a", ""], [1], 5, ["a", None], "a" * 1025),
            "a list of texts, none of them empty or of more than 1024",
        ),
        ("bad_words", ([""], [1], 5, "word", ["a" * 1025]), "a list of texts, none of them empty or of more than 1024"),
        ("allowed_token_ids", ([], [-1], [2**31], [1.5], ["1"], 5, "12"), "at least one token id, or None"),
        ("logprobs", (-1, 21, 1.5, "5", True), "between 0 and 20, or None"),
        ("prompt_logprobs", (-1, 21, 1.5, "5", True), "between 0 and 20, or None"),
        ("structured_outputs", ("json", 5, [SCHEMA]), "a StructuredOutputs, a dict of its fields, or None"),
        ("ignore_eos", (1, "false", None), "True or False"),
        ("detokenize", (0, "true"), "True or False"),
        ("include_stop_str_in_output", (1, None), "True or False"),
    ],
)
def test_a_value_outside_its_range_or_type_is_refused_with_the_range(field, values, expected) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"{field}=.*must be.*{expected}"):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "biases",
    [
        {5: 100.1},
        {5: -101},
        {5: float("nan")},
        {5: "1"},
        {5: None},
        {-1: 1},
        {"x": 1},
        {"-5": 1},
        {"9" * 99: 1},
        [5],
        "5",
        5,
    ],
)
def test_logit_biases_that_are_not_token_ids_with_numbers_are_refused(biases) -> None:
    with pytest.raises(RequestError, match=r"logit_bias=.* must be a dict of token ids .* between -100 and 100"):
        SamplingParams(logit_bias=biases)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (0, 0.0, 1, 100)),
        ("top_p", (1, 1e-6, 0.5)),
        ("top_k", (1, 2**31 - 1)),
        ("max_tokens", (1, None, 10**6)),
        ("seed", (0, 2**64 - 1, None)),
        ("n", (1, 64)),
        ("min_p", (0, 1, 0.5)),
        ("presence_penalty", (-2, 2, 0.5)),
        ("frequency_penalty", (-2, 2, 0.5)),
        ("repetition_penalty", (0.01, 1, 10)),
        ("min_tokens", (0, 16)),
        ("logprobs", (0, 20, None)),
        ("prompt_logprobs", (0, 20, None)),
        ("logit_bias", ({5: 100, 6: -100.0}, None)),
        ("stop", (("a" * 1024,),)),
        ("bad_words", (("a" * 1024,),)),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field, values) -> None:
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(("given", "kept"), [(-1, 2**64 - 1), (-(2**63), 2**63), (-5, 2**64 - 5)])
def test_a_seed_below_zero_is_the_one_of_the_same_64_bits(given, kept) -> None:
    assert SamplingParams(seed=given).seed == SamplingParams(seed=kept).seed == kept


def test_more_stop_tokens_than_a_slot_holds_are_refused_with_the_number() -> None:
    assert len(SamplingParams(stop_token_ids=range(16)).stop_token_ids) == 16
    with pytest.raises(RequestError, match="stop_token_ids has 17 entries; at most 16 fit"):
        SamplingParams(stop_token_ids=range(17))


def test_more_than_a_slot_or_a_search_holds_is_refused_with_the_number() -> None:
    assert len(SamplingParams(stop=["x"] * 16).stop) == 16
    with pytest.raises(RequestError, match="stop has 17 entries; at most 16 fit"):
        SamplingParams(stop=["x"] * 17)
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(512), 1)).logit_bias or ()) == 512
    with pytest.raises(RequestError, match="logit_bias has 513 entries; at most 512 fit"):
        SamplingParams(logit_bias=dict.fromkeys(range(513), 1))


def test_lists_and_what_json_makes_of_them_are_taken_and_none_asks_for_nothing() -> None:
    assert SamplingParams(stop="end").stop == SamplingParams(stop=["end"]).stop == ("end",)
    assert SamplingParams(bad_words=["a", "b"]).bad_words == ("a", "b")
    assert SamplingParams(allowed_token_ids=range(3)).allowed_token_ids == (0, 1, 2)
    assert SamplingParams(logit_bias={"50256": -100, 7: 1}).logit_bias == {50256: -100, 7: 1}
    parsed = json.loads('{"stop": null, "bad_words": null, "stop_token_ids": null, "logit_bias": {}}')
    assert SamplingParams(**parsed) == SamplingParams()


def test_the_callers_containers_can_change_later_without_effect() -> None:
    stop, biases = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=biases)
    stop.append("b")
    biases[2] = 2.0
    assert (params.stop, params.logit_bias) == (("a",), {1: 1.0})


def test_min_tokens_may_be_anything_without_max_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6


def test_stop_strings_without_text_are_refused() -> None:
    with pytest.raises(RequestError, match="stop strings are searched in the text, which detokenize=False leaves out"):
        SamplingParams(stop="end", detokenize=False)


def test_the_older_name_of_structured_outputs_is_refused_with_the_new_one() -> None:
    with pytest.raises(RequestError, match="guided_decoding is not supported; use structured_outputs"):
        SamplingParams(guided_decoding={"json": SCHEMA})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "variant"),
    [
        ({}, Variant.PLAIN),
        ({"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 1}, Variant.PLAIN),
        ({"n": 4, "stop": "end", "stop_token_ids": [1], "ignore_eos": True}, Variant.PLAIN),
        ({"presence_penalty": 0, "repetition_penalty": 1, "logit_bias": {}, "bad_words": []}, Variant.PLAIN),
        ({"presence_penalty": -0.5}, Variant.EXTENDED),
        ({"frequency_penalty": 0.5}, Variant.EXTENDED),
        ({"repetition_penalty": 0.9}, Variant.EXTENDED),
        ({"min_tokens": 1}, Variant.EXTENDED),
        ({"logit_bias": {5: 1}}, Variant.EXTENDED),
        ({"bad_words": ["a"]}, Variant.EXTENDED),
        ({"allowed_token_ids": [5]}, Variant.EXTENDED),
        ({"logprobs": 0}, Variant.EXTENDED),
        ({"structured_outputs": {"json_object": True}}, Variant.EXTENDED),
        ({"prompt_logprobs": 0}, Variant.PROMPT_LOGPROBS),
        ({"prompt_logprobs": 5, "logprobs": 5, "min_tokens": 1}, Variant.PROMPT_LOGPROBS),
    ],
)
def test_the_variant_is_the_least_that_can_do_what_is_asked(params, variant) -> None:
    assert SamplingParams(**params).variant is variant


def test_parameters_can_be_copied_with_changes() -> None:
    params = SamplingParams(stop="a", logit_bias={1: 1}, allowed_token_ids=[1], structured_outputs={"regex": "a+"})
    assert replace(params) == params
    assert replace(params, n=2).structured_outputs == StructuredOutputs(regex="a+")


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA), Model])
def test_a_schema_may_be_a_dict_text_or_a_model_class(schema) -> None:
    assert StructuredOutputs(json=schema).json == SCHEMA
    assert SamplingParams(structured_outputs={"json": schema}).structured_outputs == StructuredOutputs(json=SCHEMA)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, structural_tag; none given"),
        ({"json_object": False}, "none given"),
        ({"json": SCHEMA, "regex": "a"}, "json and regex given"),
        ({"choice": ["a"], "json_object": True}, "choice and json_object given"),
        ({"json": "{"}, "structured_outputs.json is not JSON"),
        ({"json": "[" * 10**5}, "structured_outputs.json is not JSON"),
        ({"json": "[1]"}, "must be a JSON schema .* or a pydantic model class, not"),
        ({"json": 5}, "must be a JSON schema .* or a pydantic model class, not 5"),
        ({"json": int}, "must be a JSON schema .* or a pydantic model class, not"),
        ({"regex": ""}, "regex='' must be a text that is not empty"),
        ({"regex": 5}, "regex=5 must be a text"),
        ({"grammar": 5}, "grammar=5 must be a text"),
        ({"structural_tag": "{"}, "structured_outputs.structural_tag is not JSON"),
        ({"structural_tag": "[1]"}, r"structural_tag=\[1\] must be a structural tag"),
        ({"structural_tag": {}, "regex": "a"}, "regex and structural_tag given"),
        ({"choice": []}, r"choice=\[\] must be a list of texts"),
        ({"choice": "ab"}, "choice='ab' must be a list of texts"),
        ({"choice": ["a", 5]}, "must be a list of texts"),
        ({"json_object": "yes"}, "json_object='yes' must be True or False"),
        ({"regex": "a", "disable_any_whitespace": 1}, "disable_any_whitespace=1 must be True or False"),
        ({"regexp": "a"}, "structured_outputs has no 'regexp'; it has .*regex"),
    ],
)
def test_an_answer_has_exactly_one_form_of_the_right_type(given, message) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(structured_outputs=given)


def test_every_field_of_a_form_may_be_null_as_json_has_it() -> None:
    nulls = {f.name: None for f in fields(StructuredOutputs)}
    form = SamplingParams(structured_outputs=nulls | {"choice": ["a", "b"]}).structured_outputs
    assert form == StructuredOutputs(choice=("a", "b"))


def test_a_bad_word_is_banned_at_the_start_of_a_text_and_after_a_space() -> None:
    tokenizer = WordTokenizer(no=[1], _no=[2], more=[3, 4], _more=[5], **{"x-y": [6, 7], "_x-y": [8, 7]})
    assert bad_word_token_ids(["no"], tokenizer) == [[1], [2]]
    assert bad_word_token_ids([" no"], tokenizer) == [[1], [2]]
    assert bad_word_token_ids(["more", "x-y", "more"], tokenizer) == [[3, 4], [5], [6, 7], [8, 7]]


def test_a_space_that_is_a_token_of_its_own_needs_no_second_spelling() -> None:
    assert bad_word_token_ids(["no"], WordTokenizer(no=[1, 2], _no=[9, 1, 2])) == [[1, 2]]


def test_white_space_can_be_banned() -> None:
    assert bad_word_token_ids(["\n"], WordTokenizer(newline=[7])) == [[7]]


def test_bad_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="holds 'a', which has 9 tokens; at most 8 fit"):
        bad_word_token_ids(["a"], WordTokenizer(a=[*range(8)], _a=[*range(10, 19)]))
    with pytest.raises(RequestError, match="holds 'a', which has no tokens"):
        bad_word_token_ids(["a"], WordTokenizer(a=[]))
    words = {f"w{i}": [2 * i] for i in range(65)} | {f"_w{i}": [2 * i + 1] for i in range(65)}
    assert len(bad_word_token_ids([f"w{i}" for i in range(64)], WordTokenizer(**words))) == 128
    with pytest.raises(RequestError, match=r"becomes 130 token sequences.*at most 128 fit"):
        bad_word_token_ids([f"w{i}" for i in range(65)], WordTokenizer(**words))


def test_more_bad_words_than_fit_are_refused_before_the_tokenizer_is_asked() -> None:
    with pytest.raises(RequestError, match="bad_words has 129 entries; at most 128 fit"):
        bad_word_token_ids([f"w{i}" for i in range(129)], tokenizer=None)


def test_the_embedded_models_tokenizer_spells_a_bad_word_in_both_ways(smollm2) -> None:
    tokenizer = smollm2.tokenizer()
    spellings = [tokenizer.decode(ids) for ids in bad_word_token_ids(["hello", "\n"], tokenizer)]
    assert spellings == ["hello", " hello", "\n"]
