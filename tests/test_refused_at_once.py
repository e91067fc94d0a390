"""What is wrong is found before a model is loaded, for which a user would have waited, or hours of measuring are lost."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stepgraph.bench import _BENCHMARKS
from stepgraph.cli import main
from stepgraph.errors import ModelError

BENCHMARKS = {name: [] for name in _BENCHMARKS} | {"sizes": ["--graphs", "none.json"]}
"""With the flags that each needs."""
WITH_PLOT = ("graphs", "latency", "scheduler", "serve", "spec")


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Nothing may be loaded, here or in a process, nor looked for on the network."""

    def load(*_, **__):
        pytest.fail("a model is loaded")

    def is_not_there(model, **_):
        raise ModelError(f'Cannot find the model "{model}".')

    monkeypatch.setattr("stepgraph.executor.build.create_model", load)
    monkeypatch.setattr(subprocess, "Popen", load)
    monkeypatch.setattr("stepgraph.models.source.hub_folder", is_not_there)


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; gives what it says."""

    def refused(*argv: str) -> str:
        try:
            code = main(list(argv))
        except SystemExit as end:  # argparse's way
            code = end.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        return err

    return refused


class _Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stdin", [_Keyboard("typed"), io.StringIO(""), io.StringIO("\n")], ids=["tty", "empty", "line"]
)
def test_generate_without_a_prompt(refused, monkeypatch, stdin) -> None:
    stdin.seek(0)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert refused("generate") == "error: there is no prompt; give --prompt TEXT, or pipe one in\n"


def test_an_empty_text(refused) -> None:
    assert "--prompt is empty" in refused("generate", "--prompt", "")
    assert "--prompt is empty" in refused("generate", "--prompt", "x", "--prompt", "")
    assert "--message is empty" in refused("chat", "--message", " ")


@pytest.mark.parametrize("text", ["Hello", "Hello there", "Is it and/or?", "~ is home", "a long text " * 100])
def test_a_text_in_the_place_of_model(refused, monkeypatch, text) -> None:
    monkeypatch.setattr(sys, "stdin", _Keyboard())
    quoted = text if text == "Hello" else f"'{text}'"
    said = refused("generate", text)
    assert said.startswith("error: there is no prompt; give --prompt TEXT, or pipe one in. MODEL is ")
    assert said.endswith(f"write: stepgraph generate --prompt {quoted}\n")
    said = refused("chat", text)
    assert said.startswith("error: MODEL is " if " " in text else 'error: Cannot find the model "Hello". MODEL is ')
    assert said.endswith(f"write: stepgraph chat --message {quoted}\n")
    assert "write: stepgraph" not in refused("chat", "Qwen/Qwen3")
    assert "write: stepgraph" not in refused("generate", "--prompt", "x", "none.gguf")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", "-1"], "temperature=-1.0 must be"),
        (["--top-p", "2"], "top_p=2.0 must be"),
        (["--max-tokens", "0"], "max_tokens=0 must be"),
        (["--stop", ""], "stop=('',) must be"),
        (["--presence-penalty", "9"], "presence_penalty=9.0 must be"),
        (["--config", "none.yaml"], "none.yaml: the file cannot be read"),
        (["--load-format", "fast"], "load_format='fast' is not known; choose one of: auto, dummy"),
        (["--block-size", "12"], "block_size=12"),
        (["one", "--model", "another"], "MODEL is 'one' and --model is 'another'"),
        (["none.gguf"], "There is no file"),
        ([str(Path(__file__))], "is a file but not a .gguf file"),
        (["x" * 300], "Cannot find the model"),
        (["qwen3-8b", "--load-format", "dummy"], "names a shape without a tokenizer"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_flags_and_models_that_cannot_be(refused, command, flags, said) -> None:
    assert said in refused(*command, *flags)


@pytest.fixture
def no_chat_model(tiny_model, tmp_path) -> str:
    """The folder of a model that has no chat template."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
    return str(folder)


@pytest.mark.parametrize("command", ["chat", "demo"])
def test_a_model_that_cannot_chat(refused, no_chat_model, command) -> None:
    assert "has no chat template" in refused(command, no_chat_model)


def test_a_demo_that_does_not_fit(refused, smollm2, tiny_model) -> None:
    assert "names a shape without a tokenizer" in refused("demo", "qwen3-8b", "--load-format", "dummy")
    assert "max_model_len=64 is too small; the demo needs " in refused("demo", tiny_model, "--max-model-len", "64")


