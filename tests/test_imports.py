"""What a start imports, as sets of modules: no heavy library before it is needed. Each case is a process of its own."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "triton",
    "xgrammar",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "scipy",
    "pandas",
    "gguf",
    "numpy",
    "tokenizers",
)


def imported_by(code: str) -> set[str]:
    """Heavy libraries that a fresh interpreter holds after running `code`."""
    report = f"\nimport sys\nprint(*sorted({set(HEAVY)!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import stepgraph", "import stepgraph.cli", "import stepgraph.server.serve"])
def test_help_and_usage_errors_wait_for_no_library(code) -> None:
    assert imported_by(code) == set()


def test_the_front_answers_before_it_knows_torch() -> None:
    assert imported_by("import stepgraph.server.front") == {"numpy"}


@pytest.mark.parametrize("code", ["import stepgraph.api", "import stepgraph.server.engine_process"])
def test_an_engine_imports_torch_and_what_torch_needs(code) -> None:
    assert imported_by(code) - {"tokenizers"} == imported_by("import torch")


def test_a_first_token_needs_no_compiler_of_torch() -> None:
    start = """
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.models import source
from stepgraph.engine.sampling_params import SamplingParams

shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
read = source.hf_config_from_json

def small(*args, **settings):
    config = read(*args, **settings)
    vars(config).update(shape)
    return config

source.hf_config_from_json = small
settings = dict(load_format="dummy", device="cpu", num_kv_blocks=9, max_model_len=128)
engine = build_engine(EngineConfig.from_settings(model="qwen3-0.6b", **settings))
engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=2))
while engine.has_work:
    engine.step()
"""
    assert imported_by(start).isdisjoint(
        {"transformers", "triton", "xgrammar", "torch._dynamo", "torch._inductor", "sympy"}
    )


def test_the_config_of_a_common_model_is_read_without_transformers() -> None:
    assert "transformers" not in imported_by("from stepgraph.models import resolve\nresolve('qwen3-8b')")
