"""Models with latent attention in the formats that their checkpoints come in: 8 bits, and rounded to them as they are read."""

import pytest
import torch
from checkpoints import EXPERTS, SIZES, random_hf_model
from fp8_folders import write_fp8
from safetensors.torch import load_file
from stepping import Stepper
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

from stepgraph.layers.formats import FP8, Plain
from stepgraph.layers.linear import Linear
from stepgraph.models import load_model, resolve
from stepgraph.models.update import plan_update, write
from stepgraph.parallel.shard import Shard

TOKENS = [(7 * i) % 96 for i in range(20)]
WIDE = (
    SIZES
    | EXPERTS
    | {"hidden_size": 192, "intermediate_size": 256, "moe_intermediate_size": 256, "num_key_value_heads": 4}
)
LATENT = {"kv_lora_rank": 144, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 64}
"""Several groups of inputs, the last ones incomplete where ranks do not share them; heads, and the entry, end inside blocks of
outputs."""
EXPERTS_OF_V3 = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
CONFIGS = {
    "DeepSeek-V2-Lite": lambda: DeepseekV2Config(
        **WIDE | LATENT | EXPERTS_OF_V3, q_lora_rank=None, first_k_dense_replace=1
    ),
    "DeepSeek-V3": lambda: DeepseekV3Config(**WIDE | LATENT | EXPERTS_OF_V3, q_lora_rank=136, first_k_dense_replace=1),
    "GLM-4.7-Flash": lambda: Glm4MoeLiteConfig(
        **WIDE | LATENT | EXPERTS_OF_V3, q_lora_rank=136, mlp_layer_types=["dense", "sparse"]
    ),
}
PER_BLOCK = "fp8 with a scale per block"


def load(folder, dtype=torch.float32, **settings):
    return load_model(resolve(str(folder)), dtype=dtype, device=torch.device("cpu"), max_model_len=32, **settings)


def logits(model):
    return Stepper(model, 32).step(TOKENS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The unquantised checkpoint of each kind, by name, written once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("plain")
            random_hf_model(CONFIGS[name]()).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("layout", [PER_BLOCK, "a scale per output", "modelopt with a scale per matrix"])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_in_8_bits_keep_them_but_in_the_matrix_that_attention_reads(
    name, layout, folders, tmp_path
) -> None:
    plain = load(write_fp8(folders(name), tmp_path / "fp8", layout))
    model = load(tmp_path / "fp8")
    expected = dict(plain.named_modules())
    for path, layer in model.layers.named_modules():
        if isinstance(layer, Linear):
            if path.endswith("self_attn.kv_proj"):
                assert layer.format == Plain()
            else:
                assert layer.format == FP8(grouped=layout == PER_BLOCK), path
            assert torch.equal(layer.values(), expected[f"layers.{path}"].weight), path
    hf_model = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/fp8-dequantised", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), hf_model(torch.tensor([TOKENS])).logits[0], atol=5e-4, rtol=5e-4)
    for rank in range(2):
        part = load(tmp_path / "fp8", shard=Shard(rank, 2)).layers[1].self_attn
        whole = model.layers[1].self_attn
        assert torch.equal(part.kv_proj.weight, whole.kv_proj.weight.chunk(2)[rank])
        assert part.spec.num_heads == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_8_bits_leaves_the_matrix_that_attention_reads(dtype, folders) -> None:
    plain = load(folders("DeepSeek-V3"), dtype)
    for settings in ({}, {"shard": Shard(1, 2)}, {"load_format": "dummy"}):
        model = load(folders("DeepSeek-V3"), dtype, quantization="fp8", **settings)
        layers = {path: layer for path, layer in model.layers.named_modules() if isinstance(layer, Linear)}
        kept = {path for path, layer in layers.items() if layer.format == Plain()}
        assert kept == {"0.self_attn.kv_proj", "1.self_attn.kv_proj"}
        assert all(layers[path].weight.dtype == dtype for path in kept)
    assert torch.equal(
        load(folders("DeepSeek-V3"), dtype, quantization="fp8").layers[1].self_attn.kv_proj.weight,
        plain.layers[1].self_attn.kv_proj.weight,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_new_weights_are_rounded_and_those_in_8_bits_are_not(name, folders, tmp_path) -> None:
    """From folders, and as tensors by the names of checkpoints and of transformers' modules; heads are reordered each time."""
    write_fp8(folders(name), tmp_path / "fp8", PER_BLOCK)
    model, rounded = load(tmp_path / "fp8"), load(folders(name), quantization="fp8")
    values, in_8_bits = logits(rounded), logits(model)
    hf_model = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.float32)
    for tensors in (load_file(folders(name) / "model.safetensors"), hf_model.state_dict()):
        write(plan_update(rounded, tensors.items()))
        assert torch.equal(logits(rounded), values)
    write(plan_update(model, resolve(str(folders(name)))))
    assert not torch.equal(logits(model), in_8_bits)
    write(plan_update(model, resolve(str(tmp_path / "fp8"))))
    assert torch.equal(logits(model), in_8_bits)


def test_nothing_is_said_of_the_matrix_that_attention_reads_in_8_bits_and_of_what_others_keep(
    folders, tmp_path, caplog
) -> None:
    write_fp8(folders("DeepSeek-V3"), tmp_path / "fp8", PER_BLOCK)
    with caplog.at_level("INFO", logger="stepgraph"):
        load(tmp_path / "fp8")
        load(tmp_path / "fp8", shard=Shard(1, 2), expert_parallel=True)
    assert "are kept as" not in caplog.text
    with caplog.at_level("INFO", logger="stepgraph"):
        load(tmp_path / "fp8", quantization="none")
    assert "are kept as" in caplog.text


def test_an_fp8_cache_holds_what_the_other_holds_rounded(folders) -> None:
    """Of the first layer, whose entries no attention comes before; values beyond the largest code become that."""
    model = load(folders("GLM-4.7-Flash"))
    with torch.no_grad():
        model.layers[0].self_attn.kv_a_layernorm.weight[::7] *= 500
    exact, rounded = Stepper(model, 32), Stepper(model, 32)
    caches = [cache.entries.to(torch.float8_e4m3fn) for cache in rounded.caches]
    specs = model.cache_specs(torch.float8_e4m3fn)
    rounded.caches = tuple(spec.cache([entries], ()) for spec, entries in zip(specs, caches, strict=True))
    expected, found = exact.step(TOKENS), rounded.step(TOKENS)
    entries = exact.caches[0].entries
    assert entries.abs().max() > 448
    assert torch.equal(caches[0].float(), entries.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert not torch.equal(found, expected)