@pytest.mark.parametrize("name", ["graphs", "sampling", "tokens", "spec"])
def test_steps_of_several_devices_are_not_taken_apart(refused, tiny_model, name) -> None:
    said = refused("bench", name, tiny_model, "--device", "cpu", "--tensor-parallel-size", "2")
    assert "tensor_parallel_size=2: this benchmark takes the steps of one device apart; leave it at 1" in said


@pytest.mark.parametrize("command", ["list", "verify", "warm"])
def test_graphs_of_an_engine_without(refused, command) -> None:
    assert "captures no graphs" in refused("graphs", command, "--graph-backend", "eager")


def test_a_verification_whose_result_could_not_be_written(refused, tmp_path) -> None:
    assert f"--json: {tmp_path} cannot be written" in refused("graphs", "verify", "--json", str(tmp_path))


def test_a_verification_of_nothing(refused) -> None:
    assert "rounds=0" in refused("graphs", "verify", "--rounds", "0")
    assert "invalid choice: 'fancy'" in refused("graphs", "verify", "--variants", "fancy")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_results_that_could_not_be_written(refused, name, tmp_path) -> None:
    (tmp_path / "file").write_text("precious")
    for flag in ("--json", "--plot") if name in WITH_PLOT else ("--json",):
        for path, reason in ((tmp_path / "file" / "out", "Not a directory"), (tmp_path, "Is a directory")):
            assert refused("bench", name, *BENCHMARKS[name], flag, str(path)) == (
                f"error: {flag}: {path} cannot be written: {reason}; choose another file\n"
            )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_results_of_a_load_that_could_not_be_written(refused, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    said = refused("bench", "serve", "--save-result", "--result-dir", str(tmp_path / "file"))
    assert said.startswith("error: --save-result: ")
    assert "cannot be written: Not a directory" in said


def test_a_plot_that_nothing_could_draw(refused, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("stepgraph.bench.report.importlib.util.find_spec", lambda name: None)
    assert "--plot needs matplotlib" in refused("bench", "graphs", "--plot", str(tmp_path / "plot.png"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("graphs --repeats 0", "repeats=0"),
        ("graphs --kernels -1", "kernels=-1"),
        ("graphs --cases none-of-that-name", "is in no case's name"),
        ("latency --rounds 0", "rounds=0"),
        ("throughput --num-prompts 0", "num_prompts=0"),
        ("throughput smollm2 --input-len 9000", "do not fit into max_model_len=8192"),
        ("start --prompt-len 0", "prompt_len=0"),
        ("tokens --tokens 0", "tokens=0"),
        ("tokens --dtypes float32 float23", "dtype='float23'"),
        ("tokens --dtypes float32 float32+fp9", "quantization='fp9'"),
        ("sampling smollm2 --max-model-len 64", "max_model_len=64 is too small"),
        ("scheduler --requests 0", "requests=0"),
        ("sizes --graphs none.json", "is no JSON of bench graphs"),
        ("serve --num-prompts 0", "--num-prompts=0"),
        ("serve --base-url http://127.0.0.1:1", "does not say which model to use"),
        ("front --output-len 0", "output_len=0"),
        ("front --streams 4 --max-num-seqs 2", "4 streams do not run at once"),
        ("spec --temperature -1", "temperature=-1.0"),
        ("spec --methods guess", "guess unknown"),
        ("spec smollm2 --batch-sizes 8 --max-num-seqs 4", "8 requests do not run at once"),
        ("spec qwen3-0.6b --acceptance 2", "--acceptance 2.0 is a probability"),
        ("spec qwen3-0.6b --acceptance 0.5 --batch-sizes 8 --max-num-seqs 4", "8 requests do not run at once"),
        ("spec qwen3-0.6b --acceptance 0.5 --load-format auto", "weights are random"),
        ("busy --rounds 0", "rounds=0"),
        ("busy --block-size 12", "block_size=12"),
    ],
)
def test_numbers_and_settings_of_benchmarks_that_cannot_be(refused, smollm2, argv, said) -> None:
    assert said in refused("bench", *argv.split())


def test_a_server_that_cannot_be(refused, tmp_path) -> None:
    for flags, said in (
        (["--api-key-file", "none.txt"], "none.txt"),
        (["--chat-template", "none.jinja"], "none.jinja"),
        (["--port", "70000"], "port=70000"),
        (["--enable-lora", "--lora-modules", "poems=none"], "none, where the adapter 'poems' is to be"),
        (["--speculative-config", "{"], "speculative_config is not JSON"),
    ):
        assert said in refused("serve", *flags)


def test_a_model_that_cannot_be_pulled(refused) -> None:
    assert '"Qwen/Qwen3-0.6B" cannot be pulled' in refused("pull", "Qwen/Qwen3-0.6B")
