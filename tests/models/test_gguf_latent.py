"""GGUF files of models with latent attention, written here, against the transformers model that they were made from."""

import pytest
import torch
from checkpoints import EXPERTS, SIZES, random_hf_model
from stepping import Stepper
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig, MiniCPM3Config, YoutuConfig

from stepgraph import native
from stepgraph.errors import ModelError
from stepgraph.layers.formats import Packed, Plain
from stepgraph.layers.matrix import Matrix
from stepgraph.models import load_model, resolve
from stepgraph.models.update import plan_update, write
from stepgraph.parallel.shard import Shard

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
from gguf_files import write_gguf  # noqa: E402

TOKENS = [(7 * i + 3) % 96 for i in range(40)]
TYPES = gguf.GGMLQuantizationType
SIGMOID = gguf.ExpertGatingFuncType.SIGMOID
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
MIXTURE = EXPERTS | {"n_routed_experts": 8, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
GROUPS = {"n_group": 4, "topk_group": 2}
MODELS = {
    "DeepSeek-V2-Lite": lambda: DeepseekV2Config(
        **SIZES | LATENT | MIXTURE, q_lora_rank=None, first_k_dense_replace=1, rope_parameters=YARN
    ),
    "DeepSeek-V2": lambda: DeepseekV2Config(
        **SIZES | LATENT | MIXTURE | GROUPS, q_lora_rank=48, first_k_dense_replace=1, topk_method="group_limited_greedy"
    ),
    "DeepSeek-V3": lambda: DeepseekV3Config(
        **SIZES | LATENT | MIXTURE | GROUPS, q_lora_rank=48, first_k_dense_replace=1, rope_parameters=YARN
    ),
    "GLM-4.7-Flash": lambda: Glm4MoeLiteConfig(
        **SIZES | LATENT | MIXTURE, q_lora_rank=48, mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1
    ),
    "Youtu-LLM": lambda: YoutuConfig(**SIZES | LATENT, q_lora_rank=48),
    "MiniCPM3": lambda: MiniCPM3Config(**SIZES | LATENT, q_lora_rank=48),
}
METADATA = {"DeepSeek-V3": [lambda writer: writer.add_expert_gating_func(SIGMOID)]}
"""The other files do not say how experts are scored, as older ones do not."""


def load(path, **settings):
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64} | settings
    return load_model(resolve(str(path)), **settings)


def logits(model):
    return Stepper(model, 64).step(TOKENS)


def assert_same_logits(model, hf_model) -> None:
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(model), expected, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers_however_keys_and_values_are_made(name, split, tmp_path) -> None:
    hf_model = random_hf_model(MODELS[name]())
    write_gguf(tmp_path / "model.gguf", hf_model, metadata=METADATA.get(name, ()), split_latents=split)
    assert_same_logits(load(tmp_path / "model.gguf"), hf_model)


