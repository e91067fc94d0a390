"""Weights of 4 bits: read from published layouts as they are, or made from others; and what cannot be read."""

import json
import logging

import gguf
import numpy as np
import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from four_bit_folders import LAYOUTS, awq, compressed_tensors, gptq, write_four_bits
from quantised import WIDE, layers_of, load, logits
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from stepgraph.errors import ConfigError, ModelError
from stepgraph.layers.formats import FormatOptions, FourBit
from stepgraph.layers.formats.gguf_blocks import weight_of
from stepgraph.models import resolve
from stepgraph.models.update import plan_update, write
from stepgraph.ops.four_bit_linear import dequantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unquantised")
    random_hf_model(LlamaConfig(**WIDE)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_in_4_bits_keeps_its_codes_and_scales(layout, folder, tmp_path) -> None:
    """The third checkpoint's values come from the formats' definitions, in float64."""
    plain = load(write_four_bits(folder, tmp_path / "packed", layout))
    model = load(tmp_path / "packed")
    expected = layers_of(plain)
    for name, layer in layers_of(model).items():
        assert isinstance(layer.format, FourBit), name
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        torch.testing.assert_close(layer.values(), expected[name].weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["awq, groups of 16", "modelopt nvfp4"])
@pytest.mark.parametrize("name", ["qwen2 moe", "phi 4 with long rope", "glm 4.5"])
def test_models_with_experts_and_merged_projections_run_in_4_bits(name, layout, tmp_path) -> None:
    random_hf_model(HF_CONFIGS[name]()).save_pretrained(tmp_path / "source")
    plain = load(write_four_bits(tmp_path / "source", tmp_path / "packed", layout))
    model = load(tmp_path / "packed")
    assert all(isinstance(layer.format, FourBit) for layer in layers_of(model).values())
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_experts_are_rounded_to_4_bits_too(tmp_path) -> None:
    random_hf_model(HF_CONFIGS["qwen2 moe"]()).save_pretrained(tmp_path)
    model, exact = load(tmp_path, quantization="int4"), layers_of(load(tmp_path))
    for name, layer in layers_of(model).items():
        assert isinstance(layer.format, FourBit)
        assert (layer.values() - exact[name].weight).abs().mean() < 0.15 * exact[name].weight.abs().mean()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("layout", ["awq", "gptq with zeros", "compressed-tensors with zeros", "modelopt nvfp4"])
def test_without_quantization_a_checkpoint_in_4_bits_is_dequantised(layout, folder, tmp_path) -> None:
    plain = load(write_four_bits(folder, tmp_path / "packed", layout)).state_dict()
    model = load(tmp_path / "packed", quantization="none").state_dict()
    assert model.keys() == plain.keys()
    for name, values in plain.items():
        torch.testing.assert_close(model[name], values, rtol=1e-6, atol=1e-9)


def test_layers_that_a_checkpoint_left_out_stay_as_they_are(folder, tmp_path) -> None:
    ignored = ("layers.0.mlp", "1.self_attn.k_")
    plain = load(write_four_bits(folder, tmp_path / "packed", "awq", ignored=ignored))
    model = load(tmp_path / "packed")
    stay = {name for name, layer in layers_of(model).items() if not isinstance(layer.format, FourBit)}
    assert stay == {"0.mlp.gate_up_proj", "0.mlp.down_proj", "1.self_attn.qkv_proj"}
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def swap_nibbles(words):
    bytes_ = words.contiguous().view(torch.uint8)
    return (bytes_ >> 4 | bytes_ << 4).view(words.dtype)


MUTANTS = {
    "swapped nibbles": lambda t: t | {"qweight": swap_nibbles(t["qweight"])},
    "another order of outputs": lambda t: t | {"qweight": t["qweight"].roll(1, 1)},
    "a group further": lambda t: t | {"scales": t["scales"].roll(1, 0)},
    "one scale": lambda t: t | {"scales": t["scales"].index_fill(1, torch.tensor([3]), 0.01)},
    "a zero further": lambda t: t | {"qzeros": t["qzeros"].roll(1, 0)},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_compared_would_show_a_wrong_layout(mutant, folder, tmp_path) -> None:
    plain = load(write_four_bits(folder, tmp_path / "packed", "awq"))
    path, file = "model.layers.1.mlp.down_proj.", tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    own = {name.removeprefix(path): tensor for name, tensor in tensors.items() if name.startswith(path)}
    save_file(tensors | {f"{path}{kind}": tensor.contiguous() for kind, tensor in MUTANTS[mutant](own).items()}, file)
    found, expected = layers_of(load(tmp_path / "packed")), layers_of(plain)
    wrong = {n for n in found if not torch.allclose(found[n].values(), expected[n].weight, rtol=1e-6, atol=1e-9)}
    assert wrong == {"1.mlp.down_proj"}
    assert (logits(load(tmp_path / "packed")) - logits(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_to_4_bits_as_they_are_read(dtype, folder, caplog) -> None:
    plain = load(folder, dtype)
    with caplog.at_level(logging.WARNING):
        model = load(folder, dtype, quantization="int4")
    assert "rounded to 4 bits" in caplog.text
    expected = layers_of(load(folder))
    for name, layer in layers_of(model).items():
        exact = expected[name].weight
        assert isinstance(layer.format, FourBit)
        assert (layer.values() - exact).abs().mean() < 0.15 * exact.abs().mean()
    kept = {"embed_tokens.weight", "lm_head.weight", "norm.weight"}
    assert all(torch.equal(model.state_dict()[name], plain.state_dict()[name]) for name in kept)
    assert (logits(model) - logits(plain)).abs().mean() > 0


def test_memory_holds_no_weight_of_a_layer_twice(folder) -> None:
    model = load(folder, quantization="int4")
    assert {p.dtype for p in model.layers.parameters() if p.dim() == 2 and p.shape[1] > 3} == {torch.uint8}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_random_weights_come_in_4_bits_too(folder) -> None:
    model = load(folder, load_format="dummy", quantization="int4")
    for layer in layers_of(model).values():
        assert 0.017 < layer.values().std() < 0.023
    assert logits(model).isfinite().all()


def test_new_weights_are_rounded_and_those_in_4_bits_are_not(folder, tmp_path) -> None:
    plain = load(write_four_bits(folder, tmp_path / "packed", "compressed-tensors"))
    model = load(tmp_path / "packed")
    before = logits(model)
    with torch.no_grad():
        write(plan_update(model, load_file(folder / "model.safetensors").items()))
    assert not torch.equal(logits(model), before)
    exact = layers_of(load(folder))
    for name, layer in layers_of(model).items():
        assert (layer.values() - exact[name].weight).abs().mean() < 0.15 * exact[name].weight.abs().mean()
    write(plan_update(model, resolve(str(tmp_path / "packed"))))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_numbers_are_refused_where_codes_have_zeros(folder, tmp_path) -> None:
    write_four_bits(folder, tmp_path / "packed", "awq")
    model = load(tmp_path / "packed")
    with pytest.raises(ModelError, match=r"INT4 in groups of 64, scales float16, zeros uint8.*plain numbers.*none"):
        plan_update(model, load_file(folder / "model.safetensors").items())
    assert torch.equal(logits(model), logits(load(tmp_path / "packed")))


@pytest.mark.parametrize("blocks", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_gguf_files_lose_nothing(blocks) -> None:
    kind = gguf.GGMLQuantizationType[blocks]
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (5, 2, size), dtype=np.uint8)
    stored[:, :, :4] = np.random.default_rng(1).uniform(0.1, 2, (5, 2, 2)).astype(np.float16).view(np.uint8)
    stored = stored.reshape(5, -1)
    expected = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    found = dequantize(weight_of(blocks, torch.from_numpy(stored)), 2 * inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    options = FormatOptions(True, False, packed=False, repacked=True, exact_tokens=None)
    format = FourBit.keeping(blocks, 2 * inputs, options)
    assert isinstance(format, FourBit)
    assert format.input_unit == inputs
    specs = format.parameters(5, 2 * inputs, torch.bfloat16)
    weights = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    target = format.targets(weights, 2 * inputs)["weight"]
    assert target.quantization == blocks
    target.copy_(torch.from_numpy(stored))
    torch.testing.assert_close(format.values(weights, 2 * inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (gptq(128, bits=8), 'method "gptq" of 8 bits, and 4 bits are read'),
        (gptq(128, desc_act=True), "order of activations .desc_act.*desc_act false or with static groups"),
        (awq(128) | {"version": "gemv"}, "in the layout gemv, and gemm is read"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:llm"}, "packed as auto_round:llm"),
        (compressed_tensors("pack-quantized", actorder="group"), "order of activations"),
        (compressed_tensors("marlin-24", group_size=128), "stored as marlin-24"),
        (compressed_tensors("pack-quantized") | {"transform_config": {"config_groups": {"R1": {}}}}, "rotations"),
    ],
)
def test_other_layouts_are_refused_with_what_is_read(quantization, message, folder, tmp_path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path))


def in_order_of_activations(tensors, path):
    tensors[f"{path}.g_idx"] = tensors[f"{path}.g_idx"].roll(1)


def with_other_zeros(tensors, path):
    tensors[f"{path}.qzeros"] += 1


def without_scales(tensors, path):
    del tensors[f"{path}.scales"]


def in_groups_of_five(tensors, path):
    tensors[f"{path}.scales"] = tensors[f"{path}.scales"][:5].contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_order_of_activations, "order of activations, and groups of neighbours are read"),
        (with_other_zeros, "holds zeros other than 8"),
        (without_scales, "lacks its scales"),
        (in_groups_of_five, "5 groups of its 192 inputs"),
    ],
)
def test_what_does_not_fit_is_refused(damage, message, folder, tmp_path) -> None:
    write_four_bits(folder, tmp_path / "packed", "gptq")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    damage(
        tensors, "model.layers.0.self_attn.o_proj" if damage is not in_groups_of_five else "model.layers.0.mlp.up_proj"
    )
    save_file(tensors, file)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "packed")


def test_a_device_without_8_bits_refuses_their_scales(folder, tmp_path) -> None:
    write_four_bits(folder, tmp_path / "packed", "modelopt nvfp4")
    with pytest.raises(ConfigError, match="scales of 8 bits"):
        load(tmp_path / "packed", supports_fp8=False)
