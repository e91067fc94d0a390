"""Checkpoints whose output head is not what their config says: logits are those of transformers, at load and at an update."""

import json
import logging

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from fp8_folders import write_fp8
from safetensors.torch import load_file, save_file
from stepping import Stepper
from transformers import AutoModelForCausalLM

from stepgraph import EngineConfig, SamplingParams
from stepgraph.engine.build import build_engine
from stepgraph.errors import ModelError
from stepgraph.models import load_model, resolve
from stepgraph.models.update import plan_update, write

TOKENS = [(7 * i + 3) % 96 for i in range(40)]
CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(folder, *, tied, config="llama", edit=lambda tensors: None):
    """A checkpoint with an embedding and a head of its own, after `edit`, whose config says `tied`."""
    random_hf_model(HF_CONFIGS[config]()).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault(HEAD, tensors[EMBEDDING].flip(0).contiguous())
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def copy_embedding(tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def change_one_value(tensors) -> None:
    copy_embedding(tensors)
    tensors[HEAD][-1, -1] += 1


def load(folder, **settings):
    settings = {"dtype": torch.float32} | settings
    return load_model(resolve(str(folder)), device=CPU, max_model_len=64, **settings)


def logits_of_transformers(folder):
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return hf_model(torch.tensor([TOKENS])).logits[0]


def assert_as_transformers(model, folder) -> None:
    torch.testing.assert_close(Stepper(model, 64).step(TOKENS), logits_of_transformers(folder), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("config", ["llama", "qwen3 tied", "gemma 3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_differs_is_used_whatever_the_config_says(tmp_path, caplog, tied, config) -> None:
    save(tmp_path, tied=tied, config=config)
    with caplog.at_level(logging.WARNING, logger="stepgraph"):
        model = load(tmp_path)
    assert_as_transformers(model, tmp_path)
    assert ("lm_head.weight that differs" in caplog.text) is tied


@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_one_value_is_enough_to_differ(tmp_path, quantization) -> None:
    save(tmp_path, tied=True, edit=change_one_value)
    model = load(tmp_path, quantization=quantization)
    assert_as_transformers(model, tmp_path)
    assert model.lm_head is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_equal_copy_stays_tied_in_silence(tmp_path, caplog, dtype) -> None:
    save(tmp_path, tied=True, edit=copy_embedding)
    with caplog.at_level(logging.WARNING, logger="stepgraph"):
        assert load(tmp_path, dtype=dtype).lm_head is None
    assert caplog.text == ""


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_either_stands_for_both_where_the_config_ties_them(tmp_path, name) -> None:
    save(tmp_path, tied=True, edit=lambda tensors: tensors.pop(name))
    model = load(tmp_path)
    assert model.lm_head is None
    assert_as_transformers(model, tmp_path)


def test_a_head_that_is_missing_is_told_with_the_setting_that_may_be_wrong(tmp_path) -> None:
    save(tmp_path, tied=False, edit=lambda tensors: tensors.pop(HEAD))
    with pytest.raises(ModelError, match=r"no lm_head\.weight.*tie_word_embeddings.*true in config\.json"):
        load(tmp_path)


def test_a_head_differs_in_a_checkpoint_of_8_bits_too(tmp_path) -> None:
    write_fp8(save(tmp_path / "plain", tied=True), tmp_path / "fp8", "a scale per output", ignored=("lm_head",))
    model = load(tmp_path / "fp8")
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "plain" / "model.safetensors")[HEAD])


def test_both_implementations_give_an_engine_the_same_log_probabilities(tmp_path) -> None:
    save(tmp_path, tied=True)
    answers = []
    for model_impl in ("native", "transformers"):
        settings = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "num_kv_blocks": 9, "max_num_seqs": 2}
        engine = build_engine(EngineConfig.from_settings(model=str(tmp_path), model_impl=model_impl, **settings))
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
        request = engine.add_request("a", TOKENS[:8], params)
        while engine.has_work:
            engine.step()
        answers.append([position.logprob for position in request.output_logprobs])
    torch.testing.assert_close(torch.tensor(answers[0]), torch.tensor(answers[1]), atol=2e-4, rtol=1e-4)


def test_an_update_brings_a_head_into_a_model_that_has_room_for_one(tmp_path) -> None:
    own = save(tmp_path / "own", tied=True)
    other = save(tmp_path / "other", tied=True, edit=lambda tensors: tensors.update({HEAD: tensors[HEAD] * 2}))
    tied = save(tmp_path / "tied", tied=True, edit=lambda tensors: tensors.pop(HEAD))
    copied = save(tmp_path / "copied", tied=False, edit=copy_embedding)
    model = load(own)
    for folder in (other, tied, copied, own):
        write(plan_update(model, resolve(str(folder))))
        assert_as_transformers(model, folder)


@pytest.mark.parametrize("given_as", ["checkpoint", "tensors"])
def test_an_update_with_a_head_is_refused_by_a_model_without_room_for_one(tmp_path, given_as) -> None:
    own, copied = save(tmp_path / "own", tied=True), save(tmp_path / "copied", tied=False, edit=copy_embedding)
    model = load(save(tmp_path / "tied", tied=True, edit=lambda tensors: tensors.pop(HEAD)))

    def update(folder):
        stored = load_file(folder / "model.safetensors")
        return plan_update(model, resolve(str(folder)) if given_as == "checkpoint" else stored.items())

    write(update(copied))
    with pytest.raises(ModelError, match=r"output head of its own.*Start another engine"):
        update(own)
    assert_as_transformers(model, copied)


def test_an_update_through_transformers_takes_a_tied_head_and_refuses_one_too_many(tmp_path) -> None:
    def through_transformers(folder):
        return resolve(str(folder), model_impl="transformers")

    def run(model):
        hidden = model.embed(torch.tensor(TOKENS))
        return model.logits(hidden, torch.empty(len(TOKENS), 96))

    own, tied = save(tmp_path / "own", tied=True), save(tmp_path / "tied", tied=True, edit=copy_embedding)
    loaded = {
        folder: load_model(through_transformers(folder), dtype=torch.float32, device=CPU, max_model_len=64)
        for folder in (own, tied)
    }
    expected = run(loaded[tied])
    write(plan_update(loaded[own], through_transformers(tied)))
    torch.testing.assert_close(run(loaded[own]), expected)
    with pytest.raises(ModelError, match=r"lm_head\.weight\) left over"):
        plan_update(loaded[tied], through_transformers(own))
