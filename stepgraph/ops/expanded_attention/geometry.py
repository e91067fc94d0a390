"""Static sizes of one launch of `expanded_attention`: all that a graph bakes in, none of it dependent on the batch."""

from __future__ import annotations

from stepgraph.ops.attention.geometry import UNSPLIT, AttentionGeometry, max_tiles

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
