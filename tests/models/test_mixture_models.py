"""Models with experts through the engine, against transformers. `scripts/sweep_families.py` tries as many as one likes."""

import importlib.util
import json
import logging
import random
from pathlib import Path

import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES, random_hf_model
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from stepgraph import ops
from stepgraph.errors import ModelError
from stepgraph.layers.experts import Router
from stepgraph.models import load_model, resolve
from stepgraph.models.registry import read_config
from stepgraph.models.update import plan_update, write

SCRIPT = Path(__file__).parents[2] / "scripts" / "sweep_families.py"
FAMILIES = {"ernie4_5_moe": 7, "qwen2_moe": 4}
"""And which of their random configs."""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sweep_families", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec.loader.exec_module(module)
    return module


def test_answers_are_transformers_however_they_are_computed(script, tmp_path) -> None:
    assert script.check(script.FAMILIES["glm4_moe"](random.Random(2)), tmp_path) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_transformers_in_chunks_batched_and_with_prefixes_from_the_cache(script, family, tmp_path) -> None:
    hf_model = script.write_model(script.FAMILIES[family](random.Random(FAMILIES[family])), tmp_path)
    engine, requests = script.answer(tmp_path, script.PROMPTS)
    assert script.differences(hf_model, requests) + script.miscounted(engine) == []
    engine.shutdown()


@pytest.fixture(scope="module")
def glm(script, tmp_path_factory):
    """A folder, and what transformers loads from it."""
    folder = tmp_path_factory.mktemp("glm")
    return folder, script.write_model(script.FAMILIES["glm4_moe"](random.Random(2)), folder)


def test_a_router_without_its_bias_is_found_out(script, glm, tmp_path) -> None:
    folder, hf_model = glm
    tensors = load_file(folder / "model.safetensors")
    forgotten = {name: tensor * (not name.endswith("e_score_correction_bias")) for name, tensor in tensors.items()}
    save_file(forgotten, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    engine, requests = script.answer(tmp_path, script.PROMPTS)
    assert script.differences(hf_model, requests)
    assert not script.miscounted(engine)


def test_padding_that_reaches_experts_is_found_out(script, glm, monkeypatch) -> None:
    def careless(self, x_TE, counts_B):
        everything = torch.full_like(counts_B, len(x_TE))
        return ops.route(x_TE, self.weight, self.bias, everything, self.totals, self.routing)

    monkeypatch.setattr(Router, "forward", careless)
    engine, _ = script.answer(glm[0], script.PROMPTS)
    assert script.miscounted(engine)


@pytest.mark.parametrize(
    "name",
    [
        "mixtral with windows",
        "qwen2 moe",
        "ernie 4.5 moe",
        "glm 4.5",
        "granite moe",
        "deepseek v2",
        "deepseek v3",
    ],
)
@pytest.mark.parametrize("form", ["as published", "as in memory"])
def test_new_weights_come_in_the_names_of_checkpoints_or_of_transformers_models(name, form, tmp_path) -> None:
    new = random_hf_model(HF_CONFIGS[name]())
    new.save_pretrained(tmp_path)
    model = load_model(resolve(str(tmp_path)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.zero_()
    tensors = new.state_dict() if form == "as in memory" else load_file(tmp_path / "model.safetensors")
    assert any("experts.gate_up_proj" in name for name in tensors) == (form == "as in memory")
    write(plan_update(model, tensors.items()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "glm 4.5",
            {"num_experts_per_tok": 7},
            "experts per token is 7 in .* Glm4MoeForCausalLM, .* at least 1 and at most 6",
        ),
        ("glm 4.5", {"topk_group": 5}, "groups that a token's experts are of is 5 in .* at most 4"),
        ("glm 4.5", {"n_group": 5, "topk_group": 2}, "12 experts of this .* cannot be split into 5 groups"),
        (
            "glm 4.5",
            {"n_group": 12, "topk_group": 4},
            "cannot be split into 12 groups: groups must be equal, of at least 2",
        ),
        ("glm 4.5", {"n_routed_experts": 0}, "number of experts is 0 in"),
        (
            "mixtral with windows",
            {"num_experts_per_tok": 9},
            "experts per token is 9 .* at most 8. Correct config.json",
        ),
        ("mixtral with windows", {"num_experts_per_tok": 0}, "experts per token is 0 .* at least 1"),
        ("mixtral with windows", {"hidden_act": "relu"}, 'activation is "relu".*silu and gelu_pytorch_tanh'),
        ("qwen2 moe", {"moe_intermediate_size": 0}, "width of an expert is 0"),
        ("ernie 4.5 moe", {"use_bias": True}, "use_bias is true .* output head"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(name, changes, message) -> None:
    config = HF_CONFIGS[name]()
    config.architectures = [type(random_hf_model(config)).__name__]
    read_config(config)
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(ModelError, match=message):
        read_config(config)


def test_more_experts_than_any_model_has_are_refused_before_a_list_of_them_is_made(tmp_path) -> None:
    for config, field in (
        (MixtralConfig(**SIZES, num_local_experts=2**20), "num_local_experts"),
        (Qwen2MoeConfig(**SIZES, num_experts=2**20), "num_experts"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=f"{field} is 1048576, and must be between 0 and 16384"):
            resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_local_experts", "8", "num_local_experts is '8', and must be a whole number between 0 and 16384"),
        ("num_local_experts", 8.5, "num_local_experts is 8.5, and must be a whole number between 0 and 16384"),
        ("decoder_sparse_step", 0, "decoder_sparse_step is 0, and must be between 1 and 4096"),
    ],
)
def test_numbers_about_experts_that_transformers_does_not_check_are_refused_by_name(
    tmp_path, field, value, told
) -> None:
    Qwen3MoeConfig(**SIZES, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ModelError, match=told):
        resolve(str(tmp_path))


def test_groups_that_leave_no_choice_are_the_config_s_fault_and_not_the_native_model_s(tmp_path) -> None:
    for groups, told in ((0, "number of groups of experts is 0"), (3, "8 experts of this .* into 3 groups")):
        Glm4MoeConfig(
            **SIZES, architectures=["Glm4MoeForCausalLM"], n_routed_experts=8, n_group=groups, num_experts_per_tok=2
        ).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=told) as refused:
            resolve(str(tmp_path))
        assert "model_impl" not in str(refused.value)


def test_experts_that_transformers_cannot_join_are_named_in_a_sentence(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that `caplog` sees them
    random_hf_model(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"what becomes model\.layers\.0\.mlp\.experts\.gate_up_proj is missing in part"
    ):
        load_model(resolve(str(tmp_path)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)
    assert "LOAD REPORT" not in caplog.text
