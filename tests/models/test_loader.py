"""Filling a model: every parameter once, and clear words when the checkpoint does not fit."""

import json

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from safetensors.torch import load_file, save_file
from stepping import Stepper

from stepgraph.errors import ModelError
from stepgraph.models import load_model, resolve


def load(folder, dtype=torch.float32, **kwargs):
    return load_model(resolve(str(folder)), dtype=dtype, device=torch.device("cpu"), max_model_len=32, **kwargs)


@pytest.fixture
def folder(tmp_path):
    random_hf_model(HF_CONFIGS["llama"]()).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    random_hf_model(HF_CONFIGS["llama"]()).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit_tensors(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_sharded_checkpoint_loads_the_same_weights_as_a_single_file(folder, sharded) -> None:
    whole, parts = load(folder).state_dict(), load(sharded).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_weights_are_rounded_to_the_wanted_dtype(folder) -> None:
    single, half = load(folder), load(folder, dtype=torch.bfloat16)
    assert torch.equal(single.norm.weight.bfloat16(), half.norm.weight)
    assert half.get_buffer("cos_sin_0").dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in half.parameters())


def test_a_missing_shard_is_named(sharded) -> None:
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ModelError, match=missing.name):
        load(sharded)


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_a_truncated_file_is_named(folder, keep) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors .*truncated"):
        load(folder)


def test_a_folder_of_another_weight_format_is_refused_with_a_way_out(folder) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained"):
        load(folder)


def test_a_missing_tensor_is_named(folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ModelError, match=r"1 \(model\.layers\.1\.self_attn\.k_proj\.weight\) missing, none left over"):
        load(folder)


def test_a_left_over_tensor_is_named(folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    with pytest.raises(ModelError, match=r"none missing, 1 \(model\.layers\.0\.self_attn\.q_proj\.bias\) left over"):
        load(folder)


def test_a_wrong_shape_is_told_with_both_shapes(folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[63\].*\[64\]"):
        load(folder)


def test_tensors_that_follow_from_others_are_ignored(tmp_path) -> None:
    random_hf_model(HF_CONFIGS["llama tied"]()).save_pretrained(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(extra))
    assert "rotary_emb.inv_freq" not in load(tmp_path).state_dict()


def test_dummy_weights_need_no_files_and_are_the_same_every_time(folder) -> None:
    (folder / "model.safetensors").unlink()
    first, second = load(folder, load_format="dummy"), load(folder, load_format="dummy")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(first.norm.weight, torch.ones(64))
    assert 0.015 < first.embed_tokens.weight.std() < 0.025
    assert Stepper(first, 32).step([1, 2, 3]).isfinite().all()


def test_progress_goes_to_stderr_and_only_when_asked_for(folder, capsys) -> None:
    load(folder)
    assert capsys.readouterr() == ("", "")
    load(folder, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tensors" in err


def test_a_damaged_index_is_named(sharded) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": None}))
    with pytest.raises(ModelError, match=r"index\.json is not an index"):
        load(sharded)
