"""LoRA adapters of the tiny model, as PEFT saves them."""

import json

import torch
from safetensors.torch import save_file

SHAPES = {"q_proj": (64, 32), "v_proj": (32, 32), "o_proj": (32, 64), "gate_proj": (64, 32), "down_proj": (32, 64)}
RANK, ALPHA = 4, 8


def matrices(seed):
    """A and B of some modules of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{'mlp' if name in ('gate_proj', 'down_proj') else 'self_attn'}.{name}": (
            torch.randn(RANK, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, RANK, generator=generator) / 2,
        )
        for layer in range(2)
        for name, (outputs, inputs) in SHAPES.items()
    }


def save_adapter(folder, pairs):
    """Write an adapter of these matrices as PEFT does; returns its folder."""
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {
            f"base_model.model.{name}.lora_{side}.weight": matrix
            for name, pair in pairs.items()
            for side, matrix in zip("AB", pair, strict=True)
        },
        folder / "adapter_model.safetensors",
    )
    return str(folder)
