"""Models with latent attention through the engine, against transformers, and the configs of theirs that are refused.
`scripts/sweep_families.py` tries as many random ones as one likes."""

import copy
import importlib
import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from checkpoints import SIZES, YARN_ROPE, hf_config
from safetensors.torch import load_file, save_file
from stepping import Stepper

from stepgraph.errors import ModelError
from stepgraph.layers.latent_attention import expanded_attention
from stepgraph.models import decoder_layer, load_model, resolve
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.platforms.tuning import DEFAULT

SCRIPT = Path(__file__).parents[2] / "scripts" / "sweep_families.py"
FAMILIES = {"deepseek_v2": 3, "deepseek_v3": 6, "glm4_moe_lite": 2, "minicpm3": 0, "youtu": 1}
"""And which of their random configs."""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sweep_families", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_transformers_in_chunks_batched_and_with_prefixes_from_the_cache(script, family, tmp_path) -> None:
    hf_model = script.write_model(script.FAMILIES[family](random.Random(FAMILIES[family])), tmp_path)
    engine, requests = script.answer(tmp_path, script.PROMPTS)
    assert script.differences(hf_model, requests) + script.miscounted(engine) == []
    assert requests[-1].num_cached_tokens
    engine.shutdown()


def test_answers_are_transformers_where_steps_make_keys_and_values_of_their_own_tokens(
    script, tmp_path, monkeypatch
) -> None:
    """Of chunks with context and without, beside decode rows; steps of decode rows alone do not."""
    monkeypatch.setattr(CpuPlatform, "tuning", replace(DEFAULT, min_expanded_tokens=1))
    hf_model = script.write_model(script.FAMILIES["deepseek_v2"](random.Random(3)), tmp_path)
    with mock.patch("stepgraph.layers.latent_attention.expanded_attention", wraps=expanded_attention) as calls:
        engine, requests = script.answer(tmp_path, script.PROMPTS)
    assert {call.args[0].shape[0] for call in calls.call_args_list} == {24}
    assert {record.shape.num_tokens for record in engine.executor.graph_records()} == {3, 24}
    assert script.differences(hf_model, requests) == []
    engine.shutdown()


TOKENS = [(7 * i + 3) % 96 for i in range(40)]


@pytest.fixture(scope="module")
def v3(script, tmp_path_factory):
    """A folder, and what transformers loads from it: queries have a latent, adjacent dimensions rotate, YaRN scales scores."""
    folder = tmp_path_factory.mktemp("v3")
    families = importlib.import_module("random_families")  # which the script has imported
    fields = families.groups(random.Random(1)) | families.latent(random.Random(1))
    yarn = families.YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}
    fields |= {"q_lora_rank": 24, "rope_parameters": yarn, "rope_interleave": True, "rms_norm_eps": 0.1}
    return folder, script.write_model(transformers.DeepseekV3Config(**fields | {"attention_bias": True}), folder)


def expected(hf_model):
    with torch.no_grad():
        return hf_model(torch.tensor([TOKENS])).logits[0]


