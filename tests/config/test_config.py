"""Settings: what they accept, what they refuse and in which words, and the forms derived from them."""

import dataclasses
import json

import pytest

from stepgraph.command_parser import CommandParser
from stepgraph.config import EngineConfig, GraphConfig, add_flags, settings_from_flags
from stepgraph.errors import ConfigError

PARTS = ("model", "cache", "scheduler", "graph", "lora")
DEFAULT = EngineConfig()


def graph_of(**keys) -> GraphConfig:
    """The graph settings that keys of --graph-optimization-config come to."""
    return EngineConfig.from_settings(graph_optimization_config=json.dumps(keys)).graph


@pytest.mark.parametrize(
    ("key", "value", "name", "effect"),
    [
        ("use_cudagraph", False, "graph_backend", "eager"),
        ("use_cudagraph", True, "graph_backend", "auto"),
        ("cudagraph_capture_sizes", [64, 128], "capture_sizes", (64, 128)),
        ("max_capture_size", 512, "max_capture_size", 512),
        ("max_capture_shape_prefill", 512, "max_prefill_capture_size", 512),
        ("cudagraph_only_prefill", True, "cudagraph_only_prefill", True),
        ("cudagraph_num_of_warmups", 3, "capture_warmups", 3),
        ("expected_decode_len", 4096, "capture_context_len", 4096),
    ],
)
def test_a_key_of_fastdeploy_has_its_effect(key, value, name, effect) -> None:
    assert graph_of(**{key: value}) == dataclasses.replace(GraphConfig(), **{name: effect})


