"""Sizes and values of the cases of operators, and arguments of those that keep states.

Shapes: T tokens, K inputs, N outputs, H query heads, G key/value heads, D head size, B tokens per block, V vocabulary entries.
"""

from typing import Any

import torch
from torch import Tensor

EPS = 1e-5
T, K, N, H, G, D, B, V = 5, 96, 40, 4, 2, 32, 8, 97


def random(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def stateful_rows() -> tuple[Tensor, ...]:
    """A new request's prompt, a token of another, tokens of which the last two may be taken back, and an empty row. Two read one
    line, and write others."""
    return int32(2, 3, 3, 5), int32(2, 1, 4, 5), int32(0, 20, 21, 25, 25), int32(0, 7, 30, 9), int32(20, 1, 2, 0)


def convolved(g: torch.Generator, *, silu: bool) -> tuple[Any, ...]:
    bias = None if silu else random(g, K)
    return random(g, 25, K + 8)[:, :K], random(g, K, 4), bias, random(g, 6, 3, K), *stateful_rows(), silu


def remembered(g: torch.Generator, *, max_rate: float, deterministic: bool) -> tuple[Any, ...]:
    """Two heads of keys, four of values."""
    gates = random(g, 25, 2 * H + 3)[:, : 2 * H], random(g, H), random(g, H)
    return random(g, 25, 4 * D + H * K), *gates, random(g, 6, H, D, K), *stateful_rows(), max_rate, deterministic


def gated_heads(g: torch.Generator, weight: Tensor | None, *, gate_first: bool) -> tuple[Any, ...]:
    return random(g, T, H * D), random(g, T, H * D + 5)[:, : H * D], weight, EPS, D, gate_first


def scanned(g: torch.Generator, *, deterministic: bool) -> tuple[Any, ...]:
    """Four heads in two groups."""
    of_heads = random(g, 25, H + 3)[:, :H], random(g, H), random(g, H), random(g, H)
    return random(g, 25, H * K + 4 * D), *of_heads, random(g, 6, H, D, K), *stateful_rows(), 0.2, 1.5, deterministic
