"""Modules in the layouts in which they are published, beside the models they were trained with; and what is wrong with others."""

import json
from pathlib import Path

import pytest
import torch
from drafted import watch_rounds
from mtp_reference import Reference
from safetensors.torch import load_file, save_file
from tiny import TINY_SETTINGS, drain, mtp_tensors
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Glm4MoeConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from stepgraph import native
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError, ModelError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_qk_norm": True}
ERNIE_MOE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}
BLOCK = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
DEEPSEEK = {
    "enorm.weight": "model.layers.2.enorm.weight",
    "hnorm.weight": "model.layers.2.hnorm.weight",
    "eh_proj.weight": "model.layers.2.eh_proj.weight",
    "shared_head.norm.weight": "model.layers.2.shared_head.norm.weight",
}
ERNIE = {
    "enorm.weight": "model.mtp_emb_norm.0.weight",
    "hnorm.weight": "model.mtp_hidden_norm.0.weight",
    "eh_proj.weight": "model.mtp_linear_proj.0.weight",
}
MIMO = {
    "enorm.weight": "model.mtp_layers.0.token_layernorm.weight",
    "hnorm.weight": "model.mtp_layers.0.hidden_layernorm.weight",
    "eh_proj.weight": "model.mtp_layers.0.input_proj.weight",
    "shared_head.norm.weight": "model.mtp_layers.0.final_layernorm.weight",
}
QWEN3_NEXT = {
    "enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "eh_proj.weight": "mtp.fc.weight",
    "shared_head.norm.weight": "mtp.norm.weight",
}
MIMO_CONFIG = {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}

# Model, names by the reference's, the block's prefix, its tensors, how the module runs, changes of config.json
PUBLISHED = {
    "DeepSeek's layout, Llama": (LlamaConfig(**SIZES), DEEPSEEK, "model.layers.2.", BLOCK, {}, {}),
    "GLM-4.5": (
        Glm4MoeConfig(**SIZES, **GLM),
        DEEPSEEK,
        "model.layers.2.",
        (*BLOCK, *QK_NORMS),
        {},
        {},
    ),
    "ERNIE 4.5": (Ernie4_5Config(**SIZES), ERNIE, "model.mtp_block.0.", BLOCK, {"interleaved_rope": True}, {}),
    "ERNIE 4.5 with experts": (
        Ernie4_5_MoeConfig(**SIZES, **ERNIE_MOE),
        ERNIE,
        "model.mtp_block.0.",
        BLOCK,
        {"interleaved_rope": True},
        {},
    ),
    "DeepSeek's layout, Qwen3 with experts": (
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        DEEPSEEK,
        "model.layers.2.",
        (*BLOCK, *QK_NORMS),
        {},
        {},
    ),
    "MiMo-7B": (
        Qwen2Config(**SIZES),
        MIMO,
        "model.mtp_layers.0.",
        (*BLOCK, *BIASES),
        {"hidden_first": True, "hands_over_normalised": True},
        MIMO_CONFIG,
    ),
    "Qwen3-Next's names, Qwen3": (
        Qwen3Config(**SIZES),
        QWEN3_NEXT,
        "mtp.layers.0.",
        (*BLOCK, *QK_NORMS),
        {"hands_over_normalised": True},
        {},
    ),
}


def save_model(folder: Path, hf_config, changes: dict | None = None, *, seed: int = 0) -> AutoModelForCausalLM:
    """Write a model with every parameter random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (changes or {})))
    return model


def module_tensors(hf_config, names) -> dict[str, torch.Tensor]:
    """Random tensors of a module, by the reference's names."""
    generator = torch.Generator().manual_seed(1)
    made = {name.partition("layers.2.")[2]: tensor for name, tensor in mtp_tensors(hf_config, 1).items()}
    for name in (*QK_NORMS, *BIASES):
        rows = len(made[name.replace("bias", "weight")]) if name in BIASES else hf_config.head_dim
        made[name] = torch.empty(rows).normal_(1.0 if name in QK_NORMS else 0.0, 0.3, generator=generator)
    return {name: made[name] for name in names}


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file((load_file(path) if path.exists() else {}) | tensors, path, metadata={"format": "pt"})


def create(folder: Path | str, speculative: dict | None = None, **settings) -> Engine:
    config = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3, "adaptive": False} | speculative}
    return build_engine(
        EngineConfig.from_settings(
            **{"model": str(folder), "graph_backend": "eager"} | TINY_SETTINGS | config | settings
        )
    )


def check_proposals(engine: Engine, ref: Reference) -> None:
    rounds = watch_rounds(engine)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request("r", list(range(3, 30)), params)
    drain(engine)
    assert len(rounds) > 3
    for known, drafts in rounds:
        assert list(drafts) == ref.drafts(list(known), len(drafts))


