"""Static sizes of one attention launch: all that a graph bakes in, none of it dependent on the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache

import numpy as np
import torch

from stepgraph.platforms.tuning import DEFAULT, KernelTuning

KV_BLOCK = 64
"""Keys one inner iteration of the attention kernel reads; KV splits are multiples of it."""

ITEM_SIZE = 8
"""Numbers of an item, one of them unused, so that it lies within one 32-byte sector of memory."""

TALL_TILE = 64
"""Rows of a tile of longer queries, wherever a kernel runs."""
HOPPER_TILE = 128
"""Rows of a tile of `stepgraph.ops.attention.hopper`, which see there."""

UNSPLIT = 1 << 30
"""As `min_split_keys`: more keys than any context has, so that no row is split."""

DETERMINISTIC_TILE = 16
"""Such tiles go through one masked loop over their keys, whatever they hold; taller ones also through an unmasked loop, of
which nobody promises that it is compiled to the same arithmetic."""


class Occupancy(Enum):
    """How many units of work there are at least, compared with what the machine runs at once."""

    LOW = auto()  # one or two rows: most multiprocessors have none
    MEDIUM = auto()
    HIGH = auto()


def occupancy(num_rows: int, num_kv_heads: int, deterministic: bool) -> Occupancy:
    """Of a step with so many rows. If deterministic, it is the same for all: kernels are chosen by it."""
    units = num_rows * num_kv_heads
    if deterministic or 16 < units < 256:
        return Occupancy.MEDIUM
    return Occupancy.LOW if units <= 16 else Occupancy.HIGH


@dataclass(frozen=True)
class AttentionGeometry:
    """Sizes of the attention launch at one StepShape.

    A *tile* is `tile` consecutive (token, query head of one group) pairs of one row; an *item* is one tile against one KV
    range; a unit of work is an item for one KV head.
    """

    tile: int  # rows of (token, query head) pairs per tile
    min_split_keys: int  # a KV split has at least so many keys; a multiple of KV_BLOCK
    split_target: int  # items per KV head that fill the machine once; long rows are split over KV until they do
    max_items: int  # bound on the item list
    max_partials: int  # bound on the items of split tiles, which keep a partial result until the last of them combines
    num_programs: int  # the constant grid; each program loops over units of work
    is_one_row: bool = False  # and all of its tokens lie in one tile
    deterministic: bool = False  # a token's result has the same bits in every batch, chunk of its prompt and StepShape
    own: AttentionGeometry | None = (
        None  # of `expanded_attention` to this step's own keys; this launch is then for older ones alone
    )


@lru_cache(maxsize=4096)
def max_tiles(num_tokens: int, num_rows: int, group: int, tile: int) -> int:
    """Most query tiles that any batch of `num_tokens` tokens in at most `num_rows` rows can need.

    The maximum of Σ ceil(n_i · group / tile) over all n_i ≥ 1 with Σ n_i = num_tokens, at most num_rows of them. It is
    exact: every row's first tile costs one token; a row's further tiles cost floor(k · tile / group) tokens for k of
    them, which repeats with period ``group`` (in lowest terms), so a knapsack over one period per row plus whole periods
    finds the best split.

    >>> max_tiles(160, 2, group=5, tile=64)
    14
    """
    rows = min(num_rows, num_tokens)
    if rows <= 0:
        return 0
    spare = num_tokens - rows
    divisor = math.gcd(group, tile)
    group, tile = group // divisor, tile // divisor
    costs = [k * tile // group for k in range(1, group)]
    most = np.zeros(
        spare + 1, dtype=np.int64
    )  # extra tiles that `index` spare tokens buy with less than a period per row
    for _ in range(rows if costs else 0):
        better = most.copy()
        for k, cost in enumerate(costs, start=1):
            if cost <= spare:
                np.maximum(better[cost:], most[: spare + 1 - cost] + k, out=better[cost:])
        if np.array_equal(better, most):
            break
        most = better
    whole_periods = np.arange(0, spare // tile + 1)
    return rows + int((most[spare - whole_periods * tile] + whole_periods * group).max())


def tall_tile(
    tuning: KernelTuning,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    windows: Iterable[int],
    plain_scores: bool,
) -> int:
    """Rows of the tiles of longer queries: HOPPER_TILE where the kernel for them serves, else TALL_TILE.

    That is a Hopper GPU, under a Triton that has its Gluon; activations of 16 bits and a cache of the same; heads of 64 or
    128; blocks of 8 tokens at least, which is what shared memory is arranged by; and no sliding window, sink or cap, for one
    geometry serves all layers.

    Args:
        tuning: of the platform.
        dtype: of the activations.
        cache_dtype: of the keys and values.
        head_dim: numbers of a head.
        block_size: tokens per KV block.
        windows: of the layers; 0: full attention.
        plain_scores: all layers take the softmax of products, neither capped nor beside sinks.
    """
    serves = (
        tuning.hopper_attention
        and dtype in (torch.bfloat16, torch.float16)
        and cache_dtype == dtype
        and head_dim in (64, 128)
        and block_size % 8 == 0
        and not any(windows)
        and plain_scores
    )
    if not serves:
        return TALL_TILE
    try:
        from stepgraph.ops.attention import hopper  # noqa: F401
    except (ImportError, AttributeError):  # Gluon is experimental: another release may name things otherwise
        return TALL_TILE
    return HOPPER_TILE


def attention_geometry(
    num_tokens: int,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    multiprocessors: int,
    *,
    head_dim: int = 128,
    decode_tokens: int = 1,
    deterministic: bool = False,
    tall_tile: int = TALL_TILE,
    tuning: KernelTuning = DEFAULT,
) -> AttentionGeometry:
    """Choose the sizes for a step of `num_tokens` tokens in `num_rows` rows.

    A row that decodes has up to `decode_tokens` tokens. `tall_tile` is what the function of that name says, for steps whose rows
    have more than a few queries. `head_dim` is the numbers of a head; `multiprocessors` and `tuning` are the platform's.

    Splitting adds at most ``target`` items to the tiles, and at most ``2 · target`` of all items belong to a split tile
    (see `attention_plan`), which bounds the item list and the partial results whatever the batch.

    A deterministic geometry has one tile height for all shapes and never splits: what a split ends on, and so the order of
    additions, would depend on the other rows.
    """
    group = num_heads // num_kv_heads
    longest_prompt = num_tokens - num_rows * decode_tokens
    small = num_tokens * group <= 16 * num_rows and longest_prompt <= tuning.max_prompt_of_small_tiles
    if deterministic:
        tile = DETERMINISTIC_TILE
    elif small:
        tile = 16
    else:
        tile = tall_tile if num_tokens >= tuning.hopper_min_tokens else TALL_TILE
    busy = occupancy(num_rows, num_kv_heads, deterministic)
    is_one_row = num_rows == 1 and small and not deterministic
    if tile == HOPPER_TILE or is_one_row:  # both kernels keep so much that a multiprocessor holds one program
        resident = multiprocessors
    else:
        resident = multiprocessors * (4 if tile == 16 and busy is not Occupancy.LOW else 2)
    target = max(1, resident // num_kv_heads - is_one_row)
    max_items = max_tiles(num_tokens, num_rows, group, tile) + (0 if deterministic else target)
    min_split_keys = tuning.min_split_keys if tile == 16 else tuning.min_split_keys_tall
    if tile == 16 and busy is Occupancy.LOW:
        min_split_keys = min(min_split_keys, KV_BLOCK * max(1, 256 // head_dim))
    return AttentionGeometry(
        tile=tile,
        min_split_keys=UNSPLIT if deterministic else min_split_keys,
        split_target=target,
        max_items=max_items,
        max_partials=0 if deterministic else 2 * target,
        num_programs=min(max_items * num_kv_heads, resident),
        is_one_row=is_one_row,
        deterministic=deterministic,
    )
