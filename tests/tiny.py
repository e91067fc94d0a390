"""A random model small enough to run thousands of steps in a test, in the layout that transformers writes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
MAX_MODEL_LEN = 512
VOCAB_SIZE = 257
EOS = 0
TINY_SETTINGS = {
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "capture_sizes": (8, 48),
    "capture_rows": (8,),
    "num_kv_blocks": 257,
}
"""Of an engine that captures two graphs."""


def save_tiny_model(
    folder: Path, *, num_layers: int = 2, num_mtp_modules: int = 1, max_model_len: int = MAX_MODEL_LEN
) -> str:
    """Write a Llama whose tokenizer has one token per byte, and "<end>", and modules to draft for it. Returns the folder.

    Weights are large enough that another token, position or key anywhere in the context changes the answer.
    """
    save_byte_tokenizer(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=max_model_len,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    modules = mtp_tensors(model.config, num_mtp_modules)
    save_file(modules, folder / "mtp.safetensors")
    files = dict.fromkeys(model.state_dict(), "model.safetensors") | dict.fromkeys(modules, "mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return str(folder)


def save_tiny_mixture(folder: Path) -> str:
    """Write a Qwen2 with experts and one that all tokens take, and a tokenizer of one token per byte. Returns the folder.

    Routers have pairs of experts that they hardly tell apart, of which rounding chooses one.
    """
    save_byte_tokenizer(folder)
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_MODEL_LEN,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            if name.endswith("mlp.gate.weight"):
                parameter[1::2] = torch.nextafter(parameter[::2], parameter[1::2])
    model.save_pretrained(folder)
    return str(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token per byte, and "<end>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": EOS} | {c: i for i, c in enumerate(alphabet, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)


def mtp_tensors(
    config: LlamaConfig, num_modules: int, seed: int = 1, *, num_experts: int = 0
) -> dict[str, torch.Tensor]:
    """Random modules for a Llama, with experts or without, in DeepSeek's layout, as in a checkpoint of it."""
    E, M, D = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = {
        "enorm": (E,),
        "hnorm": (E,),
        "eh_proj": (E, 2 * E),
        "shared_head.norm": (E,),
        "input_layernorm": (E,),
        "self_attn.q_proj": (config.num_attention_heads * D, E),
        "self_attn.k_proj": (config.num_key_value_heads * D, E),
        "self_attn.v_proj": (config.num_key_value_heads * D, E),
        "self_attn.o_proj": (E, config.num_attention_heads * D),
        "post_attention_layernorm": (E,),
    }
    shapes |= {"mlp.gate": (num_experts, E)} if num_experts else {}
    for path in [f"mlp.experts.{number}" for number in range(num_experts)] or ["mlp"]:
        shapes |= {f"{path}.gate_proj": (M, E), f"{path}.up_proj": (M, E), f"{path}.down_proj": (E, M)}
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{config.num_hidden_layers + k}.{name}.weight": torch.empty(shape).normal_(
            1.0 if len(shape) == 1 else 0.0, 0.3, generator=generator
        )
        for k in range(num_modules)
        for name, shape in shapes.items()
    }


def set_run_ahead(engine, run_ahead: int) -> None:
    """Have the engine read each step's results after it has launched so many others."""
    engine.executor.specs = replace(engine.executor.specs, run_ahead=run_ahead)


def drain(engine) -> None:
    """Step until every request has ended, which must happen."""
    for _ in range(5000):
        if not engine.has_work:
            return
        time.sleep(engine.seconds_until_work or 0)
        engine.step()
    raise AssertionError("the requests never end")
