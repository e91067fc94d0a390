"""Damaged checkpoints: each loads or is refused in a sentence. `scripts/damage_checkpoints.py` tries as many as one likes."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stepgraph.errors import ModelError
from stepgraph.models import load_model, loader, resolve

pytest.importorskip("gguf", reason="some of the damaged files are GGUF files")
SCRIPT = Path(__file__).parents[2] / "scripts" / "damage_checkpoints.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("damage_checkpoints", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_intact_checkpoints_load(script, tmp_path) -> None:
    script.write_folder(tmp_path / "intact")
    script.write_gguf(tmp_path / "intact.gguf")
    for name in ("intact", "intact.gguf"):
        script.read_all(resolve(str(tmp_path / name)))


def test_a_damaged_file_is_refused_in_a_sentence_or_loads(script, tmp_path) -> None:
    found = []
    for _, (name, path) in zip(range(48), script.damaged(tmp_path, random.Random(5)), strict=False):
        outcome = script.try_one(path)
        assert outcome.kind != "failed", (name, outcome.about)
        found.append((name, outcome.kind))
    assert {name for name, _ in found} > {"model.gguf", "model.safetensors", "config.json", "tokenizer.json"}
    assert sum(kind == "refused" for _, kind in found) > 20


@pytest.fixture
def intact(script, tmp_path):
    script.write_folder(tmp_path / "intact")
    return tmp_path / "intact"


@pytest.mark.parametrize("model_impl", ["native", "transformers"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 2**24),
        ("vocab_size", 2**24),
        ("intermediate_size", 2**23),
        ("num_hidden_layers", 10**12),
        ("num_attention_heads", -1),
        ("max_position_embeddings", 10**12),
    ],
)
def test_a_size_that_is_not_that_of_the_weights_is_refused_before_memory_is_taken(
    intact, monkeypatch, model_impl, name, value
) -> None:
    fields = json.loads((intact / "config.json").read_text()) | {name: value}
    (intact / "config.json").write_text(json.dumps(fields))

    def take_memory(*_, **__):
        raise AssertionError("weights get memory")

    monkeypatch.setattr(loader, "materialise", take_memory)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", take_memory)

    def load() -> None:
        source = resolve(str(intact), model_impl=model_impl)
        load_model(source, dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)

    with pytest.raises(ModelError):
        load()


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"weight_map": {"a": {}}}', b'{"weight_map": {"a": "../b"}}', b"\xff"]
)
def test_a_damaged_index_is_refused(intact, content) -> None:
    (intact / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match="index"):
        list(resolve(str(intact)).tensors())


def test_weights_that_are_whole_numbers_are_refused(script, intact) -> None:
    path = intact / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ModelError, match=r"as torch\.int32, which is no weight"):
        script.read_all(resolve(str(intact)))


def test_texts_of_a_gguf_file_that_are_no_utf_8_are_named(script, tmp_path) -> None:
    script.write_gguf(tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    for text, key in ((b"{{ messages }}", "chat_template"), (b"gpt-2", "pre")):
        (tmp_path / "model.gguf").write_bytes(content.replace(text, b"\xff" * len(text)))
        with pytest.raises(ModelError, match=rf"tokenizer\.(ggml\.)?{key} is not UTF-8"):
            resolve(str(tmp_path / "model.gguf")).tokenizer()
