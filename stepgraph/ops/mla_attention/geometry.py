"""Static sizes of one launch of `mla_attention`: all that a graph bakes in, none of it dependent on the batch."""

from __future__ import annotations

import torch

from stepgraph.ops.attention.geometry import DETERMINISTIC_TILE, UNSPLIT, AttentionGeometry, max_tiles
from stepgraph.platforms.tuning import DEFAULT, KernelTuning

TALL_TILE = 64
"""Rows of the tallest tiles."""


def programs_of(tile: int, tuning: KernelTuning) -> int:
    """How many programs with tiles of this height a multiprocessor holds: entries and outputs of more pairs fill it."""
    return 2 if tile == DETERMINISTIC_TILE and not tuning.latent_wide_keys else 1


def mla_geometry(
    num_tokens: int,
    num_rows: int,
    num_heads: int,
    multiprocessors: int,
    *,
    deterministic: bool = False,
    tuning: KernelTuning = DEFAULT,
) -> AttentionGeometry:
    """Choose the sizes for a step of `num_tokens` tokens in `num_rows` rows; see `attention_geometry`.

    All heads are one group. So the tiles of a row are few where it has one token, and each of them reads all of its entries: they
    are as tall as an average row needs, up to what the platform's kernels can do.
    """
    pairs = -(-num_tokens // num_rows) * num_heads
    tile = DETERMINISTIC_TILE
    while not deterministic and tile < min(pairs, tuning.latent_tall_tile):
        tile *= 2
    target = max(1, multiprocessors * programs_of(tile, tuning))
    max_items = max_tiles(num_tokens, num_rows, num_heads, tile) + (0 if deterministic else target)
    return AttentionGeometry(
        tile=tile,
        min_split_keys=UNSPLIT if deterministic else tuning.min_split_keys_latent,
        split_target=target,
        max_items=max_items,
        max_partials=0 if deterministic else 2 * target,
        num_programs=min(max_items, target),
        deterministic=deterministic,
    )


def hopper_serves(
    tuning: KernelTuning,
    tile: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    entry_size: int,
    value_dim: int,
    block_size: int,
) -> bool:
    """Whether `stepgraph.ops.mla_attention.hopper` does a plan's items, or the kernel for any GPU does.

    It is for tiles of TALL_TILE; a Hopper GPU, under a Triton that has its Gluon; activations of 16 bits and a cache of the
    same; entries of 512 + 64, as all of DeepSeek's have; and blocks of 8 tokens at least, which is what shared memory is arranged
    by.

    Args:
        tuning: of the platform.
        tile: rows of the plan's tiles.
        dtype: of the activations.
        cache_dtype: of the entries.
        entry_size: numbers of an entry.
        value_dim: of its part that is the value.
        block_size: tokens per block of the cache.
    """
    serves = (
        tuning.hopper_mla
        and tile == TALL_TILE
        and dtype in (torch.bfloat16, torch.float16)
        and cache_dtype == dtype
        and (entry_size, value_dim) == (576, 512)
        and block_size % 8 == 0
    )
    if not serves:
        return False
    try:
        from stepgraph.ops.mla_attention import hopper  # noqa: F401
    except (ImportError, AttributeError):  # Gluon is experimental: another release may name things otherwise
        return False
    return True
