"""Settings from a YAML file: every way to write them comes to the same, and what is wrong is named with the file."""

import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgraph.command_parser import CommandParser
from stepgraph.config import EngineConfig, ServerConfig, add_flags, read_settings, serve_config, settings_from_flags
from stepgraph.errors import ConfigError

SETTINGS = {
    "model": {"model": "some-folder", "dtype": "bfloat16", "max_model_len": 100, "deterministic": True},
    "cache": {"block_size": 32, "gpu_memory_utilization": 0.5, "enable_prefix_caching": False},
    "scheduler": {"max_num_seqs": 3, "prefill_gather_ms": 12.5},
    "graph": {"capture_sizes": [8, 16], "graph_optimization_config": {"cudagraph_num_of_warmups": 2}},
    "guidance": {"disable_any_whitespace": True},
    "lora": {"enable_lora": True},
    "server": {"port": 80, "served_model_name": ["a", "b"], "lora_modules": ["c=d"], "request_timeout": 5},
}
"""By section, as one writes them in a file."""
SECTION_OF = {name: section for section, inner in SETTINGS.items() for name in inner}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Writes a file of settings; returns its path."""
    path = tmp_path_factory.mktemp("settings") / "serve.yaml"

    def write(text: str) -> str:
        path.write_text(text)
        return str(path)

    return write


def parse(*arguments: str, server: bool = True) -> tuple[EngineConfig, ServerConfig]:
    parser = CommandParser()
    add_flags(parser, server=server)
    return serve_config(settings_from_flags(parser.parse_args(arguments), server=server))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_settings_mean_the_same_at_the_top_and_in_their_section_with_dashes_and_underscores(file, data):
    """Any of the settings, each written in any of the ways a file has for it."""
    names = data.draw(st.sets(st.sampled_from(sorted(SECTION_OF))))
    model_at_top = data.draw(st.booleans())  # `model` is a setting or a section of a file, not both
    written: dict = {}
    for name in sorted(names):
        section = SECTION_OF[name]
        at_top = model_at_top if section == "model" else data.draw(st.booleans())
        key = data.draw(st.sampled_from([name, name.replace("_", "-")]))
        (written if at_top else written.setdefault(section, {}))[key] = SETTINGS[section][name]
    plain = {name: SETTINGS[SECTION_OF[name]][name] for name in names}
    always = {"enable_lora": True}  # `lora_modules` needs it
    assert serve_config(read_settings(file(yaml.safe_dump(written))) | always) == serve_config(plain | always)


def test_an_empty_file_and_empty_sections_hold_nothing(file):
    assert read_settings(file("")) == {}
    assert read_settings(file("# nothing\nmodel:\nserver:\n  # port: 80\ncache: {}\n")) == {}


def test_one_text_does_for_a_list_of_texts(file):
    assert read_settings(file("served-model-name: a\napi-key: secret")) == {
        "served_model_name": ("a",),
        "api_key": ("secret",),
    }


def test_flags_override_the_file_setting_by_setting(file):
    path = file("model: in-file\nport: 80\nmax_num_seqs: 4\nenable_prefix_caching: false\nserved_model_name: [a, b]\n")
    engine, server = parse("--config", path, "--port", "90", "--served-model-name", "c", "--enable-prefix-caching")
    assert engine == EngineConfig.from_settings(model="in-file", max_num_seqs=4)
    assert server == ServerConfig(port=90, served_model_name=("c",))
    assert parse("on-line", "--config", path)[0].model.model == "on-line"


def test_flags_override_the_file_inside_the_graphs_json_too(file):
    path = file("graph_optimization_config: {cudagraph_capture_sizes: [8], cudagraph_num_of_warmups: 3}")
    json = '{"cudagraph_capture_sizes": [16]}'
    for flags in (["--capture-sizes", "16"], ["--graph-optimization-config", json]):
        graph = parse("--config", path, *flags)[0].graph
        assert (graph.capture_sizes, graph.capture_warmups) == ((16,), 3)
    graph = parse("--config", file("capture_sizes: [8]"), "--graph-optimization-config", json)[0].graph
    assert graph.capture_sizes == (16,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: [", "this is not YAML: .*line 1"),
        ("port: 2024-13-45", "this is not YAML: month"),
        ("- port", "the file must hold a mapping, as in `max-num-seqs: 8`, not list"),
        ("smollm2", "the file must hold a mapping.*not str"),
        ("80: port", "the file: the key 80 is not text"),
        (
            "prot: 80",
            r"unknown setting 'prot'; did you mean 'port'\? Known settings: access_log, api_key, api_key_file, api_server_count",
        ),
        ("port: 80\nserver: {port: 80}", "port is given twice"),
        ("max-num-seqs: 8\nmax_num_seqs: 8", "max_num_seqs is given twice"),
        ("cache: 16", "cache=16 must be a mapping of settings"),
        ("cache: [16]", r"cache=\[16\] must be a mapping of settings"),
        ("cache: {1: 2}", "cache: the key 1 is not text"),
        ("cache: {port: 80}", "cache: port is a setting of server; move it there"),
        (
            "cache: {block_sise: 80}",
            r"unknown setting 'block_sise'; did you mean 'block_size'\? Known settings: block_size, [a-z_, ]*$",
        ),
        ("model: 7", "model=7 must be text"),
        ("max_num_seqs: '8'", "max_num_seqs='8' must be a whole number"),
        ("max_num_seqs:", "max_num_seqs=None must be a whole number"),
        ("enable_lora: 1", "enable_lora=1 must be true or false"),
        ("served_model_name: [a, 1]", r"each entry of served_model_name=\('a', 1\) must be text"),
        ("request_timeout: .nan", "request_timeout=nan must be a finite number"),
        ("graph: {graph_optimization_config: {full_cuda_graph: false}}", "full_cuda_graph=False is not supported"),
        (
            "capture_sizes: [8]\ngraph_optimization_config: {capture_sizes: [16]}",
            "capture_sizes is .8,. and, in graph_optimization_config, .16,.",
        ),
    ],
)
def test_what_is_wrong_is_named_with_the_file(text, message, file):
    with pytest.raises(ConfigError, match=rf"serve\.yaml: {message}") as caught:
        read_settings(file(text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: the file cannot be read: No such file"):
        read_settings(str(tmp_path / "none.yaml"))
    (tmp_path / "binary").write_bytes(b"port: \xff")
    with pytest.raises(ConfigError, match="binary: this is not YAML: 'utf-8' codec"):
        read_settings(str(tmp_path / "binary"))


def test_a_key_in_a_file_is_in_no_error(file):
    for text in ("api_key: {tr0ub4dor: 1}", "api_key: [[tr0ub4dor]]", "api_key: [tr0ub4dor, 1]"):
        with pytest.raises(ConfigError, match="api_key") as caught:
            read_settings(file(text))
        assert "tr0ub4dor" not in str(caught.value)


def test_commands_without_a_server_take_engine_settings_from_a_file_and_refuse_those_of_the_server(file):
    assert parse("--config", file("cache: {block_size: 32}"), server=False)[0].cache.block_size == 32
    with pytest.raises(ConfigError, match=r"serve\.yaml: port is a setting of the server.*stepgraph serve"):
        parse("--config", file("block_size: 32\nserver: {port: 80}"), server=False)


def test_without_pyyaml_the_error_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"needs PyYAML; run: pip install 'stepgraph\[server\]'"):
        read_settings(file("port: 80"))


@pytest.mark.parametrize("word", ["on", "off"])
def test_words_that_yaml_takes_for_booleans_stay_words_where_they_are_values(file, word):
    assert read_settings(file(f"expert-parallel-mixed: {word}")) == {"expert_parallel_mixed": word}
    assert read_settings(file(f"parallel: {{expert_parallel_mixed: '{word}'}}")) == {"expert_parallel_mixed": word}
