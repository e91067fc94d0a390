"""Settings of the server: what they accept and refuse, where keys come from, and that none is ever shown."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.command_parser import CommandParser
from stepgraph.config import EngineConfig, ServerConfig, add_flags, serve_config, settings_from_flags
from stepgraph.config.server import MAX_ANSWERS, SERVE_PARTS, engine_log_level
from stepgraph.engine.sampling_params import MAX_N
from stepgraph.errors import ConfigError
from stepgraph.server import serve

NON_DEFAULT = {
    "host": "0.0.0.0",
    "port": 8988,
    "metrics_port": 7730,
    "engine_worker_queue_port": 7731,
    "api_server_count": 3,
    "prefill_devices": (0, 2),
    "decode_devices": (1,),
    "min_remote_prefill_tokens": 64,
    "root_path": "/llm",
    "served_model_name": ("assistant", "smollm2"),
    "lora_modules": ("poems=adapters/poems", "code=adapters/a=b"),
    "chat_template": "template.jinja",
    "generation_config": "none",
    "override_generation_config": {"temperature": 0.6},
    "default_chat_template_kwargs": {"enable_thinking": False},
    "tool_call_parser": "mistral",
    "reasoning_parser": "none",
    "api_key": ("one", "two"),
    "api_key_file": "keys.txt",
    "cors_allow_origins": ("https://example.org", "http://localhost:3000", "*"),
    "max_queue": 0,
    "max_n": 64,
    "max_body_mib": 0.5,
    "max_bodies_mib": 2.5,
    "max_body_items": 1000,
    "max_connections": 100,
    "max_header_kib": 8.5,
    "header_timeout": 2.5,
    "body_timeout": 3.5,
    "keep_alive_timeout": 4.5,
    "stall_timeout": 5.5,
    "engine_hang_timeout": 6.5,
    "request_timeout": 120.5,
    "shutdown_timeout": 0.0,
    "enable_admin_endpoints": True,
    "ui": False,
    "access_log": True,
    "log_requests": True,
    "otlp_traces_endpoint": "http://127.0.0.1:4318/v1/traces",
}


def parse(*arguments: str) -> tuple[EngineConfig, ServerConfig]:
    parser = CommandParser()
    add_flags(parser, server=True)
    return serve_config(settings_from_flags(parser.parse_args(arguments), server=True))


def flags_of(server: ServerConfig) -> list[str]:
    """The command line that asks for `server`, written from its fields alone."""
    words = []
    for field in dataclasses.fields(server):
        value, flag = getattr(server, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        elif value is not None:
            words += [flag, str(value)]
    return words


def test_every_setting_has_a_flag_that_gives_it_back():
    server, default = ServerConfig(**NON_DEFAULT), ServerConfig()
    for field in dataclasses.fields(server):
        assert getattr(server, field.name) != getattr(default, field.name), field.name
    assert parse("some-model", "--enable-lora", *flags_of(server))[1] == server
    assert parse(*flags_of(default)) == parse() == (EngineConfig(), default)


def test_no_name_of_a_setting_is_used_twice_and_none_is_that_of_a_section():
    names = [field.name for part in SERVE_PARTS.values() for field in dataclasses.fields(part)]
    assert len(set(names)) == len(names)
    assert set(names) & set(SERVE_PARTS) == {"model"}


def test_flat_settings_are_sorted_into_those_of_the_engine_and_of_the_server():
    engine, server = serve_config({"model": "folder", "port": 80, "max_num_seqs": 4, "served_model_name": ["a", "b"]})
    assert engine == EngineConfig.from_settings(model="folder", max_num_seqs=4)
    assert server == ServerConfig(port=80, served_model_name=("a", "b"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prot": 80}, r"unknown setting 'prot'; did you mean 'port'\? Known settings: access_log, "),
        ({"max_num_seq": 8}, r"unknown setting 'max_num_seq'; did you mean 'max_num_seqs'\?"),
        ({"zzz": 8}, r"unknown setting 'zzz'; known settings: [^;]*$"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is not supported: tensor_parallel_size is how"),
        (
            {"port": 8001, "engine_worker_queue_port": 8000, "data_parallel_size": 2},
            "engine_worker_queue_port=8000 takes 2 ports, and 8001 is port too",
        ),
        ({"data_parallel_size": 0}, "data_parallel_size=0 is too small; the smallest value is 1"),
        (
            {"engine_worker_queue_port": 65535, "data_parallel_size": 2},
            "engine_worker_queue_port=65535 of 2 engines needs ports up to 65536, and the largest is 65535",
        ),
        ({"max_num_seqs": 0}, "max_num_seqs=0 is too small"),
        ({"port": -1}, "port=-1 is too small; the smallest value is 0"),
        ({"port": 65536}, "port=65536 is not a port; the largest is 65535"),
        ({"metrics_port": 70000}, "metrics_port=70000 is not a port"),
        ({"port": 80, "metrics_port": 80}, "metrics_port=80 is port too; give them different ports"),
        ({"engine_worker_queue_port": 8000}, "engine_worker_queue_port=8000 is port too"),
        ({"port": "80"}, "port='80' must be a whole number"),
        ({"host": ""}, "host is empty"),
        ({"max_n": 65}, "max_n=65 is above 64"),
        ({"max_n": 0}, "max_n=0 is too small; the smallest value is 1"),
        ({"request_timeout": 0}, "request_timeout=0 is too small"),
        ({"request_timeout": float("nan")}, "request_timeout=nan must be a finite number"),
        ({"shutdown_timeout": float("inf")}, "shutdown_timeout=inf must be a finite number"),
        ({"tool_call_parser": "json"}, "tool_call_parser='json' is not known; choose one of: auto, none, hermes"),
        ({"root_path": "llm"}, "root_path='llm' must begin with a slash"),
        ({"root_path": "/llm/"}, "root_path='/llm/' must begin with a slash and not end with one"),
        ({"otlp_traces_endpoint": "collector:4317"}, "otlp_traces_endpoint='collector:4317' is not the URL"),
        ({"cors_allow_origins": ["example.org"]}, "cors_allow_origins: 'example.org' is not an origin"),
        ({"cors_allow_origins": ["https://example.org/"]}, "'https://example.org/' is not an origin.*without a slash"),
        ({"served_model_name": ["a", ""]}, "served_model_name: a name is empty"),
        ({"served_model_name": ["a", "a"]}, "two models are called 'a'"),
        ({"served_model_name": []}, "served_model_name is empty"),
        ({"lora_modules": ["poems"], "enable_lora": True}, "lora_modules: 'poems' must be NAME=FOLDER"),
        ({"lora_modules": ["=folder"], "enable_lora": True}, "lora_modules: '=folder' must be"),
        ({"lora_modules": ["poems="], "enable_lora": True}, "lora_modules: 'poems=' must be"),
        ({"lora_modules": ["a=x", "a=y"], "enable_lora": True}, "two models are called 'a'"),
        ({"lora_modules": ["a=x"], "served_model_name": ["a"], "enable_lora": True}, "two models are called 'a'"),
        ({"lora_modules": ["smollm2=x"], "enable_lora": True}, "'smollm2' is the model's own name"),
        ({"lora_modules": ["a=x"]}, "lora_modules=a=x needs enable_lora"),
    ],
)
def test_a_bad_setting_is_refused_with_the_value_and_the_limit(settings, message):
    with pytest.raises(ConfigError, match=message):
        serve_config(settings)


def test_any_port_may_be_asked_for_twice_and_adapters_are_split_at_the_first_equals_sign():
    assert ServerConfig(port=0, metrics_port=0).metrics_port == 0
    assert ServerConfig(**NON_DEFAULT).adapters() == {"poems": "adapters/poems", "code": "adapters/a=b"}
    assert ServerConfig().adapters() == {}


def test_the_limit_of_answers_is_the_engines():
    assert MAX_ANSWERS == MAX_N


def test_keys_of_flags_file_and_environment_all_count_once(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_bytes(b"in-file\r\n\n  padded \none\n")
    monkeypatch.setenv("STEPGRAPH_API_KEY", "from-environment")
    server = ServerConfig(api_key=("one", "two"), api_key_file=str(file))
    assert server.api_keys() == ("one", "two", "in-file", "padded", "from-environment")
    assert ServerConfig().api_keys() == ("from-environment",)
    monkeypatch.delenv("STEPGRAPH_API_KEY")
    assert ServerConfig().api_keys() == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "holds no key"),
        (b"\n \n", "holds no key"),
        (b"good\nwith space\n", "key 2 has a space"),
        (b"\xff\xfe", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_file_without_usable_keys_is_refused_rather_than_leaving_the_server_open(content, message, tmp_path):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))}.*{message}"):
        ServerConfig(api_key_file=str(file)).api_keys()


@pytest.mark.parametrize("value", ["", "two words", "schlüssel"])
def test_a_variable_that_is_empty_or_no_key_is_refused(value, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_API_KEY", value)
    with pytest.raises(ConfigError, match="environment variable STEPGRAPH_API_KEY: key 1") as caught:
        ServerConfig().api_keys()
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize("theirs", ["VLLM_API_KEY", "FD_API_KEY"])
def test_a_key_in_a_variable_of_another_engine_does_not_leave_the_server_open(theirs, monkeypatch):
    monkeypatch.setenv(theirs, "hush")
    with pytest.raises(ConfigError, match=f"{theirs} is not read here, .*; set STEPGRAPH_API_KEY") as caught:
        ServerConfig().api_keys()
    assert "hush" not in str(caught.value)
    assert ServerConfig(api_key=("mine",)).api_keys() == ("mine",)
    monkeypatch.setenv(theirs, "")  # which protects nothing there
    assert ServerConfig().api_keys() == ()


@pytest.mark.parametrize(("value", "level"), [(None, "WARNING"), ("INFO", "INFO"), ("debug", "DEBUG")])
def test_the_engines_log_level_is_the_variables_in_any_case(value, level, monkeypatch):
    monkeypatch.delenv("STEPGRAPH_LOG_LEVEL", raising=False)
    if value is not None:
        monkeypatch.setenv("STEPGRAPH_LOG_LEVEL", value)
    assert engine_log_level() == level


@pytest.mark.parametrize("value", ["", "loud", "NOTSET"])
def test_a_log_level_that_is_none_is_refused_before_anything_starts(value, monkeypatch):
    monkeypatch.setenv("STEPGRAPH_LOG_LEVEL", value)
    monkeypatch.setattr(serve, "listen", lambda *_: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match=f"STEPGRAPH_LOG_LEVEL: '{value}' is not known; choose one of: DEBUG, INFO"):
        serve.run({}, ServerConfig())


def test_a_key_is_in_no_repr():
    assert "tr0ub4dor" not in repr(ServerConfig(api_key=("tr0ub4dor",)))


@pytest.mark.parametrize("broken", [["tr0ub4dor", ""], ["tr0ub4dor 3"], "tr0ub4dor", [["tr0ub4dor"]], {"tr0ub4dor": 1}])
def test_a_key_is_in_no_error_about_keys(broken):
    with pytest.raises(ConfigError, match="api_key") as caught:
        serve_config({"api_key": broken})
    assert "tr0ub4dor" not in str(caught.value)


@given(st.text())
def test_a_key_is_accepted_exactly_if_a_header_carries_it_unchanged(key):
    def accepted() -> bool:
        try:
            ServerConfig(api_key=(key,))
        except ConfigError:
            return False
        return True

    assert accepted() == (re.fullmatch(r"[!-~]+", key) is not None)


def test_a_chat_template_is_a_file_unless_it_is_one_itself(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert ServerConfig().chat_template_text() is None
    assert ServerConfig(chat_template=str(file)).chat_template_text() == "{{ messages }}"
    for text in ("{{ messages }}", "{% for m in messages %}x{% endfor %}", "{{" * 5000):
        assert ServerConfig(chat_template=text).chat_template_text() == text
    with pytest.raises(ConfigError, match=r"chat_template='missing\.jinja' cannot be read: No such file"):
        ServerConfig(chat_template="missing.jinja").chat_template_text()


def test_a_list_does_not_swallow_the_model():
    with pytest.raises(ConfigError, match="--api-key took several values and there is no MODEL"):
        parse("--api-key", "secret", "some-model")
    engine, server = parse("--api-key", "secret", "--api-key", "other")
    assert (engine.model.model, server.api_key) == ("smollm2", ("secret", "other"))
    engine, server = parse("some-model", "--served-model-name", "a", "b", "--served-model-name", "c")
    assert (engine.model.model, server.served_model_name) == ("some-model", ("a", "b", "c"))


def test_the_model_may_be_an_argument_or_a_flag_or_both_if_they_agree():
    for words in (["m"], ["--model", "m"], ["m", "--model", "m"]):
        assert parse(*words)[0].model.model == "m"
    with pytest.raises(ConfigError, match="MODEL is 'm' and --model is 'other'"):
        parse("m", "--model", "other")


def test_settings_survive_json():
    settings = {**NON_DEFAULT, "enable_lora": True}
    assert serve_config(json.loads(json.dumps(settings))) == serve_config(settings)


def test_a_setting_that_is_a_json_object_is_one_in_every_form(capsys):
    assert serve_config({"default_chat_template_kwargs": {}})[1].default_chat_template_kwargs == {}
    with pytest.raises(ConfigError, match="default_chat_template_kwargs='no' must be a JSON object"):
        serve_config({"default_chat_template_kwargs": "no"})
    with pytest.raises(SystemExit, match="2"):
        parse("--default-chat-template-kwargs", "[1]")
    assert "--default-chat-template-kwargs: '[1]' is not a JSON object" in capsys.readouterr().err