def test_a_switch_is_not_taken_for_a_level() -> None:
    for key, value in (("graph_opt_level", False), ("full_cuda_graph", 1)):
        with pytest.raises(ConfigError, match=key):
            graph_of(**{key: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{use_cudagraph: true}", r"not JSON \(Expecting property name.*write e\.g\."),
        ("", "not JSON"),
        ("[64, 128]", "must be a JSON object, not list"),
        ("true", "must be a JSON object, not bool"),
        (["use_cudagraph"], "must be a JSON object, not tuple"),
        ('{"capture_size": [64]}', "no key 'capture_size'; known keys:.*capture_sizes"),
        (
            '{"use_cudagraph": "yes"}',
            "use_cudagraph='yes' is not supported: it is a switch; leave it out, or give true or false",
        ),
        ('{"cudagraph_capture_sizes": 512}', "capture_sizes=512 must be a list"),
        ('{"cudagraph_capture_sizes": []}', "capture_sizes.*empty"),
        ('{"cudagraph_capture_sizes": [8, 16.5]}', r"each entry of capture_sizes=\(8, 16.5\) must be a whole number"),
        ('{"cudagraph_capture_sizes": [0, 8]}', r"capture_sizes=\(0, 8\) is too small; the smallest value is 1"),
        ('{"cudagraph_only_prefill": "yes"}', "cudagraph_only_prefill='yes' must be true or false"),
        ('{"max_capture_size": true}', "max_capture_size=True must be a whole number"),
        ('{"cudagraph_num_of_warmups": 0}', "capture_warmups=0 is too small; the smallest value is 1"),
        ('{"use_cudagraph": false, "graph_backend": "cpu"}', "contradict"),
        ('{"graph_backend": "cpu", "use_cudagraph": false}', "contradict"),
        ('{"graph_backend": "eager", "use_cudagraph": true}', "contradict"),
    ],
)
def test_a_graph_optimization_config_that_makes_no_sense_is_refused_in_words(text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings(graph_optimization_config=text)


def test_a_setting_given_twice_must_be_the_same_twice() -> None:
    given = {"capture_sizes": [8, 16]}
    assert EngineConfig.from_settings(**given, graph_optimization_config=given).graph.capture_sizes == (8, 16)
    both = {"cudagraph_capture_sizes": [8, 16], "capture_sizes": [8, 16]}
    assert graph_of(**both).capture_sizes == (8, 16)
    with pytest.raises(ConfigError, match=r"max_capture_size is 8 and, in graph_optimization_config, 16"):
        EngineConfig.from_settings(max_capture_size=8, graph_optimization_config={"max_capture_size": 16})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_num_seq": 8},
            "unknown setting 'max_num_seq'; did you mean 'max_num_seqs'. Known settings:.*max_num_seqs",
        ),
        ({"dtype": "float8"}, "dtype='float8' is not known; choose one of: auto, float32, bfloat16, float16"),
        ({"dtype": ["float32"]}, "dtype="),
        ({"max_num_seqs": 0}, "max_num_seqs=0 is too small; the smallest value is 1"),
        ({"max_num_seqs": "8"}, "max_num_seqs='8' must be a whole number"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5 must be a whole number"),
        ({"max_num_seqs": None}, "max_num_seqs=None must be a whole number"),
        ({"max_num_seqs": 2000}, "max_num_seqs=2000 is above 1024"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, "max_num_batched_tokens=4 is below max_num_seqs=8.*raise"),
        ({"block_size": 24}, "block_size=24 is not a power of two; use e.g. 16"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5 is above 1; use e.g. 0.9"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0 is too small; the smallest value is 0.01"),
        ({"max_model_len": 1}, "max_model_len=1 is too small; the smallest value is 2"),
        ({"seed": -(2**63) - 1}, "seed=-9223372036854775809 is too small; the smallest value is -9223372036854775808"),
        ({"capture": "some"}, "capture='some' is not known; choose one of: auto, lazy, all"),
        ({"model": 7}, "model=7 must be text"),
        ({"quantization": "awq"}, "quantization='awq' is none of auto.*AWQ.*leave it at auto"),
    ],
)
def test_a_bad_value_is_refused_with_the_value_and_the_limit(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings(**settings)


def test_a_limit_given_alone_makes_the_other_limits_default_yield() -> None:
    assert EngineConfig.from_settings(max_num_batched_tokens=16).scheduler.max_num_seqs == 16
    assert EngineConfig.from_settings(max_num_seqs=1024).scheduler.max_num_batched_tokens == 2048


NON_DEFAULT = {
    "model": "some-folder",
    "dtype": "bfloat16",
    "quantization": "fp8",
    "load_format": "dummy",
    "max_model_len": 100,
    "seed": 7,
    "device": "cpu",
    "model_impl": "transformers",
    "deterministic": True,
    "block_size": 32,
    "num_kv_blocks": 50,
    "gpu_memory_utilization": 0.5,
    "enable_prefix_caching": False,
    "kv_cache_dtype": "fp8",
    "enable_sleep_mode": True,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 77,
    "max_num_partial_prefills": 3,
    "max_long_partial_prefills": 2,
    "long_prefill_token_threshold": 40,
    "insertion_policy": "gather",
    "prefill_gather_size": 7,
    "prefill_gather_ms": 12.5,
    "graph_backend": "cpu",
    "capture": "all",
    "capture_sizes": (8, 16),
    "capture_rows": (2, 4),
    "max_capture_size": 16,
    "cudagraph_only_prefill": True,
    "max_prefill_capture_size": 12,
    "graph_memory_mib": 100,
    "capture_context_len": 90,
    "capture_warmups": 2,
    "enable_lora": True,
    "max_loras": 7,
    "max_lora_rank": 32,
}


def parse(*arguments: str, positional_model: bool = True) -> EngineConfig:
    parser = CommandParser()
    add_flags(parser, positional_model=positional_model)
    return EngineConfig.from_settings(**settings_from_flags(parser.parse_args(arguments)))


def flags_of(config: EngineConfig) -> list[str]:
    """The command line that asks for `config`, written from the dataclasses' fields alone."""
    words = []
    for part in PARTS:
        for field in dataclasses.fields(getattr(config, part)):
            value, flag = getattr(getattr(config, part), field.name), "--" + field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                words += [flag, *map(str, value)]
            elif value is not None:
                words += [flag, str(value)]
    return words


def test_every_setting_has_a_flag_that_gives_it_back() -> None:
    assert set(NON_DEFAULT) == {field.name for part in PARTS for field in dataclasses.fields(getattr(DEFAULT, part))}
    config = EngineConfig.from_settings(**NON_DEFAULT)
    for part in PARTS:
        for field in dataclasses.fields(getattr(config, part)):
            assert getattr(getattr(config, part), field.name) != getattr(getattr(DEFAULT, part), field.name), field.name
    assert parse(*flags_of(config), positional_model=False) == config
    assert parse(*flags_of(DEFAULT), positional_model=False) == DEFAULT


def test_no_flags_give_the_defaults_and_the_model_may_be_positional() -> None:
    assert parse() == parse(positional_model=False) == DEFAULT
    assert parse("some-folder").model.model == "some-folder"
    assert parse("--graph-optimization-config", '{"use_cudagraph": false}').graph.graph_backend == "eager"


def test_a_flag_with_a_value_outside_its_choices_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("--capture", "sometimes")
    assert "lazy" in capsys.readouterr().err
    with pytest.raises(
        ConfigError, match=r"^device='tpu' is not known; choose one of: auto, cpu, cuda\. Others come with"
    ):
        parse("--device", "tpu")
    with pytest.raises(
        ConfigError, match=r"dtype='float8' is not known; choose one of: auto, float32, bfloat16, float16$"
    ):
        parse("--dtype", "float8")


def test_settings_survive_json() -> None:
    assert EngineConfig.from_settings(**json.loads(json.dumps(NON_DEFAULT))) == EngineConfig.from_settings(
        **NON_DEFAULT
    )


def test_a_seed_below_zero_is_the_one_of_the_same_64_bits() -> None:
    assert EngineConfig.from_settings(seed=-1).model.seed == 2**64 - 1
    assert EngineConfig.from_settings(seed=7).model.seed == 7
