"""Engines that compute the same have one digest of the model, and all others another one."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import HF_CONFIGS, random_hf_model
from gguf_files import write_gguf

from stepgraph.config import ModelConfig
from stepgraph.errors import ModelError
from stepgraph.models.identity import model_digest, unknown_model_digest
from stepgraph.models.source import resolve

MIB = 1 << 20


def save(folder: Path, content: bytes = bytes(range(256)) * 300, config: str = "llama", **changes) -> Path:
    """A checkpoint whose weights nobody loads."""
    folder.mkdir(exist_ok=True)
    made = HF_CONFIGS[config]()
    fields = made.to_dict() | {"architectures": [type(made).__name__.replace("Config", "ForCausalLM")]} | changes
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes(content)
    return folder


def digest(folder: Path | str, settings: ModelConfig = ModelConfig(), **changes) -> str:  # noqa: B008  # frozen
    source = resolve(str(folder), model_impl=settings.model_impl)
    return model_digest(
        source, settings, **({"dtype": "bfloat16", "device_type": "cpu", "max_model_len": 64} | changes)
    )


@pytest.fixture
def original(tmp_path) -> Path:
    return save(tmp_path / "original")


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_a_copy_elsewhere_is_the_same_model(original, tmp_path, impl) -> None:
    copy = save(tmp_path / "copy", _name_or_path="elsewhere", transformers_version="9.9.9")
    settings = ModelConfig(model_impl=impl)
    assert digest(copy, settings) == digest(original, settings)


def test_what_does_not_change_keys_and_values_does_not_change_it(original, tmp_path) -> None:
    other = save(tmp_path / "other", eos_token_id=[2, 3])
    settings = ModelConfig(deterministic=True, seed=7, model="another name")
    assert digest(other, settings, max_model_len=48, device_type="cuda") == digest(original)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9999.0}},
        {"rms_norm_eps": 1e-5},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 3},
        {"attention_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_another_config_is_another_model(original, tmp_path, changes, impl) -> None:
    settings = ModelConfig(model_impl=impl)
    assert digest(save(tmp_path / "other", **changes), settings) != digest(original, settings)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"dtype": "float32"}),
        ({"quantization": "fp8"}, {}),
        ({"load_format": "dummy"}, {}),
        ({"model_impl": "transformers"}, {}),
    ],
    ids=str,
)
def test_another_way_to_run_it_is_another_model(original, settings, changes) -> None:
    assert digest(original, ModelConfig(**settings), **changes) != digest(original)


def test_keys_that_are_rotated_otherwise_in_long_contexts_are_anothers(tmp_path) -> None:
    folder = save(tmp_path / "long", config="phi 4 with long rope")
    source = resolve(str(folder))
    (rope,) = set(source.config.ropes)
    assert rope.long_inv_freq
    within, above = rope.original_length, rope.original_length + 1
    assert digest(folder, max_model_len=within) == digest(folder, max_model_len=within - 1)
    assert digest(folder, max_model_len=within) != digest(folder, max_model_len=above)
    assert digest(folder, max_model_len=above) == digest(folder, max_model_len=above + 1)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 9000, 4 * MIB])
def test_any_byte_of_a_small_file_counts(original, tmp_path, size) -> None:
    content = bytearray(random.Random(size).randbytes(size))
    other = save(tmp_path / "other", bytes(content))
    before = digest(other)
    for place in {0, size - 1, size // 2, *(random.Random(0).randrange(size) for _ in range(2))}:
        content[place] ^= 1
        save(other, bytes(content))
        assert digest(other) != before, place
        content[place] ^= 1


def write_at(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.mark.parametrize("place", [0, 24 * MIB + 12345, 64 * MIB - 1])
def test_of_a_large_file_ends_and_any_larger_part_count(original, place) -> None:
    path = original / "model.safetensors"
    os.truncate(path, 64 * MIB)  # of which most takes no room
    before = digest(original)
    one = place in (0, 64 * MIB - 1)
    write_at(path, place, b"x" * (1 if one else 64 << 10))  # samples lie that far from each other
    assert digest(original) != before
    os.truncate(path, 64 * MIB - 1)
    assert digest(original) != before


def test_files_count_in_their_order(original, tmp_path) -> None:
    parts = [b"a" * 100, b"b" * 100]
    found = set()
    for number, order in enumerate((parts, parts[::-1])):
        folder = save(tmp_path / str(number))
        (folder / "model.safetensors").unlink()
        for name, part in zip("12", order, strict=True):
            (folder / f"{name}.safetensors").write_bytes(part)
        index = {"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        found.add(digest(folder))
    assert len(found) == 2


def test_random_weights_are_those_of_a_config_and_a_kind_of_device() -> None:
    dummy = ModelConfig(load_format="dummy")
    assert digest("qwen3-0.6b", dummy) == digest("qwen3-0.6b", replace(dummy, seed=3))
    assert digest("qwen3-0.6b", dummy) != digest("qwen3-8b", dummy)
    assert digest("qwen3-0.6b", dummy) != digest("qwen3-0.6b", dummy, device_type="cuda")


def test_weights_that_came_as_tensors_are_nobody_elses() -> None:
    assert unknown_model_digest() != unknown_model_digest()
    assert len(unknown_model_digest()) == 64


def test_files_that_are_gone_are_said_to_be(original) -> None:
    source = resolve(str(original))
    (original / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds neither model"):
        model_digest(source, ModelConfig(), dtype="float32", device_type="cpu", max_model_len=64)


def test_a_gguf_file_is_sampled(tmp_path) -> None:
    path, model = tmp_path / "model.gguf", random_hf_model(HF_CONFIGS["llama"]())
    write_gguf(path, model)
    before = digest(path)
    assert before == digest(path)
    write_at(path, path.stat().st_size - 1, b"!?"[path.read_bytes()[-1:] == b"!" :][:1])
    assert digest(path) != before
