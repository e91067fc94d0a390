"""A random model with experts, small enough to run hundreds of steps in a test."""

from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

NUM_EXPERTS, TOP = 8, 3
MIXTURE_LAYERS = 2


def save_tiny_mixture(folder: Path, *, num_layers: int = 3) -> str:
    """Write one whose layers but the second have experts. Returns the folder."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=TOP,
            mlp_only_layers=[1] if num_layers > 1 else [],
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    return str(folder)