@pytest.mark.parametrize("split", [False, True])
def test_blocks_are_kept_but_in_the_matrix_that_attention_reads(split, tmp_path, caplog) -> None:
    sizes = {"v_head_dim": 32, "q_lora_rank": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
    hf_model = random_hf_model(DeepseekV3Config(**SIZES | LATENT | MIXTURE | GROUPS | sizes, first_k_dense_replace=1))
    types = dict.fromkeys(("ffn_gate_inp", "_norm", "exp_probs_b"), TYPES.F32) | {"blk.": TYPES.Q8_0}
    write_gguf(tmp_path / "model.gguf", hf_model, types, split_latents=split)
    model = load(tmp_path / "model.gguf", packed=True)
    formats = {path: layer.format for path, layer in model.layers.named_modules() if isinstance(layer, Matrix)}
    plain = {path for path, format in formats.items() if format == Plain()}
    if native.available():
        assert plain == {"0.self_attn.kv_proj", "1.self_attn.kv_proj"}
        assert {formats[path] for path in formats.keys() - plain} == {Packed("Q8_0", None)}
        assert "are kept as" not in caplog.text
    assert_same_logits(model, hf_model)
    parts = [load(tmp_path / "model.gguf", packed=True, shard=Shard(rank, 2)) for rank in range(2)]
    cut = [part.layers[1].self_attn.kv_proj.weight for part in parts]
    assert torch.equal(torch.cat(cut), model.layers[1].self_attn.kv_proj.weight)


def test_new_weights_come_from_files_of_either_kind_and_from_tensors(tmp_path) -> None:
    hf_models = [random_hf_model(MODELS["DeepSeek-V3"]()) for _ in range(2)]
    for parameter in hf_models[1].parameters():
        parameter.data *= 0.9
    for name, hf_model, split in (("a", hf_models[0], False), ("b", hf_models[1], True)):
        write_gguf(tmp_path / f"{name}.gguf", hf_model, metadata=METADATA["DeepSeek-V3"], split_latents=split)
    model, other = (load(tmp_path / f"{name}.gguf") for name in "ab")
    first = logits(model)
    write(plan_update(model, resolve(str(tmp_path / "b.gguf"))))
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), first)
    write(plan_update(model, hf_models[0].state_dict().items()))
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize(
    ("name", "add", "message"),
    [
        ("DeepSeek-V3", lambda w: w.add_rope_dimension_count(48), r"qk_nope_head_dim is 0 \(keys of 48 numbers, 48 of"),
        ("DeepSeek-V3", lambda w: w.add_float32("deepseek2.attention.temperature_scale", 0.1), "by their position"),
        (
            "DeepSeek-V3",
            lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX),
            "expert_gating_func = 1",
        ),
        ("DeepSeek-V2-Lite", lambda w: w.add_expert_weights_norm(True), "= 1, with expert_weights_norm and without"),
        (
            "DeepSeek-V3",
            lambda w: w.add_kv_lora_rank(33),
            r"kv_a_proj_with_mqa.weight has shape \[48, 64\] .* \[49, 64\]",
        ),
        ("DeepSeek-V3", lambda w: w.add_expert_group_count(3), "cannot be split into 3 groups"),
        ("DeepSeek-V3", lambda w: w.add_expert_used_count(9), "number of experts per token is 9"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(name, add, message, tmp_path) -> None:
    hf_model = random_hf_model(MODELS[name]())
    write_gguf(tmp_path / "model.gguf", hf_model, metadata=[*METADATA.get(name, ()), add])
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "model.gguf")


def test_keys_without_values_are_refused(tmp_path) -> None:
    hf_model = random_hf_model(MODELS["Youtu-LLM"]())
    tensors = {"blk.0.attn_k_b.weight": torch.zeros(4, 32, 32).numpy()}
    write_gguf(tmp_path / "model.gguf", hf_model, tensors=tensors)
    with pytest.raises(ModelError, match=r"has no tensor blk\.0\.attn_v_b\.weight"):
        load(tmp_path / "model.gguf")
    write_gguf(
        tmp_path / "other.gguf", hf_model, tensors=tensors | {"blk.0.attn_v_b.weight": torch.zeros(4, 24, 31).numpy()}
    )
    with pytest.raises(ModelError, match=r"attn_k_b.weight has shape \[4, 32, 32\] .*; they must be \[4, rank, keys\]"):
        load(tmp_path / "other.gguf")


def test_long_rope_is_read_from_the_tensors_that_hold_its_factors(tmp_path) -> None:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.5 * i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256} | factors
    hf_model = random_hf_model(MiniCPM3Config(**SIZES | LATENT, q_lora_rank=48, rope_parameters=rope))
    tensors = {
        f"rope_factors_{name}.weight": torch.tensor(factors[f"{name}_factor"]).numpy() for name in ("short", "long")
    }
    write_gguf(tmp_path / "model.gguf", hf_model, tensors=tensors)
    assert_same_logits(load(tmp_path / "model.gguf"), hf_model)
