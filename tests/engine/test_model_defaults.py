"""What a checkpoint says of sampling: its end tokens wherever they are named, and defaults that are refused at the start."""

import json
import logging
import shutil

import pytest
from tiny import EOS, TINY_SETTINGS, drain
from transformers import AutoTokenizer

from stepgraph import EngineConfig, SamplingParams, StructuredOutputs
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.model_defaults import sampling_defaults_of, sampling_overrides
from stepgraph.engine.request import FinishReason
from stepgraph.errors import ConfigError, ModelError
from stepgraph.models import resolve
from stepgraph.models.end_tokens import tokenizer_end_token

OF_CONFIG, OF_GENERATION = 5, 7
A = 65
"""The token of the letter a."""


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """The tiny model, whose tokenizer, config and generation config each name another end token."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "tiny")
    write(folder, "config.json", eos_token_id=OF_CONFIG)
    write(folder, "generation_config.json", eos_token_id=[OF_GENERATION])
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def write(folder, name, **fields) -> None:
    """Change some fields of a JSON file; those that are None are removed."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(scope="module")
def engine(folder, device) -> Engine:
    return build_engine(EngineConfig.from_settings(**{"model": str(folder), "device": device} | TINY_SETTINGS))


def answer(engine, **params):
    request = engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=6, **params))
    drain(engine)
    return request


@pytest.mark.parametrize("token", [EOS, OF_CONFIG, OF_GENERATION])
def test_every_end_token_ends_answers_bounds_short_ones_and_closes_grammars(engine, token) -> None:
    likely = {token: 100.0}
    ended = answer(engine, logit_bias=likely)
    assert (ended.output_token_ids, ended.finish_reason) == ([token], FinishReason.STOP)
    delayed = answer(engine, logit_bias=likely, min_tokens=3)
    assert delayed.output_token_ids.index(token) == 3
    assert answer(engine, logit_bias=likely, ignore_eos=True).output_token_ids == [token] * 6
    guided = answer(engine, logit_bias=likely, structured_outputs=StructuredOutputs(regex="a+"))
    assert (guided.output_token_ids, guided.finish_reason) == ([A, token], FinishReason.STOP)


def test_end_tokens_are_in_the_order_of_generation_config_config_and_tokenizer_each_once(copy) -> None:
    assert resolve(str(copy)).config.eos_token_ids == (OF_GENERATION, OF_CONFIG, EOS)
    write(copy, "generation_config.json", eos_token_id=[EOS, OF_CONFIG])
    assert resolve(str(copy)).config.eos_token_ids == (EOS, OF_CONFIG)
    assert resolve(str(copy), model_impl="transformers").config.eos_token_ids == (EOS, OF_CONFIG)


