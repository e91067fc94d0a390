"""Static sizes of one launch of `expanded_attention`: all that a graph bakes in, none of it dependent on the batch."""

from __future__ import annotations

import torch

from stepgraph.ops.attention.geometry import UNSPLIT, AttentionGeometry, max_tiles
from stepgraph.platforms.tuning import KernelTuning

TILE = 128
"""Tokens of a tile, of one head."""


def expanded_geometry(num_tokens: int, num_rows: int, num_heads: int, multiprocessors: int) -> AttentionGeometry:
    """Choose the sizes for a step of `num_tokens` tokens in `num_rows` rows; see `attention_geometry`. Each head is a group of
    its own. Keys are never split: a row has no more of them than queries, and so enough tiles."""
    max_items = max_tiles(num_tokens, num_rows, 1, TILE)
    return AttentionGeometry(
        tile=TILE,
        min_split_keys=UNSPLIT,
        split_target=1,
        max_items=max_items,
        max_partials=0,
        num_programs=min(max_items * num_heads, max(1, multiprocessors)),
    )


def hopper_serves(tuning: KernelTuning, dtype: torch.dtype, key_dim: int, rotated_dim: int, value_dim: int) -> bool:
    """Whether `stepgraph.ops.expanded_attention.hopper` computes tiles of TILE, or the kernel for any GPU does.

    It is for a Hopper GPU, under a Triton that has its Gluon; activations of 16 bits; and heads of DeepSeek's sizes.

    Args:
        tuning: of the platform.
        dtype: of the activations.
        key_dim, rotated_dim, value_dim: N, P and V of the operator.
    """
    if not tuning.hopper_expanded or dtype not in (torch.bfloat16, torch.float16):
        return False
    if (key_dim, rotated_dim, value_dim) != (128, 64, 128):
        return False
    try:
        from stepgraph.ops.expanded_attention import hopper  # noqa: F401
    except (ImportError, AttributeError):  # Gluon is experimental: another release may name things otherwise
        return False
    return True
