"""Rotary position embedding as a table: the angles of every position a request can reach, computed once at load.

Source: Su et al., "RoFormer" (2021); the scaled variants are transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stepgraph.errors import ModelError

_SCALED = ("linear", "llama3", "yarn")
"""Rope types whose frequencies are constants of the model. "dynamic" and "longrope" change them with the length of the
sequence, so keys cached early in a request would carry other angles than keys cached late."""


@dataclass(frozen=True)
class RotaryFrequencies:
    """What a model's rope settings come down to."""

    inv_freq: tuple[float, ...] = field(repr=False)  # D/2 angles per position, in radians
    scale: float = 1.0  # multiplies cosines and sines (YaRN's attention scaling)


def rotary_frequencies(hf_config: Any, head_dim: int) -> RotaryFrequencies:
    """Evaluate the rope settings of a transformers config.

    Args:
        hf_config: transformers config object, rope settings in `rope_parameters`.
        head_dim: D.

    Raises:
        ModelError: the rope type depends on the sequence length, is unknown, or rotates only a part of each head.
    """
    rope = hf_config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"The model rotates only a part of each head (partial_rotary_factor {rope['partial_rotary_factor']}); "
            "native models rotate whole heads."
        )
    if rope_type == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return RotaryFrequencies(tuple((1.0 / rope["rope_theta"] ** exponent).tolist()))
    if rope_type not in _SCALED:
        raise ModelError(
            f'The rope type is "{rope_type}", whose angles depend on the length of the sequence or are unknown here; '
            f"supported are default, {', '.join(_SCALED)}. Where the checkpoint's card allows it, remove the scaling "
            "from config.json and stay within the original context length."
        )
    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    return RotaryFrequencies(tuple(inv_freq.tolist()), float(scale))


def cos_sin_table(frequencies: RotaryFrequencies, num_positions: int, device: torch.device) -> Tensor:
    """Return the [num_positions, D] float32 table that `ops.rope_cache` reads: cosines of the D/2 angles, then sines.

    Computed on the CPU, so that it is the same on every device.
    """
    inv_freq = torch.tensor(frequencies.inv_freq, dtype=torch.float32)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * frequencies.scale).to(device)