@pytest.mark.parametrize("published", PUBLISHED)
def test_a_published_layout_drafts_as_its_makers_say(tmp_path, published):
    hf_config, names, block, block_names, how, changes = PUBLISHED[published]
    hf_model = save_model(tmp_path, hf_config, changes)
    module = module_tensors(hf_config, (*names, *block_names))
    checkpoint = {names.get(name, block + name): tensor for name, tensor in module.items()}
    add_tensors(tmp_path, checkpoint)
    check_proposals(create(tmp_path, {"acceptance": 0.5}), Reference(hf_model, (module,), **how))

    # Without speculation, the same checkpoint is a model like any other.
    engine = create(tmp_path, speculative={"method": "none", "num_speculative_tokens": None})
    request = engine.add_request("r", list(range(3, 30)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    drain(engine)
    tokens = torch.tensor([list(range(3, 30))])
    assert (
        request.output_token_ids
        == hf_model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=[-1])[0, 27:].tolist()
    )
    assert not engine.executor.runner.policy.max_shape.num_drafts


@pytest.mark.parametrize("published", ["GLM-4.5", "ERNIE 4.5 with experts", "DeepSeek's layout, Qwen3 with experts"])
@pytest.mark.parametrize("num_modules", [1, 2])
def test_a_module_may_have_experts_as_the_models_layers_have(tmp_path, published, num_modules):
    hf_config, names, block, _, how, _ = PUBLISHED[published]
    folder, other = tmp_path / "model", tmp_path / "other"
    hf_model, donor = save_model(folder, hf_config), save_model(other, hf_config, seed=1)
    module, last = module_tensors(hf_config, names), "model.layers.1."
    stored = load_file(other / "model.safetensors")
    module |= {name.removeprefix(last): tensor for name, tensor in stored.items() if name.startswith(last)}
    assert any("experts.3.up_proj" in name for name in module)
    for k in range(num_modules):
        add_tensors(
            folder,
            {names.get(name, block + name).replace(*numbers(block, k), 1): t.clone() for name, t in module.items()},
        )
    ref = Reference(hf_model, (module,) * num_modules, mixture=donor.model.layers[1].mlp, **how)
    check_proposals(create(folder, {"acceptance": 0.5}), ref)

    engine = create(folder, {})  # which accepts what is right
    prompts, params = (
        [list(range(3, 30)), [5, 6], [9] * 17],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    )
    requests = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    drain(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        expected = hf_model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[-1])
        assert request.output_token_ids == expected[0, len(prompt) :].tolist()


def numbers(block: str, k: int) -> tuple[str, str]:
    """The number of the first module in its names, and that of the k-th after it."""
    first = "layers.2." if block == "model.layers.2." else ".0."
    return first, first.replace("2", str(2 + k)).replace("0", str(k))


@pytest.fixture
def llama(tmp_path) -> tuple[Path, AutoModelForCausalLM, dict[str, torch.Tensor]]:
    """Folder of a model without a module, the model, and a module by the reference's names."""
    folder = tmp_path / "model"
    folder.mkdir()
    hf_model = save_model(folder, LlamaConfig(**SIZES))
    return folder, hf_model, module_tensors(hf_model.config, (*DEEPSEEK, *BLOCK))


def deepseek(module: dict[str, torch.Tensor], prefix: str = "model.") -> dict[str, torch.Tensor]:
    return {f"{prefix}layers.2.{name}": tensor for name, tensor in module.items()}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_module_may_lie_in_a_folder_of_its_own_without_a_config(llama, tmp_path, prefix):
    folder, hf_model, module = llama
    other = tmp_path / "module"
    other.mkdir()
    add_tensors(other, deepseek(module, prefix))
    check_proposals(create(folder, {"model": str(other)}), Reference(hf_model, (module,)))


def test_copies_of_embedding_and_head_are_left_aside(llama):
    folder, hf_model, module = llama
    copies = {"embed_tokens.weight": torch.zeros(96, 64), "shared_head.head.weight": torch.zeros(96, 64)}
    add_tensors(folder, deepseek(module | copies))
    check_proposals(create(folder, {}), Reference(hf_model, (module,)))


def test_a_module_may_be_stored_as_int8_and_propose_from_a_part_of_the_vocabulary(llama):
    folder, hf_model, module = llama
    stored, exact = {}, {}
    for name, tensor in module.items():
        if tensor.dim() == 1:
            stored[name] = exact[name] = tensor
        else:
            scale = tensor.abs().amax(dim=1) / 127
            stored[name] = (tensor / scale.unsqueeze(1)).round().to(torch.int8)
            stored[f"{name}_scale"] = scale
            exact[name] = stored[name] * scale.unsqueeze(1)
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:20].to(torch.int32)
    add_tensors(folder, deepseek(stored) | {"draft_token_ids": ids})
    with pytest.raises(ModelError, match=r"1 \(draft_token_ids\) left over"):
        create(folder, {})  # it is not the model's
    other = folder.parent / "module"
    other.mkdir()
    save_file(deepseek(stored) | {"draft_token_ids": ids}, other / "model.safetensors")
    save_model(folder, hf_model.config)
    ref = Reference(hf_model, (exact,), draft_token_ids=tuple(ids.tolist()))
    check_proposals(create(folder, {"model": str(other)}), ref)

    ids[3] = 96
    save_file(deepseek(stored) | {"draft_token_ids": ids}, other / "model.safetensors")
    with pytest.raises(ModelError, match=r"draft_token_ids in .* must be one list .* 0 to 95; .* ids from \d+ to 96"):
        create(folder, {"model": str(other)})