LAYOUTS = {
    "as saved": {},
    "with the properties of its token": {
        "tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "<end>"}}
    },
    "none": {"tokenizer_config.json": {"eos_token": None}},
    "in the file of special tokens, which goes before": {
        "tokenizer_config.json": {"eos_token": "b"},
        "special_tokens_map.json": {"eos_token": "a"},
    },
    "with a table of added tokens, besides which that file is not read": {
        "tokenizer_config.json": {
            "eos_token": "b",
            "added_tokens_decoder": {"0": {"content": "<end>"}, "66": {"content": "b"}},
        },
        "special_tokens_map.json": {"eos_token": "a"},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tokenizers_end_token_is_that_which_transformers_reads(copy, layout) -> None:
    for name, fields in LAYOUTS[layout].items():
        write(copy, name, **fields)
    assert tokenizer_end_token(copy) == AutoTokenizer.from_pretrained(copy).eos_token_id


def test_files_of_older_tokenizers_and_damaged_ones(tmp_path) -> None:
    assert tokenizer_end_token(tmp_path) is None
    write(tmp_path, "tokenizer_config.json", eos_token="</s>")
    assert tokenizer_end_token(tmp_path) is None
    write(tmp_path, "vocab.json", **{"</s>": 2})
    assert tokenizer_end_token(tmp_path) == 2
    write(tmp_path, "added_tokens.json", **{"</s>": 96})
    assert tokenizer_end_token(tmp_path) == 96
    for damaged in ({"x": 1}, {"x": {"content": "</s>"}}, {"5": {}}, [], 3):
        write(tmp_path, "tokenizer_config.json", added_tokens_decoder=damaged)
        assert tokenizer_end_token(tmp_path) == 96
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"eos_token": 3}', b'{"eos_token": {"content": []}}'):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        assert tokenizer_end_token(tmp_path) is None


def test_end_tokens_outside_the_vocabulary_are_left_out_and_told(copy, caplog) -> None:
    write(copy, "generation_config.json", eos_token_id=[257, -1, 9.0])
    with caplog.at_level(logging.WARNING, logger="stepgraph"):
        assert resolve(str(copy)).config.eos_token_ids == (9, OF_CONFIG, EOS)
    assert "end tokens outside the vocabulary of 257 tokens, which are left out: 257" in caplog.text


@pytest.mark.parametrize("value", ["2", [1, "2"], True, 1.5, {"a": 1}, [[1]], float("inf")])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_no_token_id_is_refused_with_the_file(copy, file, value) -> None:
    write(copy, file, eos_token_id=value)
    with pytest.raises(ModelError, match=f"eos_token_id.*{file}|{file}.*eos_token_id"):
        resolve(str(copy))


def test_a_model_without_end_token_says_so_at_start_and_one_with_too_many_is_refused(copy, caplog) -> None:
    def start() -> None:
        build_engine(EngineConfig.from_settings(**{"model": str(copy), "device": "cpu"} | TINY_SETTINGS)).shutdown()

    write(copy, "tokenizer_config.json", eos_token=None)
    (copy / "config.json").write_text(
        json.dumps(json.loads((copy / "config.json").read_text()) | {"eos_token_id": None})
    )
    write(copy, "generation_config.json", eos_token_id=list(range(17)))
    with pytest.raises(ModelError, match="names 17 tokens that end an answer, and at most 16 fit"):
        start()
    write(copy, "generation_config.json", eos_token_id=None)
    with caplog.at_level(logging.WARNING, logger="stepgraph"):
        start()
    assert "names no token that ends an answer" in caplog.text


def test_sampling_defaults_are_taken_as_requests_are_and_whole_numbers_in_any_form(copy) -> None:
    write(copy, "generation_config.json", top_k=50.0, top_p=1, temperature=0, min_p=None, max_length=20)
    defaults = sampling_defaults_of(resolve(str(copy)))
    assert defaults == {"top_k": 50, "top_p": 1, "temperature": 0}
    assert type(defaults["top_k"]) is int


def test_sampling_values_of_the_setting_are_checked_as_those_of_the_model_are() -> None:
    assert sampling_overrides({"top_k": 50.0, "temperature": 0}) == {"top_k": 50, "temperature": 0}
    with pytest.raises(
        ConfigError, match=r"override_generation_config has no key 'max_tokens'; known keys: temperature, "
    ):
        sampling_overrides({"max_tokens": 5})
    with pytest.raises(ConfigError, match=r"override_generation_config: temperature=-1"):
        sampling_overrides({"temperature": -1})


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_k", 50.5, "a positive count"),
        ("top_k", "50", "a positive count"),
        ("top_k", -2, "a positive count"),
        ("temperature", -1, "between 0"),
        ("temperature", "0.7", "between 0"),
        ("temperature", True, "between 0"),
        ("temperature", float("nan"), "between 0"),
        ("min_p", 2, "between 0"),
        ("min_p", [0.1], "between 0"),
        ("repetition_penalty", 0, "between 0.01 and 10"),
    ],
)
def test_a_default_that_no_request_could_give_is_refused_with_file_name_value_and_limit(
    copy, name, value, limit
) -> None:
    write(copy, "generation_config.json", **{name: value})
    with pytest.raises(ModelError) as caught:
        sampling_defaults_of(resolve(str(copy)))
    for part in ("generation_config.json", f"{name}={value!r}", limit):
        assert part in str(caught.value)
