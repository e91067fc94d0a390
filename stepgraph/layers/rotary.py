"""Rotary position embedding as a table: the angles of every position a request can reach, computed once at load.

Source: Su et al., "RoFormer" (2021); the scaled variants are transformers' own.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepgraph.errors import ModelError

logger = logging.getLogger(__name__)

_SCALED = ("linear", "llama3", "yarn", "longrope")
"""Rope types whose frequencies are constants of the model, or of the model and the longest sequence."""
_PROPORTIONAL = "proportional"
"""Rope type of Gemma 4: the first pairs of a head rotate, by the frequencies that they have where all rotate."""
_PLAIN = ("default", "dynamic")
"""Rope types without scaling: "dynamic" scales where a sequence is longer than max_position_embeddings, which none is."""


@dataclass(frozen=True)
class RotaryFrequencies:
    """What a model's rope settings come down to. Pairs of a head that have no frequency here are not rotated."""

    inv_freq: tuple[float, ...] = field(repr=False)  # angle per position of each rotated pair, in radians; at most D/2
    scale: float = 1.0  # multiplies cosines and sines of the rotated pairs (YaRN's attention scaling)
    long_inv_freq: tuple[float, ...] = field(default=(), repr=False)  # instead, if sequences exceed `original_length`
    original_length: int = 0  # tokens; only with `long_inv_freq`


UNROTATED = RotaryFrequencies(())
"""Of a layer without position embedding (NoPE)."""


def rotary_frequencies(hf_config: Any, head_dim: int, layer_type: str | None = None) -> RotaryFrequencies:
    """Evaluate the rope settings of a transformers config.

    Args:
        hf_config: transformers config object, rope settings in `rope_parameters`.
        head_dim: D.
        layer_type: whose settings, where `rope_parameters` holds one set per layer type (Gemma 3).

    Raises:
        ModelError: the rope type depends on the length of each sequence or is unknown, or rotates an odd part of a head, or an
            angle is not finite.
    """
    frequencies = _evaluate(hf_config, head_dim, layer_type)
    values = (*frequencies.inv_freq, *frequencies.long_inv_freq, frequencies.scale)
    if not all(map(math.isfinite, values)):
        raise ModelError(
            f"The rope settings {hf_config.rope_parameters!r:.300} lead to angles that are not finite; correct rope_parameters "
            "in config.json."
        )
    return frequencies


def _evaluate(hf_config: Any, head_dim: int, layer_type: str | None) -> RotaryFrequencies:
    rope = hf_config.rope_parameters if layer_type is None else hf_config.rope_parameters[layer_type]
    rope_type = rope.get("rope_type", "default")
    if rope_type == _PROPORTIONAL and head_dim % 2 == 0:
        pairs = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
        exponent = torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / head_dim
        rotated = 1.0 / rope["rope_theta"] ** exponent / rope.get("factor", 1.0)
        return RotaryFrequencies((*rotated.tolist(), *[0.0] * (head_dim // 2 - pairs)))
    num_rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if num_rotated % 2 or head_dim % 2:
        raise ModelError(
            f"The model rotates {num_rotated} of the {head_dim} dimensions of a head; pairs of dimensions are rotated, so "
            'both must be even. Check "partial_rotary_factor" in config.json.'
        )
    if rope_type in _PLAIN and "alpha" not in rope:  # with which HunYuan scales sequences of any length
        exponent = torch.arange(0, num_rotated, 2, dtype=torch.float32) / num_rotated
        return RotaryFrequencies(tuple((1.0 / rope["rope_theta"] ** exponent).tolist()))
    if rope_type not in _SCALED:
        raise ModelError(
            f'The rope type is "{rope_type}"{" with alpha" if "alpha" in rope else ""}, and native models know '
            f"{', '.join((*_PLAIN, *_SCALED, _PROPORTIONAL))}. Correct rope_parameters in config.json, or add the type: "
            "docs/adding-a-model.md."
        )

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def scaled(seq_len: int | None = None) -> tuple[tuple[float, ...], float]:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[rope_type](
            hf_config, torch.device("cpu"), seq_len=seq_len, layer_type=layer_type
        )
        return tuple(inv_freq.tolist()), float(scale)

    if rope_type != "longrope":
        return RotaryFrequencies(*scaled())
    original_length = rope["original_max_position_embeddings"]
    return RotaryFrequencies(*scaled(), scaled(original_length + 1)[0], original_length)


def cos_sin_table(frequencies: RotaryFrequencies, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Return the [num_positions, D] float32 table that `ops.rope_cache` reads: cosines of the D/2 angles, then sines.

    Pairs without a frequency have cosine 1 and sine 0. Computed on the CPU, so that it is the same on every device.

    LongRoPE has one set of frequencies for sequences within the original length and one for longer ones. The choice is
    made here, from `num_positions`, for all requests: changed in the middle of one, it would leave keys of both kinds in
    the cache.
    """
    inv_freq = frequencies.inv_freq
    if frequencies.long_inv_freq:
        longer = num_positions > frequencies.original_length
        logger.info(
            "LongRoPE: %s factors for all requests, as max_model_len=%d is %s the original length of %d tokens",
            "long" if longer else "short",
            num_positions,
            "above" if longer else "within",
            frequencies.original_length,
        )
        inv_freq = frequencies.long_inv_freq if longer else inv_freq
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), torch.tensor(inv_freq, dtype=torch.float32))
    unrotated = head_dim // 2 - len(inv_freq)
    cos = torch.cat((angles.cos() * frequencies.scale, torch.ones(num_positions, unrotated)), dim=-1)
    sin = torch.cat((angles.sin() * frequencies.scale, torch.zeros(num_positions, unrotated)), dim=-1)
    return torch.cat((cos, sin), dim=-1).to(device)


def rotary_order(frequencies: RotaryFrequencies, head_dim: int, *, interleaved: bool) -> Tensor:
    """Return [D] int64: which dimension of a checkpoint's head comes at each place of the kernels' head.

    `ops.rope_cache` rotates pairs (i, i + D/2) of whole heads. A checkpoint may rotate adjacent dimensions (2i, 2i + 1)
    (`interleaved`), or only the first n dimensions of a head, in pairs (i, i + n/2). Moving the output rows of its query
    and key projections (and the weights of head norms) into this order makes the pairs meet; scores do not change, as a
    dot product is the same whatever the order of its terms.
    """
    num_pairs = len(frequencies.inv_freq)
    rotated, rest = torch.arange(head_dim).split((2 * num_pairs, head_dim - 2 * num_pairs))
    first, second = (rotated[0::2], rotated[1::2]) if interleaved else (rotated[:num_pairs], rotated[num_pairs:])
    half = len(rest) // 2
    return torch.cat((first, rest[:half], second, rest[half:]))
