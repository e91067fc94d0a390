"""Random small models of every native architecture, in sizes that 2, 3 and 4 ranks can share."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from tiny import MAX_MODEL_LEN, save_byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    CwmConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    YoutuConfig,
)

NUM_HEADS = 12
ADAPTER_RANK = 4
ADAPTED = tuple(f"{name}_proj.weight" for name in ("q", "v", "o", "gate", "down"))
WINDOW = 24
MIXED_LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA_ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
CONFIGS = {
    "llama": lambda **sizes: LlamaConfig(**sizes),
    "llama with every bias": lambda **sizes: LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
    "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=WINDOW),
    "qwen2": lambda **sizes: Qwen2Config(**sizes),
    "qwen3": lambda **sizes: Qwen3Config(**sizes),
    "ernie 4.5": lambda **sizes: Ernie4_5Config(**sizes),
    "gemma 3": lambda **sizes: Gemma3TextConfig(
        **sizes | MIXED_LAYERS, query_pre_attn_scalar=24, sliding_window=WINDOW, rope_parameters=GEMMA_ROPE
    ),
    "granite": lambda **sizes: GraniteConfig(
        **sizes, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=2.0
    ),
    "phi 3": lambda **sizes: Phi3Config(**sizes, pad_token_id=0),
    "seed oss": lambda **sizes: SeedOssConfig(**sizes, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "smollm 3": lambda **sizes: SmolLM3Config(**sizes, pad_token_id=0, no_rope_layer_interval=2),
    "cwm": lambda **sizes: CwmConfig(
        **sizes | MIXED_LAYERS, sliding_window=WINDOW, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "minicpm 3": lambda **sizes: MiniCPM3Config(**sizes, scale_emb=3, scale_depth=0.9, dim_model_base=18),
    "youtu": lambda **sizes: YoutuConfig(**sizes),
}
DEEPSEEK = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "first_k_dense_replace",
)
QWEN = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers")
ERNIE = ("moe_num_experts", "moe_k", "moe_intermediate_size", None, "moe_layer_start_index")
WITH_EXPERTS = {
    "mixtral": (MixtralConfig, ("num_local_experts", "num_experts_per_tok", "intermediate_size"), {}),
    "qwen2 moe": (Qwen2MoeConfig, QWEN, {"shared_expert_intermediate_size": 36}),
    "qwen3 moe": (Qwen3MoeConfig, QWEN, {}),
    "ernie 4.5 moe": (Ernie4_5_MoeConfig, ERNIE, {"moe_num_shared_experts": 2}),
    "glm 4.5": (
        Glm4MoeConfig,
        DEEPSEEK,
        {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5, "use_qk_norm": True, "attention_bias": True},
    ),
    "dots 1": (Dots1Config, DEEPSEEK, {"n_shared_experts": 1}),
    "deepseek 2": (
        DeepseekV2Config,
        (*DEEPSEEK[:3], None, DEEPSEEK[4]),
        {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    ),
    "deepseek 3": (
        DeepseekV3Config,
        DEEPSEEK,
        {"n_shared_experts": 1, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "glm 4.7 flash": (Glm4MoeLiteConfig, (*DEEPSEEK[:4], "mlp_layer_types"), {"n_shared_experts": 1}),
    "granite moe": (
        GraniteMoeConfig,
        ("num_local_experts", "num_experts_per_tok", "intermediate_size"),
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
}
"""Class, fields for what a model's `RandomModel.experts` says in that order, and others."""
WITH_LATENTS = ("minicpm 3", "youtu", "deepseek 2", "deepseek 3", "glm 4.7 flash")
"""Those whose attention is over latents."""
DRAFTING = ("llama", "youtu", "mixtral", "deepseek 3", "glm 4.7 flash")
"""Those that may have modules which propose tokens."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": MAX_MODEL_LEN / 64, "original_max_position_embeddings": 64}
BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1")


class RandomModel(NamedTuple):
    """What a model is, apart from its weights."""

    architecture: str
    sizes: dict[str, object]
    num_mtp_modules: int = 0
    num_adapters: int = 0
    block_type: str | None = None
    """Of a GGUF file, which has no tokenizer."""
    experts: tuple[object, ...] = ()
    """How many, how many of them for a token, their width, whether weights are normalised, and dense first layers."""
    name: str | None = None
    """Of a model that need not be made."""


def random_model(
    rng: random.Random, num_ranks: int, *, drafts: bool, experts: bool = False, latents: bool = False
) -> RandomModel:
    """One that so many ranks can share: each has key/value heads of its own, or the same as others.

    Args:
        rng: decides everything else.
        num_ranks: that share it.
        drafts: give it modules that propose tokens.
        experts: give it experts, which others have by chance.
        latents: give it attention over latents, likewise.
    """
    with_experts = rng.random() < 0.4 or experts
    possible = [name for name in (WITH_EXPERTS if with_experts else CONFIGS) if name in DRAFTING or not drafts]
    if latents or rng.random() < 0.3:
        possible = [name for name in possible if name in WITH_LATENTS]
    architecture = rng.choice(possible)
    kv_heads = [n for n in (1, 2, 3, 4, 6, 12) if n % num_ranks == 0 or num_ranks % n == 0]
    sizes = {
        "vocab_size": rng.randint(257, 280),
        "hidden_size": NUM_HEADS * rng.randint(2, 5),
        "intermediate_size": NUM_HEADS * rng.randint(2, 8),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": rng.choice(kv_heads),
        "head_dim": rng.choice((8, 16)),
        "max_position_embeddings": MAX_MODEL_LEN,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "tie_word_embeddings": rng.random() < 0.5,
    }
    if architecture == "phi 3":
        sizes |= {"hidden_size": NUM_HEADS * sizes["head_dim"]}  # whose head size follows from it
    if architecture in WITH_LATENTS:
        sizes = _with_latents(rng, sizes)
    if architecture in ("llama", "qwen2", "qwen3", "qwen3 moe") and not drafts and rng.random() < 0.5:
        # Of which every rank has whole blocks of 32.
        blocks = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 384}
        mixture = (rng.choice((6, 12)) // 3 * num_ranks, 3, 384, True, 0) if architecture in WITH_EXPERTS else ()
        return RandomModel(architecture, sizes | blocks, block_type=rng.choice(BLOCK_TYPES), experts=mixture)
    mixture = _random_experts(rng, num_ranks, sizes) if architecture in WITH_EXPERTS else ()
    adapters = rng.choice((0, 2)) if architecture != "phi 3" else 0
    return RandomModel(
        architecture, sizes, num_mtp_modules=rng.randint(1, 2) if drafts else 0, num_adapters=adapters, experts=mixture
    )


def _with_latents(rng: random.Random, sizes: dict[str, object]) -> dict[str, object]:
    """What such models have instead of heads of keys and values."""
    size = {
        "q_lora_rank": rng.choice((None, 24)),
        "kv_lora_rank": rng.choice((16, 32)),
        "qk_rope_head_dim": rng.choice((8, 16)),
        "qk_nope_head_dim": rng.choice((8, 16)),
        "v_head_dim": rng.choice((8, 16)),
    }
    bias = size["q_lora_rank"] is not None and rng.random() < 0.5
    scales = {"mscale": 0.707, "mscale_all_dim": rng.choice((0.707, 1.0))}
    rope = rng.choice(({"rope_type": "default", "rope_theta": 1e4}, YARN | scales))
    own = size | {"attention_bias": bias, "rope_parameters": rope, "num_key_value_heads": NUM_HEADS}
    return {name: value for name, value in sizes.items() if name != "head_dim"} | own


def _random_experts(rng: random.Random, num_ranks: int, sizes: dict[str, object]) -> tuple[object, ...]:
    """As many as ranks can have, of a width that they can share."""
    number = rng.choice([n for n in (6, 12, 24) if n % num_ranks == 0])
    first_is_dense = sizes["num_hidden_layers"] > 1 and rng.random() < 0.3
    return (
        number,
        rng.randint(1, min(8, number // 3 * 2)),
        NUM_HEADS * rng.randint(1, 4),
        rng.random() < 0.7,
        int(first_is_dense),
    )


def config_of(model: RandomModel):
    """As transformers has it."""
    if not model.experts:
        return CONFIGS[model.architecture](**model.sizes)
    of_class, fields, others = WITH_EXPERTS[model.architecture]
    values = {name: value for name, value in zip(fields, model.experts, strict=False) if name is not None}
    if "mlp_only_layers" in values:
        values["mlp_only_layers"] = list(range(values["mlp_only_layers"]))
    if "mlp_layer_types" in values:
        num_dense, num_layers = values["mlp_layer_types"], model.sizes["num_hidden_layers"]
        values["mlp_layer_types"] = ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense)
    return of_class(**model.sizes | others | values)


def model_path(model: RandomModel, folder: Path) -> str:
    """What to load, of what `save_model` has written."""
    return model.name or str(folder if model.block_type is None else folder / "model.gguf")


def save_model(model: RandomModel, folder: Path) -> None:
    """Write it, its tokenizer, draft modules and adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config_of(model), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        for name, buffer in hf_model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    if model.block_type is not None:
        types = {"token_embd": "Q8_0", "_norm": "F32", "weight": model.block_type}
        file = model_path(model, folder)
        write_gguf(file, hf_model, {part: GGMLQuantizationType[name] for part, name in types.items()})
        return
    save_byte_tokenizer(folder)
    hf_model.save_pretrained(folder)
    if model.num_mtp_modules:
        stored = load_file(folder / "model.safetensors")
        modules = _mtp_tensors(stored, hf_model.config, model.num_mtp_modules)
        save_file(modules, folder / "mtp.safetensors")
        files = dict.fromkeys(stored, "model.safetensors") | dict.fromkeys(modules, "mtp.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for number in range(model.num_adapters):
        _save_adapter(folder / f"adapter{number}", hf_model, number)


def _mtp_tensors(stored: dict[str, torch.Tensor], config, num_modules: int) -> dict[str, torch.Tensor]:
    """Random modules in DeepSeek's layout, whose layers are like a model's last one: with the names of its stored tensors."""
    E, num_layers = config.hidden_size, config.num_hidden_layers
    last = f"model.layers.{num_layers - 1}."
    shapes = {name.removeprefix(last): tensor.shape for name, tensor in stored.items() if name.startswith(last)}
    shapes |= {f"{name}.weight": (E,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {"eh_proj.weight": (E, 2 * E)}
    generator = torch.Generator().manual_seed(1)
    return {
        f"model.layers.{num_layers + k}.{name}": torch.empty(shape).normal_(
            1.0 if "norm" in name else 0.0, 0.3, generator=generator
        )
        for k in range(num_modules)
        for name, shape in shapes.items()
    }


def _save_adapter(folder: Path, hf_model, seed: int) -> None:
    """One of some matrices of every layer, as PEFT saves it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in hf_model.named_parameters():
        if "expert" not in name and name.endswith(ADAPTED):
            stem, (outputs, inputs) = f"base_model.model.{name.removesuffix('.weight')}", weight.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(ADAPTER_RANK, inputs, generator=generator) / inputs**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, ADAPTER_RANK, generator=generator) / 4
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": ADAPTER_RANK, "lora_alpha": 2 * ADAPTER_RANK}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