def off(folder, hf_model):
    """By how much a checkpoint's logits are not those of a model of transformers."""
    model = load_model(resolve(str(folder)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)
    return float((Stepper(model, 64).step(TOKENS) - expected(hf_model)).abs().max())


def changed(source, folder, fields=None, tensors=lambda name, tensor: tensor):
    """A copy of a checkpoint with other fields, and with what `tensors` makes of each tensor; None: it is left out."""
    config = json.loads((source / "config.json").read_text()) | (fields or {})
    (folder / "config.json").write_text(json.dumps(config))
    new = {name: tensors(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    new = {name: tensor for name, tensor in new.items() if tensor is not None}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_answer_is_the_same_alone_and_with_proposals(script, v3, tmp_path) -> None:
    assert script.check(v3[1].config, tmp_path) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_interleave": False},
        {"rope_parameters": {"mscale_all_dim": 1.0}},
        {"rope_parameters": {"mscale": 0.7}},
        {"routed_scaling_factor": 1.1},
    ],
)
def test_another_rotation_or_scale_is_found_out(v3, fields, tmp_path) -> None:
    folder, hf_model = v3
    assert off(folder, hf_model) < 2e-4
    if "rope_parameters" in fields:
        fields = {"rope_parameters": hf_model.config.rope_parameters | fields["rope_parameters"]}
    assert off(changed(folder, tmp_path, fields), hf_model) > 1e-2


@pytest.mark.parametrize("norm", ["q_a_layernorm", "kv_a_layernorm"])
def test_a_latent_whose_norm_is_forgotten_is_found_out(v3, norm, tmp_path) -> None:
    folder, hf_model = v3
    forgotten = changed(folder, tmp_path, tensors=lambda name, t: torch.ones_like(t) if norm in name else t)
    assert off(forgotten, hf_model) > 1e-2


def test_latents_that_are_normalised_with_the_other_norms_epsilon_are_found_out(v3, monkeypatch) -> None:
    folder, hf_model = v3
    monkeypatch.setattr(decoder_layer, "_LATENT_EPS", hf_model.config.rms_norm_eps)
    assert off(folder, hf_model) > 1e-2


def test_no_layer_need_have_shared_experts(v3, tmp_path) -> None:
    folder, hf_model = v3
    without = changed(
        folder,
        tmp_path,
        {"n_shared_experts": 0},
        lambda name, tensor: None if "shared_experts" in name else tensor,
    )
    idle = copy.deepcopy(hf_model)
    with torch.no_grad():
        for name, parameter in idle.named_parameters():
            parameter.mul_("shared_experts.down_proj" not in name)
    assert off(without, idle) < 2e-4
    assert off(without, hf_model) > 1e-2


LATENT = SIZES | {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "v_head_dim": 40}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
YARN = YARN_ROPE | {"mscale": 1.0}
EXPERTS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "DeepseekV2": LATENT | EXPERTS,
    "DeepseekV3": LATENT | EXPERTS | {"first_k_dense_replace": 1},
    "Glm4MoeLite": LATENT | EXPERTS,
    "MiniCPM3": LATENT,
    "Youtu": LATENT,
    "DeepseekV32": LATENT | EXPERTS | {"index_topk": 64},
    "GlmMoeDsa": LATENT | EXPERTS | {"index_topk": 64},
    "DeepseekV4": {},
    "KimiLinear": {},
    "LongcatFlash": {},
    "Mistral4": LATENT | EXPERTS,
}


def save(name, folder, **changes):
    architecture = f"{name}ForCausalLM"
    hf_config(f"{name}Config", **CONFIGS[name], architectures=[architecture]).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


