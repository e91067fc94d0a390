"""Weights of 8 bits: read from FP8 checkpoints as they are, or made from others; and what cannot be read."""

import json

import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES, random_hf_model
from fp8_folders import LAYOUTS, compressed_tensors, write_fp8
from quantised import WIDE, layers_of, load, logits
from safetensors.torch import load_file, save_file
from transformers import Lfm2Config, LlamaConfig

from stepgraph.errors import ConfigError, ModelError
from stepgraph.layers.formats import FP8
from stepgraph.models import load_model, resolve
from stepgraph.models.fp8_checkpoint import READABLE
from stepgraph.models.update import plan_update, write
from stepgraph.ops.fp8_linear import dequantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unquantised")
    random_hf_model(LlamaConfig(**WIDE)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_in_8_bits_keeps_its_codes_and_scales(layout, folder, tmp_path) -> None:
    plain = load(write_fp8(folder, tmp_path / "fp8", layout))
    model = load(tmp_path / "fp8")
    expected = layers_of(plain)
    for name, layer in layers_of(model).items():
        assert isinstance(layer.format, FP8)
        assert layer.scale.shape[1] == (-(-layer.weight.shape[1] // 128) if "block" in layout else 1)
        assert torch.equal(dequantize(layer.weight, layer.scale), expected[name].weight)
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize("layout", ["a scale per output", "fp8 with a scale per block"])
@pytest.mark.parametrize(
    "name",
    [
        *("ernie 4.5", "phi 4 with long rope", "qwen3", "llama with every bias"),
        *("mixtral with windows", "qwen2 moe", "glm 4.5", "gemma 4 e4b"),
    ],
)
def test_every_kind_of_model_runs_in_8_bits(name, layout, tmp_path) -> None:
    """Those whose heads are reordered and those whose projections are merged among them, and experts by each name."""
    random_hf_model(HF_CONFIGS[name]()).save_pretrained(tmp_path / "source")
    plain = load(write_fp8(tmp_path / "source", tmp_path / "fp8", layout))
    model = load(tmp_path / "fp8")
    assert all(isinstance(layer.format, FP8) for layer in layers_of(model).values())
    torch.testing.assert_close(logits(model), logits(plain))


def test_layers_that_a_checkpoint_left_out_stay_as_they_are(folder, tmp_path) -> None:
    plain = load(write_fp8(folder, tmp_path / "fp8", "a scale per output", ignored=("layers.0.mlp", "1.self_attn.k_")))
    model = load(tmp_path / "fp8")
    stay = {name for name, layer in layers_of(model).items() if not isinstance(layer.format, FP8)}
    assert stay == {"0.mlp.gate_up_proj", "0.mlp.down_proj", "1.self_attn.qkv_proj"}
    torch.testing.assert_close(logits(model), logits(plain))


def test_without_quantization_a_checkpoint_in_8_bits_is_dequantised(folder, tmp_path) -> None:
    plain = load(write_fp8(folder, tmp_path / "fp8", "fp8 with a scale per block")).state_dict()
    for setting in ("none", None):
        model = load(tmp_path / "fp8", quantization=setting).state_dict()
        assert model.keys() == plain.keys()
        assert all(torch.equal(model[name], plain[name]) for name in model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_to_8_bits_as_they_are_read(dtype, folder) -> None:
    plain, model = load(folder, dtype), load(folder, dtype, quantization="fp8")
    expected = layers_of(load(folder))
    for name, layer in layers_of(model).items():
        exact = expected[name].weight
        error = (dequantize(layer.weight, layer.scale) - exact).abs()
        assert (error <= exact.abs().amax(1, keepdim=True) / 28).all(), "half a step of the largest code"
        assert error.mean() < 0.03 * exact.abs().mean()
    kept = {"embed_tokens.weight", "lm_head.weight", "norm.weight"}
    assert all(torch.equal(model.state_dict()[name], plain.state_dict()[name]) for name in kept)
    difference = (logits(model) - logits(plain)).float().log_softmax(-1).abs().mean()
    assert difference > 0


def test_memory_holds_no_weight_of_a_layer_in_more_than_8_bits(folder) -> None:
    model = load(folder, quantization="fp8")
    assert {p.dtype for p in model.layers.parameters() if p.dim() == 2 and p.shape[1] > 1} == {torch.float8_e4m3fn}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_random_weights_come_in_8_bits_too(folder) -> None:
    model = load(folder, load_format="dummy", quantization="fp8")
    for layer in layers_of(model).values():
        assert 0.018 < dequantize(layer.weight, layer.scale).std() < 0.022
    assert logits(model).isfinite().all()


def test_new_weights_are_rounded_and_those_in_8_bits_are_not(folder, tmp_path) -> None:
    values = load(write_fp8(folder, tmp_path / "fp8", "a scale per output"))
    model, rounded = load(tmp_path / "fp8"), load(folder, quantization="fp8")
    with torch.no_grad():
        write(plan_update(model, load_file(folder / "model.safetensors").items()))
    assert torch.equal(logits(model), logits(rounded))
    write(plan_update(model, resolve(str(tmp_path / "fp8"))))
    torch.testing.assert_close(logits(model), logits(values))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq", "bits": 4}, 'method "hqq" of 4 bits, for which there are no kernels here'),
        ({"quant_method": "quark", "w_bit": 4}, 'method "quark" of 4 bits'),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 'method "bitsandbytes" of 4 bits'),
        (compressed_tensors("group", num_bits=4, type="int"), r'"compressed-tensors" \(type int, 4 bits'),
        (compressed_tensors("block", block_structure=[64, 64]), r"scale per block of \[64, 64\], and blocks of 128"),
        ({"quant_method": "fp8", "weight_block_size": [1, 128]}, r"scale per block of \[1, 128\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "in the format e5m2, and e4m3 is read"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "in the format W4A8_AWQ, and FP8, FP8_PER_CHANNEL"),
    ],
)
def test_other_quantised_checkpoints_are_refused_with_what_is_read_instead(
    quantization, message, folder, tmp_path
) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"LlamaForCausalLM cannot be read.*{message}") as info:
        resolve(str(tmp_path))
    assert str(info.value).endswith(READABLE)  # and not with model_impl transformers, which refuses them all
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot run.*unquantised checkpoints are read"):
        resolve(str(tmp_path), model_impl="transformers")


def test_of_a_model_that_does_not_run_no_other_checkpoint_is_recommended(tmp_path) -> None:
    config = Lfm2Config(**SIZES, layer_types=["conv"] * 2).to_dict()
    config |= {"architectures": ["Lfm2ForCausalLM"], "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="all its layers are of type conv"):
        resolve(str(tmp_path))


def test_what_modelopt_writes_beside_the_config_counts_as_if_it_were_in_it(folder, tmp_path) -> None:
    plain = load(write_fp8(folder, tmp_path / "fp8", "modelopt with a scale per matrix"))
    (tmp_path / "fp8" / "config.json").write_bytes((folder / "config.json").read_bytes())
    beside = tmp_path / "fp8" / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}))
    torch.testing.assert_close(logits(load(tmp_path / "fp8")), logits(plain))
    beside.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(ModelError, match="in the format W4A8_AWQ"):
        resolve(str(tmp_path / "fp8"))


def test_scales_that_do_not_fit_their_weight_are_named(folder, tmp_path) -> None:
    write_fp8(folder, tmp_path / "fp8", "a scale per output")
    file = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(7, 1)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"up_proj.weight_scale has shape \[7, 1\], and .* is \[320, 192\]"):
        load(tmp_path / "fp8")


def test_a_device_without_8_bits_says_what_to_use(folder) -> None:
    with pytest.raises(ConfigError, match=r"compute capability 8.9 or later; use quantization='none'"):
        load(folder, quantization="fp8", supports_fp8=False)
    load(folder, supports_fp8=False)


def test_models_that_transformers_runs_are_not_quantised(folder) -> None:
    source = resolve(str(folder), model_impl="transformers")
    with pytest.raises(ConfigError, match="quantization='fp8' needs a native model, and LlamaForCausalLM"):
        load_model(source, dtype=torch.float32, device=torch.device("cpu"), max_model_len=32, quantization="fp8")
