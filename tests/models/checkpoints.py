"""Tiny random models in the layouts that transformers writes."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

HF_CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with every bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with llama3 rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama with linear rope": lambda: LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE),
    "mistral without window": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "qwen3 tied": lambda: Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3 with yarn rope": lambda: Qwen3Config(**SIZES, head_dim=32, rope_parameters=YARN_ROPE),
}


def random_hf_model(hf_config):
    """A transformers model with every parameter random, norms and biases included, so that none can be left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model