def test_every_tensor_of_a_module_is_needed_once(llama):
    folder, _, module = llama
    name = "model.layers.2.self_attn.k_proj.weight"
    for change, message in (
        ({name: None}, rf"1 \({name}\) missing, none left over"),
        (
            {"model.layers.2.self_attn.k_proj.bias": torch.zeros(32)},
            r"none missing, 1 \(model.layers.2.self_attn.k_proj.bias\)",
        ),
        (
            {name: torch.zeros(16, 64)},
            rf"{name} has shape \[16, 64\] in the checkpoint .*, and in the model \[32, 64\]",
        ),
    ):
        save_model(folder, LlamaConfig(**SIZES))
        changed = {n: tensor for n, tensor in (deepseek(module) | change).items() if tensor is not None}
        add_tensors(folder, changed)
        with pytest.raises(ModelError, match=message):
            create(folder, {})


def test_a_layer_too_many_is_no_module(llama):
    folder, _, module = llama
    layer = {name: tensor for name, tensor in module.items() if name in BLOCK}
    add_tensors(folder, deepseek(layer))
    with pytest.raises(ModelError, match=r"none missing, 9 \(model.layers.2.input_layernorm.weight, .*left over"):
        create(folder, {"method": "ngram"})


def test_who_has_no_module_is_told_what_to_do(llama, tmp_path):
    folder, _, _ = llama
    with pytest.raises(
        ConfigError, match=r'holds no module .* needs. Name a checkpoint that does \("model": .* "suffix" or "ngram"'
    ):
        create(folder, {})
    with pytest.raises(
        ConfigError, match=rf'the checkpoint "{folder}" holds no module .* layouts of DeepSeek, ERNIE, MiMo, Qwen3-Next'
    ):
        create(folder, {"model": str(folder)})
    with pytest.raises(ConfigError, match=r'"model": .*nowhere\' is not a folder'):
        create(folder, {"model": str(tmp_path / "module.bin" / "nowhere")})


def test_a_module_with_experts_is_refused_beside_a_model_that_has_none(llama):
    folder, _, module = llama
    add_tensors(folder, deepseek(module | {"mlp.experts.0.gate_proj.weight": torch.zeros(32, 64)}))
    message = r"a mixture of experts \(model.layers.2.mlp.experts.0.gate_proj.weight, …\), and .* a LlamaForCausalLM, has none"
    with pytest.raises(ConfigError, match=message):
        create(folder, {})


def test_a_model_whose_layers_are_unknown_here_is_refused(tmp_path):
    from transformers import Olmo2Config

    save_model(tmp_path, Olmo2Config(**{name: value for name, value in SIZES.items() if name != "head_dim"}))
    with pytest.raises(
        ConfigError, match=r"knows no modules for Olmo2ForCausalLM, .*those of native models; elsewhere"
    ):
        create(tmp_path, {})


@pytest.mark.parametrize("configured", [None, 2])
def test_dummy_modules_need_no_files_and_are_the_same_every_time(tmp_path, configured):
    save_model(tmp_path, LlamaConfig(**SIZES), {} if configured is None else {"num_nextn_predict_layers": configured})
    (tmp_path / "model.safetensors").unlink()
    drafters = [create(tmp_path, {}, load_format="dummy").executor._drafter for _ in range(2)]
    assert len(drafters[0].layers) == drafters[0].lookahead == (configured or 1)
    for a, b in zip(*(drafter.parameters() for drafter in drafters), strict=True):
        assert torch.equal(a, b)
        assert (a == 1).all() if a.dim() == 1 else 0.01 < a.std() < 0.03


def test_the_module_that_ships_for_the_embedded_model_is_found(smollm2):
    settings = {"max_model_len": 64, "max_num_batched_tokens": 64, "capture_sizes": (64,), "num_kv_blocks": 9}
    drafter = create("smollm2", {}, **settings, quantization="none").executor._drafter
    assert len(drafter.layers) == 1
    assert len({tuple(parameter.shape) for parameter in drafter.parameters()} & {(576, 1152), (8192, 576)}) == 2
    if (
        native.available()
    ):  # beside a model that stays in blocks, it is in blocks too, and stays so when it is filled anew
        drafter = create("smollm2", {}, **settings).executor._drafter
        matrices = [parameter for parameter in drafter.parameters() if parameter.dim() == 2]
        assert {matrix.dtype for matrix in matrices} == {torch.uint8}
        before = [matrix.clone() for matrix in matrices]
        for matrix in matrices:
            matrix.zero_()
        drafter.reload()
        assert all(map(torch.equal, matrices, before))
