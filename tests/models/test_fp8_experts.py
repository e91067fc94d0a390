"""Experts in 8 bits: read from checkpoints in the layouts in which they are published, or rounded as they are read."""

import json

import pytest
import torch
from checkpoints import EXPERTS, SIZES, random_hf_model
from fp8_folders import encode, write_fp8
from safetensors.torch import load_file, save_file
from stepping import Stepper
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from stepgraph.errors import ModelError
from stepgraph.layers.experts import ExpertLinear
from stepgraph.layers.formats import FP8, Plain
from stepgraph.models import load_model, resolve
from stepgraph.models.update import plan_update, write
from stepgraph.ops.fp8_linear import dequantize

TOKENS = [(7 * i) % 96 for i in range(20)]
WIDE = SIZES | EXPERTS | {"hidden_size": 192, "moe_intermediate_size": 160, "num_experts": 5}
"""Several groups of inputs, the last ones incomplete, and gates that end inside a block of outputs."""
LAYOUTS = (
    "a scale per matrix",
    "a scale per output",
    "a scale per block",
    "fp8 with a scale per block",
    "modelopt with a scale per matrix",
    "modelopt with a scale per block",
)


def load(folder, dtype=torch.float32, **settings):
    return load_model(resolve(str(folder)), dtype=dtype, device=torch.device("cpu"), max_model_len=32, **settings)


def logits(model):
    return Stepper(model, 32).step(TOKENS)


def experts_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, ExpertLinear)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unquantised")
    random_hf_model(Qwen3MoeConfig(**WIDE, head_dim=32, norm_topk_prob=True)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_keep_codes_and_scales(layout, folder, tmp_path) -> None:
    plain, model = load(write_fp8(folder, tmp_path / "fp8", layout)), load(tmp_path / "fp8")
    expected, grouped = experts_of(plain), "block" in layout
    for path, layer in experts_of(model).items():
        assert layer.format == FP8(grouped=grouped)
        assert layer.scale.shape == (layer.out_features, 2 if grouped else 1)
        assert torch.equal(dequantize(layer.weight, layer.scale), expected[path].weight)
    assert model.layers[0].mlp.gate.weight.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


def test_a_router_in_8_bits_becomes_numbers(folder, tmp_path) -> None:
    write_fp8(folder, tmp_path / "fp8", "fp8 with a scale per block")
    tensors = load_file(tmp_path / "fp8/model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    tensors[name], tensors[f"{name}_scale_inv"], values = encode(tensors[name].float(), "block")
    save_file(tensors, tmp_path / "fp8/model.safetensors", metadata={"format": "pt"})
    router = load(tmp_path / "fp8").layers[1].mlp.gate
    assert torch.equal(router.weight, values)


@pytest.mark.parametrize("ignored", ["experts.3.up_proj", "layers.1.mlp.experts.0."])
def test_experts_of_which_some_are_not_in_8_bits_are_kept_as_numbers(ignored, folder, tmp_path) -> None:
    plain = load(write_fp8(folder, tmp_path / "fp8", "a scale per output", ignored=[ignored]))
    model = load(tmp_path / "fp8")
    formats = {path: layer.format for path, layer in experts_of(model).items()}
    mixed = {path for path, form in formats.items() if form == Plain()}
    layers = ("layers.0", "layers.1") if "up_proj" in ignored else ("layers.1",)
    names = ("gate_up_proj",) if "up_proj" in ignored else ("gate_up_proj", "down_proj")
    assert mixed == {f"{layer}.mlp.experts.{name}" for layer in layers for name in names}
    assert {formats[path] for path in formats.keys() - mixed} == {FP8()}
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_rounded_as_they_are_read(dtype, folder) -> None:
    plain, model = load(folder, dtype), load(folder, dtype, quantization="fp8")
    for path, layer in experts_of(model).items():
        assert layer.format == FP8()
        exact = experts_of(load(folder))[path].weight
        error = (dequantize(layer.weight, layer.scale) - exact).abs()
        assert (error <= exact.abs().amax(1, keepdim=True) / 28).all(), "half a step of the largest code"
    state, rounded = plain.state_dict(), model.state_dict()
    routers = [name for name in state if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all(torch.equal(rounded[name], state[name]) for name in routers)
    assert logits(model).isfinite().all()


def test_shared_experts_are_in_8_bits_and_the_vector_of_their_gate_need_not_be(tmp_path) -> None:
    config = Qwen2MoeConfig(**WIDE, shared_expert_intermediate_size=160)
    random_hf_model(config).save_pretrained(tmp_path / "plain")
    plain, model = load(write_fp8(tmp_path / "plain", tmp_path / "fp8", "a scale per block")), load(tmp_path / "fp8")
    mixture = model.layers[0].mlp
    assert isinstance(mixture.shared_experts.down_proj.format, FP8)
    assert isinstance(mixture.shared_expert_gate.format, Plain)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


def test_new_weights_are_rounded_and_those_in_8_bits_are_not(folder, tmp_path) -> None:
    values = load(write_fp8(folder, tmp_path / "fp8", "a scale per output"))
    model, rounded = load(tmp_path / "fp8"), load(folder, quantization="fp8")
    with torch.no_grad():
        write(plan_update(model, load_file(folder / "model.safetensors").items()))
    assert torch.equal(logits(model), logits(rounded))
    write(plan_update(model, resolve(str(tmp_path / "fp8"))))
    torch.testing.assert_close(logits(model), logits(values), atol=1e-4, rtol=1e-4)


def test_deterministic_experts_in_8_bits_give_a_prompt_its_bits_however_it_is_cut(folder) -> None:
    model = load(folder, quantization="fp8", deterministic=True)
    whole, cut = logits(model), Stepper(model, 32)
    assert torch.equal(torch.cat([cut.step(TOKENS[:3]), cut.step(TOKENS[3:])]), whole)


def test_other_quantised_experts_are_refused_with_what_is_read_instead(folder, tmp_path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"Qwen3MoeForCausalLM cannot be read.*gptq.*qwen3moe"):
        resolve(str(tmp_path))
