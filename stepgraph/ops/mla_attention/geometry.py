"""Static sizes of one launch of `mla_attention`: all that a graph bakes in, none of it dependent on the batch."""

from __future__ import annotations

from stepgraph.ops.attention.geometry import DETERMINISTIC_TILE, KV_BLOCK, UNSPLIT, AttentionGeometry, max_tiles

TALL_TILE = 64
"""Rows of a tile where a row's (token, head) pairs are more than DETERMINISTIC_TILE."""


def mla_geometry(
    num_tokens: int, num_rows: int, num_heads: int, multiprocessors: int, *, deterministic: bool = False
) -> AttentionGeometry:
    """Choose the sizes for a step of `num_tokens` tokens in `num_rows` rows; see `attention_geometry`. All heads are one group,
    whose entries fill a multiprocessor's memory: it holds one program."""
    pairs = -(-num_tokens // num_rows) * num_heads
    tile = DETERMINISTIC_TILE if deterministic or pairs <= DETERMINISTIC_TILE else TALL_TILE
    target = max(1, multiprocessors)
    max_items = max_tiles(num_tokens, num_rows, num_heads, tile) + (0 if deterministic else target)
    return AttentionGeometry(
        tile=tile,
        min_split_keys=UNSPLIT if deterministic else 2 * KV_BLOCK,
        split_target=target,
        max_items=max_items,
        max_partials=0 if deterministic else 2 * target,
        num_programs=min(max_items, target),
        deterministic=deterministic,
    )
