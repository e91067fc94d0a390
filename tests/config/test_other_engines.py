"""Flags of vLLM and FastDeploy: every one of them does what its row of the tables, and of docs/coming-from.md, says."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from stepgraph.cli import main
from stepgraph.command_parser import CommandParser
from stepgraph.config import EngineConfig, add_flags, read_settings, settings_from_flags
from stepgraph.config.engine import GROUPS
from stepgraph.config.fields import homes_of
from stepgraph.config.other_engines import tables, text_of, texts_of
from stepgraph.config.server import SERVE_PARTS
from stepgraph.config.speculative import SpeculativeConfig
from stepgraph.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests/data/flags_of_other_engines.json").read_text())
OURS = {*homes_of(SERVE_PARTS), *GROUPS, "config"}


@pytest.fixture(scope="module")
def parse():
    """The settings that a command line of `stepgraph serve` comes to."""
    parser = CommandParser(prog="stepgraph serve", allow_abbrev=False)
    add_flags(parser, server=True)
    return lambda *words: settings_from_flags(parser.parse_args(words), server=True)


def words_for(name, row, value) -> list[str]:
    """The command line that gives a flag this value."""
    flag = "--" + name.replace("_", "-")
    if row.takes == "switch":
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(text_of, value if row.takes == "values" and value else [value])]


def neutral_values(row):
    """Values that have no effect, but for an empty list, which no command line can give to a flag that takes several."""
    values = [row.example] if row.neutral == "any" else row.neutral
    return [value for value in values if row.takes != "values" or value]


def every_row():
    """Flags, and keys with the flag that holds them: how to write `value`, the name and the row."""
    for name, row in tables().flags.items():
        yield (lambda value, name=name, row=row: words_for(name, row, value)), name, row
    for group, rows in tables().keys.items():
        flag = "--" + group.replace("_", "-")
        beside = {"method": "suffix"} if group == "speculative_config" else {}
        for name, row in rows.items():
            yield (lambda value, f=flag, n=name, b=beside: [f, json.dumps({**b, n: value})]), name, row


def meant(value):
    return tuple(value) if isinstance(value, list) else value


def without_method(settings, name):
    """Less the method that a key of --speculative-config is given with."""
    return (
        settings
        if name == "method"
        else {n: v for n, v in settings.items() if (n, v) != ("speculative_method", "suffix")}
    )


def test_every_flag_and_key_of_the_recorded_lists_has_a_row():
    known = {"--" + name.replace("_", "-"): row for name, row in tables().flags.items()}
    spelled = {*known, *(alias for row in known.values() for alias in row.alias)}
    for engine, lists in RECORDED.items():
        assert {flag.replace("_", "-") for flag in lists["flags"]} <= spelled
        for flag in lists["flags"]:
            assert flag.replace("_", "-") not in known or engine in known[flag.replace("_", "-")].of, flag
        for group, keys in lists["keys"].items():
            assert [key for key in keys if engine not in tables().keys[group][key].of] == []
        listed = {name for name, row in known.items() if engine in row.of}
        assert listed == {flag.replace("_", "-") for flag in lists["flags"] if flag.startswith("--")} - {
            "--device-memory-utilization"
        }


def test_rows_that_claim_to_be_ours_are_and_the_others_are_not():
    assert [name for name, row in tables().flags.items() if row.same != (name in OURS)] == []
    targets = {row.to for rows in (tables().flags, *tables().keys.values()) for row in rows.values()} - {None}
    assert targets <= OURS


def test_what_has_no_effect_changes_no_setting_and_the_log_says_why(parse, caplog):
    count = 0
    for write, name, row in every_row():
        for value in neutral_values(row):
            caplog.clear()
            assert without_method(parse(*write(value)), name) == {}, (name, value)
            said = f"{name} has" if row.secret else f"{name}={meant(value)!r} has"
            assert caplog.messages == [f"{said} no effect here: {row.why}"]
            count += 1
    assert count > 200


def test_what_exists_under_another_name_or_value_becomes_that(parse, caplog):
    count = 0
    for write, name, row in every_row():
        for text, settings in row.map.items():
            value = json.loads(text) if re.fullmatch(r"-?\d+|true|false", text) else text
            assert without_method(parse(*write(value)), name) == settings, (name, text)
            count += 1
        if row.to is not None:
            assert row.example is not None, name
            expected = {row.to: row.map.get(text_of(row.example), {row.to: meant(row.example)})[row.to]}
            assert without_method(parse(*write(row.example)), name) == without_method(expected, name), name
            count += 1
    assert caplog.messages == []
    assert count > 100


def test_what_does_not_exist_is_refused_with_value_and_reason_and_the_way_out(parse):
    count = 0
    for write, name, row in every_row():
        assert row.refused or row.neutral == "any" or row.same or row.to or row.takes == "switch", name
        for value in row.refused:
            with pytest.raises(ConfigError) as refused:
                parse(*write(value))
            message = str(refused.value)
            shown = name if row.secret else f"{name}={meant(value)!r}"
            assert message.startswith(f"{shown} is not supported: {row.why}; leave it out"), message
            assert row.secret or all(accepted in message for accepted in texts_of(row.neutral))
            count += 1
    assert count > 150


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("max_logprobs", 50, "leave it out, or give 0 to 20"),
        ("worker_extension_cls", "a.b", 'leave it out, or give ""'),
    ],
)
def test_values_that_would_do_are_told_in_short(name, value, advice):
    with pytest.raises(ConfigError) as refused:
        EngineConfig.from_settings(**{name: value})
    assert str(refused.value).endswith(advice)


def test_a_limit_on_what_is_logged_of_prompts_is_not_passed_over(parse):
    with pytest.raises(
        ConfigError, match="max_log_len=0 is not supported: with --log-requests prompts are logged whole"
    ):
        parse("--enable-log-requests", "--max-log-len", "0")


@pytest.mark.parametrize("settings", [{"generation_config": "vllm"}, {"enable_log_requests": True}])
def test_settings_of_the_server_are_not_unknown_elsewhere(settings):
    with pytest.raises(ConfigError, match="is a setting of the server, which only `stepgraph serve` starts"):
        EngineConfig.from_settings(**settings)


def test_secrets_are_not_shown(parse, caplog):
    parse("--scheduler-password", "hush")
    with pytest.raises(ConfigError) as refused:
        parse("--hf-token", "hush")
    assert "hush" not in caplog.text + str(refused.value)


def test_files_and_keyword_arguments_know_them_too(tmp_path, caplog):
    settings = {
        "pipeline-parallel-size": 1,
        "tensor-parallel-size": 2,
        "enforce_eager": True,
        "num-gpu-blocks-override": 50,
        "dtype": "half",
        "swap_space": 4,
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
    expected = {"graph_backend": "eager", "num_kv_blocks": 50, "dtype": "float16", "tensor_parallel_size": 2}
    assert read_settings(str(tmp_path / "serve.yaml")) == expected
    assert len(caplog.messages) == 2
    named = {name.replace("-", "_"): value for name, value in settings.items()}
    assert EngineConfig.from_settings(**named) == EngineConfig.from_settings(**expected)
    (tmp_path / "serve.yaml").write_text("pipeline-parallel-size: 2")
    with pytest.raises(
        ConfigError, match=r"serve.yaml: pipeline_parallel_size=2 is not supported.*leave it out, or give 1"
    ):
        read_settings(str(tmp_path / "serve.yaml"))


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        (
            "-tp 2 -dp=1 -asc 4 --max_model_len 8k",
            {"max_model_len": 8000, "tensor_parallel_size": 2, "data_parallel_size": 1, "api_server_count": 4},
        ),
        ("--max-num-batched-tokens 8K --max-num-seqs=64", {"max_num_batched_tokens": 8192, "max_num_seqs": 64}),
        ("-O0", {"graph_backend": "eager"}),
        ("-O 3", {}),
        ("-O=0 MODEL", {"graph_backend": "eager", "model": "MODEL"}),
        ("-O.cudagraph_mode=NONE", {"graph_backend": "eager"}),
        ("-O '{\"cudagraph_capture_sizes\": [64]}'", {"capture_sizes": (64,)}),
        ("-cc '{\"level\": 3}' MODEL", {"model": "MODEL"}),
        (
            "-cc.cudagraph_capture_sizes+ 64,512 -cc.max_cudagraph_capture_size=512",
            {"capture_sizes": (64, 512), "max_capture_size": 512},
        ),
        ("--compilation_config.pass_config.fuse_norm_quant true", {}),
        (
            "-sc.method ngram --speculative-config.prompt_lookup_max 4",
            {"speculative_method": "ngram", "speculative_max_match": 4},
        ),
        ("--graph-optimization-config.use_cudagraph false", {"graph_backend": "eager"}),
        ("--disable-prefix-caching --no-enable-lora", {"enable_prefix_caching": False, "enable_lora": False}),
        ("--enable_chunked_prefill --disable-log-requests", {"log_requests": False}),
        ("--no-enable-chunked-prefill --disable-chunked-prefill --enable-custom-all-reduce", {}),
        ("--disable-sleep-mode --no-enable-log-requests", {"enable_sleep_mode": False, "log_requests": False}),
        ("--device-memory-utilization 0.5 --dtype half", {"gpu_memory_utilization": 0.5, "dtype": "float16"}),
        (
            "--enable-auto-tool-choice --tool-call-parser llama3_json --reasoning-parser deepseek_r1",
            {"tool_call_parser": "llama", "reasoning_parser": "think"},
        ),
        ("--tool-call-parser qwen3_xml", {"tool_call_parser": "qwen3_coder"}),
        ("--tool-call-parser qwen3_coder", {"tool_call_parser": "qwen3_coder"}),
        (
            "--tool-call-parser gemma4 --reasoning-parser gemma4",
            {"tool_call_parser": "gemma4", "reasoning_parser": "gemma4"},
        ),
        (
            "--tool-call-parser openai --reasoning-parser openai_gptoss",
            {"tool_call_parser": "harmony", "reasoning_parser": "harmony"},
        ),
        ("--api_key one --allowed-origins '[\"*\"]'", {"api_key": ("one",), "cors_allow_origins": ("*",)}),
        (
            "m --cudagraph-capture-sizes 1 2 4 --served_model_name a b",
            {"model": "m", "capture_sizes": (1, 2, 4), "served_model_name": ("a", "b")},
        ),
        ("--seed -1 --generation-config vllm", {"seed": -1, "generation_config": "none"}),
        (
            "--splitwise-role mixed --use-cudagraph --workers 1 --swap-space 4 --cache-queue-port 7734 --cuda-graph-sizes 512",
            {"api_server_count": 1, "splitwise_role": "mixed"},
        ),
        ("--guided-decoding-disable-any-whitespace True", {"disable_any_whitespace": True}),
    ],
)
def test_command_lines_may_be_spelled_as_there(parse, line, settings):
    assert parse(*shlex.split(line)) == settings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "-pp 2",
            "pipeline_parallel_size=2 is not supported: tensor_parallel_size is how devices share a model",
        ),
        ("--tool-call-parser glm45", "tool_call_parser='glm45' is not supported: calls in other forms"),
        (
            "--reasoning-parser=seed_oss",
            "reasoning_parser='seed_oss' is not supported: reasoning in other forms",
        ),
        ("-sc.method eagle3 -sc.num_speculative_tokens 3", "method='eagle3' is not supported: there are no drafters"),
        (
            "-cc.mode 3 --compilation-config {}",
            "--compilation-config is given whole and by its keys; give it in one way",
        ),
        ("-cc.mode 3 -cc.mode 0", "--compilation-config.mode is given twice"),
        ("--compilation-config [1]", "compilation_config must be a JSON object, not list"),
        ("--compilation-config.modes 3", "compilation_config has no key 'modes'; known keys: backend, "),
        ("--num-gpu-blocks-override 5 --num-kv-blocks 6", "asks for num_kv_blocks="),
        ("--device cuda:0", "device='cuda:0' is not known; choose one of: auto, cpu, cuda. "),
        ("--num-gpu-blocks-override many", "num_kv_blocks='many' must be a whole number"),
        (
            "--reasoning-parser qwen-3",
            "reasoning_parser='qwen-3' is not known; choose one of: auto, none, think, gemma4, harmony\n",
        ),
        ("--enforce-eager -O 0 --graph-backend cpu", "asks for graph_backend='eager', and graph_backend for 'cpu'"),
    ],
)
def test_a_command_line_that_cannot_be_followed_ends_with_one_sentence_and_exit_code_2(line, message, capsys):
    assert main(["serve", *shlex.split(line)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--capture sometimes", "argument --capture: invalid choice: 'sometimes'"),
        ("--max-num-seqs", "argument --max-num-seqs: expected one argument"),
        ("--enforce-eager=True", "argument --enforce-eager/--no-enforce-eager: ignored explicit argument 'True'"),
    ],
)
def test_what_argparse_refuses_is_one_line_too(line, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *shlex.split(line)])
    error = capsys.readouterr().err
    assert error.startswith(f"error: stepgraph serve: {message}")
    assert error.endswith(". See stepgraph serve --help\n")
    assert error.count("\n") == 1


def test_flags_that_nobody_has_stay_unknown_and_values_that_look_like_keys_stay_values(parse, capsys):
    for words, unknown in (
        (["--max_num_seq", "8"], "--max_num_seq"),
        (["-tpp", "2"], "-tpp"),
        (["--foo.bar", "1"], "--foo.bar"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(*words)
        assert f"does not know {unknown}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parse("--tensor-paralel-size", "2")
    assert "did you mean --tensor-parallel-size?" in capsys.readouterr().err
    assert parse("--gpu-memory-utilization", "0.5", "--model", "a.b") == {"gpu_memory_utilization": 0.5, "model": "a.b"}


def test_the_page_is_what_the_script_makes_now():
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts/make_coming_from_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(), "run: python scripts/make_coming_from_page.py"
    assert f"vLLM {RECORDED['vLLM']['version']}" in page
    assert all(commit in page for commit in re.findall(r"\b[0-9a-f]{12}\b", RECORDED["FastDeploy"]["version"]))


def test_the_page_about_speculation_names_the_numbers_of_proposals_that_methods_have():
    page = (ROOT / "docs/speculative-decoding.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (\d+) \| .* \|$", page, re.MULTILINE))
    methods = ("mtp", "suffix", "ngram", "hybrid")
    assert rows == {method: str(SpeculativeConfig(speculative_method=method).max_drafts) for method in methods}
