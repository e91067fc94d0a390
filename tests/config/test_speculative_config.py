"""--speculative-config: what it accepts, what it refuses and in which words."""

import json

import pytest

from stepgraph.command_parser import CommandParser
from stepgraph.config import EngineConfig, SpeculativeConfig, add_flags, read_settings, settings_from_flags
from stepgraph.errors import ConfigError


def speculative(**keys) -> SpeculativeConfig:
    """The settings that keys of --speculative-config come to."""
    return EngineConfig.from_settings(speculative_config=json.dumps(keys)).speculative


@pytest.mark.parametrize(("method", "most"), [("none", 0), ("mtp", 3), ("ngram", 5), ("hybrid", 5), ("suffix", 7)])
def test_every_method_has_a_default_for_its_proposals(method, most) -> None:
    assert speculative(method=method).max_drafts == most


@pytest.mark.parametrize("count", range(1, 9))
def test_one_to_eight_proposals_can_be_asked_for(count) -> None:
    assert speculative(method="mtp", num_speculative_tokens=count).max_drafts == count


@pytest.mark.parametrize(
    "settings",
    [
        {"speculative_model": "[ngram]", "num_speculative_tokens": 4},
        {"num_speculative_tokens": 4},
        {"ngram_prompt_lookup_max": 3},
    ],
)
def test_settings_of_speculation_without_a_method_are_not_passed_over(settings) -> None:
    with pytest.raises(ConfigError, match="has no effect without speculative_method; choose one of: mtp, suffix"):
        EngineConfig.from_settings(**settings)
    EngineConfig.from_settings(**settings, speculative_method="none")  # switched off by name


@pytest.mark.parametrize("count", [0, 9, -1, 2.5, "3", True])
def test_another_number_of_proposals_is_refused(count) -> None:
    with pytest.raises(ConfigError, match="num_speculative_tokens"):
        speculative(method="mtp", num_speculative_tokens=count)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("deepseek_mtp", "mtp"),
        ("ernie_mtp", "mtp"),
        ("glm4_moe_lite_mtp", "mtp"),
        ("glm4_moe_mtp", "mtp"),
        ("mimo_mtp", "mtp"),
        ("qwen3_next_mtp", "mtp"),
        ("qwen3_5_mtp", "mtp"),
        ("ngram_match", "ngram"),
    ],
)
def test_names_that_other_engines_have_for_methods_are_understood(name, method) -> None:
    assert speculative(method=name) == SpeculativeConfig(speculative_method=method)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("model", "some/folder", "speculative_model"),
        ("adaptive", False, "speculative_adaptive"),
        ("min_match", 3, "speculative_min_match"),
        ("prompt_lookup_min", 3, "speculative_min_match"),
        ("max_match", 4, "speculative_max_match"),
        ("prompt_lookup_max", 4, "speculative_max_match"),
        ("suffix_decoding_max_tree_depth", 24, "speculative_max_match"),
        ("memory_tokens", 0, "speculative_memory_tokens"),
        ("hybrid_match", 9, "speculative_hybrid_match"),
        ("acceptance", 0.5, "speculative_acceptance"),
        ("speculative_min_match", 3, "speculative_min_match"),
    ],
)
def test_a_key_has_its_effect(key, value, name) -> None:
    assert speculative(method="hybrid", **{key: value}) == SpeculativeConfig(
        speculative_method="hybrid", **{name: value}
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "eagle"}, "method='eagle' is not supported: there are no drafters of other kinds"),
        ({"method": "eagles"}, "speculative_method='eagles'.*none, mtp, suffix, ngram, hybrid"),
        ({"method": 3}, "speculative_method=3"),
        (
            {"method": "mtp", "draft_tensor_size": 1},
            "no key 'draft_tensor_size'; known keys: .*method",
        ),
        ({"num_speculative_tokens": 3}, 'names no "method"; choose one of: none, mtp'),
        (
            {"method": "ngram", "min_match": 9, "max_match": 4},
            "speculative_min_match=9 is above speculative_max_match=4",
        ),
        (
            {"method": "ngram", "min_match": 3, "prompt_lookup_min": 4},
            "prompt_lookup_min=4 contradicts speculative_min_match=3",
        ),
        ({"method": "ngram", "acceptance": 1.5}, "speculative_acceptance=1.5 is a probability; give 0 to 1"),
        ({"method": "suffix", "memory_tokens": -1}, "speculative_memory_tokens=-1"),
        ({"method": "suffix", "adaptive": "yes"}, "speculative_adaptive='yes'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_does(keys, message) -> None:
    with pytest.raises(ConfigError, match=message):
        speculative(**keys)


@pytest.mark.parametrize(
    ("text", "message"), [("{method: mtp}", "is not JSON.*write e.g."), ("[]", "JSON object, not list")]
)
def test_text_that_is_no_json_object_is_refused_with_an_example(text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings(speculative_config=text)


def test_a_flag_and_the_json_may_say_the_same_and_not_contradict_each_other() -> None:
    given = {"method": "ngram", "num_speculative_tokens": 3}
    same = EngineConfig.from_settings(speculative_config=given, num_speculative_tokens=3).speculative
    assert same == SpeculativeConfig(speculative_method="ngram", num_speculative_tokens=3)
    with pytest.raises(ConfigError, match="num_speculative_tokens is 4 and, in speculative_config, 3"):
        EngineConfig.from_settings(speculative_config=given, num_speculative_tokens=4)


def test_flags_json_and_a_file_come_to_the_same(tmp_path) -> None:
    expected = SpeculativeConfig(speculative_method="suffix", num_speculative_tokens=4, speculative_memory_tokens=0)
    keys = {"method": "suffix", "num_speculative_tokens": 4, "memory_tokens": 0}
    parser = CommandParser()
    add_flags(parser)

    def parse(*words: str) -> SpeculativeConfig:
        return EngineConfig.from_settings(**settings_from_flags(parser.parse_args(words))).speculative

    assert parse("--speculative-config", json.dumps(keys)) == expected
    single = ["--speculative-method", "suffix", "--num-speculative-tokens", "4", "--speculative-memory-tokens", "0"]
    assert parse(*single) == expected
    for name, text in {
        "group": "speculative-config: {method: suffix, num_speculative_tokens: 4, memory_tokens: 0}",
        "text": """speculative_config: '{"method": "suffix", "num_speculative_tokens": 4, "memory_tokens": 0}'""",
        "section": "speculative:\n  speculative-method: suffix\n  num-speculative-tokens: 4\n  speculative-memory-tokens: 0",
        "nested": "speculative:\n  speculative-config:\n    method: suffix\n    num_speculative_tokens: 4\n    memory_tokens: 0",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        assert EngineConfig.from_settings(**read_settings(str(path))).speculative == expected, name
        assert parse("--config", str(path)) == expected, name


def test_a_line_of_the_log_says_method_and_proposals() -> None:
    assert str(speculative(method="mtp")) == "mtp, up to 3 proposals, adaptive"
    assert str(speculative(method="ngram", adaptive=False, num_speculative_tokens=2)) == (
        "ngram, up to 2 proposals, not adaptive"
    )
    assert str(SpeculativeConfig()) == "none"