RUN_BY_TRANSFORMERS = {
    ("DeepseekV2", "mlp_bias"),
    ("DeepseekV3", "attention_bias", "q_lora_rank"),
    ("Glm4MoeLite", "mlp_layer_types"),
    ("LongcatFlash",),
}
"""Models, and what is unusual in them."""


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "DeepseekV2",
            {"topk_method": "noaux_tc"},
            "topk_method is 'noaux_tc'.* where it is 'greedy' or 'group_limited_greedy'",
        ),
        ("DeepseekV2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid' .* where it is 'softmax'"),
        ("DeepseekV2", {"norm_topk_prob": True}, "norm_topk_prob is True .* where it is False"),
        ("DeepseekV2", {"mlp_bias": True}, "mlp_bias is true .* have no biases here"),
        ("DeepseekV2", {"moe_layer_freq": 2}, "moe_layer_freq is 2 .* where it is 1"),
        ("DeepseekV3", {"scoring_func": "softmax"}, "scoring_func is 'softmax' .* where it is 'sigmoid'"),
        ("DeepseekV3", {"topk_method": "greedy"}, "topk_method is 'greedy' .* where it is 'noaux_tc'"),
        ("DeepseekV3", {"moe_layer_freq": [0, 1]}, r"moe_layer_freq is \[0, 1\]"),
        ("DeepseekV3", {"attention_bias": True, "q_lora_rank": None}, "biases .* where queries have a latent"),
        ("DeepseekV3", {"kv_lora_rank": 0}, "kv_lora_rank is 0 .* at least 1"),
        ("DeepseekV3", {"kv_lora_rank": -32}, "kv_lora_rank is -32, and must be between 0 and"),
        ("DeepseekV3", {"q_lora_rank": 0}, "q_lora_rank is 0 .* or null where queries have no latent"),
        ("DeepseekV3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7 .* at least 1 and even"),
        ("DeepseekV3", {"qk_nope_head_dim": 0}, "qk_nope_head_dim is 0 .* at least 1"),
        ("Glm4MoeLite", {"v_head_dim": 0}, "v_head_dim is 0 .* at least 1"),
        ("Glm4MoeLite", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2 .* makes it 1: correct"),
        ("Glm4MoeLite", {"mlp_layer_types": ["sparse", "dense"]}, "must name each of the 2 layers: dense ones, then"),
        ("Glm4MoeLite", {"num_experts_per_tok": 5}, "experts per token is 5 .* at most 4"),
        ("MiniCPM3", {"qk_rope_head_dim": 1}, "qk_rope_head_dim is 1 .* even"),
        ("MiniCPM3", {"kv_lora_rank": 2**30}, "kv_lora_rank is 1073741824, and must be between"),
        ("Youtu", {"v_head_dim": "40"}, "v_head_dim is '40', which is of no use"),
        (
            "Youtu",
            {"rope_parameters": YARN | {"mscale_all_dim": float("inf")}},
            "mscale_all_dim and factor are inf and 4.0",
        ),
        ("DeepseekV32", {}, "its attention is indexed: .* the 64 keys .* DeepSeek-V3, R1 and V3.1 among them"),
        ("GlmMoeDsa", {}, "its attention is indexed"),
        ("DeepseekV4", {}, "its attention is indexed"),
        ("KimiLinear", {}, r"latent attention \(kv_lora_rank = 512\), and most of its layers are recurrent"),
        ("LongcatFlash", {}, "latent attention .* its layers attend twice"),
        ("DeepseekV3", {"index_topk": 64}, "its attention is indexed: .* the 64 keys"),
        (
            "DeepseekV3",
            {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
            r"cannot run: its queries are multiplied by a function of their position \(llama_4_scaling_beta\)\. Models",
        ),
        ("Mistral4", {}, r"its queries are multiplied by a function of their position \(llama_4_scaling_beta\)"),
    ],
)
def test_what_has_no_native_code_or_cannot_be_is_refused_by_name(name, changes, message, tmp_path) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        resolve(save(name, tmp_path, **changes), model_impl="native")
    told = "set model_impl to transformers" in str(refused.value)
    assert told == ((name, *changes) in RUN_BY_TRANSFORMERS)


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3", "Glm4MoeLite", "MiniCPM3", "Youtu"])
def test_transformers_code_keeps_keys_and_values_where_the_native_model_keeps_latents(name, tmp_path) -> None:
    folder = save(name, tmp_path)
    expanded = resolve(folder, model_impl="transformers").config.attention_specs[0]
    latent = resolve(folder).config.attention_specs[0]
    assert (expanded.head_dim, expanded.value_dim, latent.value_dim) == (40, 40, 32)
    assert expanded.cached_numbers > 4 * latent.cached_numbers


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa"])
def test_transformers_code_is_no_way_round(name, tmp_path) -> None:
    folder = save(name, tmp_path)
    messages = []
    for model_impl in ("native", "transformers", "auto"):
        with pytest.raises(ModelError) as refused:
            resolve(folder, model_impl=model_impl)
        messages.append(str(refused.value))
    assert len(set(messages)) == 1
    assert "set model_impl" not in messages[0]


def test_kimi_k2_is_a_deepseek_v3_and_its_config_says_where_it_has_no_draft_module(tmp_path) -> None:
    folder = save("DeepseekV3", tmp_path, model_type="kimi_k2", num_nextn_predict_layers=0)
    config = resolve(folder).config
    assert (config.architecture, config.num_mtp_modules) == ("DeepseekV3ForCausalLM", 0)
