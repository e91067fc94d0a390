"""Paged causal attention over any composition of rows, in one launch of a constant grid.

Query lengths from 1 to T mix freely. `attention_plan` lists, on the device and once per step, the pieces of work this
batch has; `paged_attention` runs a fixed number of programs that loop over the list, once per layer. The list, the grid and
the buffers of partial results are sized by `AttentionGeometry`, which depends on the StepShape only.

There are three kinds of tiles on CUDA. Those of 16 rows are for steps of few queries a row, which wait for memory. Those of 64
(`stepgraph.ops.attention.triton`) serve every GPU, dtype and window. Those of 128
(`stepgraph.ops.attention.hopper`) are for what `tall_tile` lists, where they take a prompt of 2048 tokens in 0.6 of the time.

Source of the split and its combination: Dao et al., "Flash-Decoding" (2023); online softmax: Milakov and Gimelshein (2018).
"""

from typing import NamedTuple

from torch import Tensor

from stepgraph.ops.attention import cpu
from stepgraph.ops.attention.geometry import AttentionGeometry, attention_geometry, max_tiles, tall_tile
from stepgraph.ops.registry import Inlined, register

__all__ = [
    "AttentionGeometry",
    "AttentionPlan",
    "attention_geometry",
    "attention_plan",
    "max_tiles",
    "paged_attention",
    "tall_tile",
]


class AttentionPlan(NamedTuple):
    """The work of one step's attention; shared by all layers of one window, which run one after the other.

    On CPU all four are empty: the CPU kernel reads the row arrays directly, as an opaque operator may.
    """

    items: Tensor  # [max_items, ITEM_SIZE] int32: slot, first token, query length and keys of the row, tile within the
    # row, KV split, first partial of the tile or -1 if unsplit
    header: Tensor  # [2] int32: number of items, keys per KV split
    partials: Tensor  # [max_partials, G, tile, D + 2] float32 scratch: unnormalised output, row maximum, row sum
    # Zero before and after each layer: splits that are done of the tile whose first partial it is. Of a tile of HOPPER_TILE, its
    # first half's splits; those of its second half are counted in the next one.
    counters: Tensor  # [max_partials, G] int32 scratch


_attention_plan = register(
    "attention_plan(Tensor row_slot, Tensor query_start, Tensor kv_len, int num_heads, int num_kv_heads, int head_dim, int tile, "
    "int min_split_keys, int split_target, int max_items, int max_partials, int window) -> (Tensor, Tensor, Tensor, Tensor)",
    {"cpu": cpu.attention_plan, "cuda": "stepgraph.ops.attention.plan_triton:attention_plan"},
)


def attention_plan(
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    geometry: AttentionGeometry,
    window: int = 0,
) -> AttentionPlan:
    """List the attention work of a batch. Runs inside the graph.

    Row r has ``tiles_r = ceil(query_len_r · group / tile)`` tiles, or none if it has no keys. Each reads at most ``span_r`` keys:
    ``kv_len_r`` of them, or, under a window, the fewer of

    - the row's keys from ``context_len_r - window + 1`` (rounded down to KV_BLOCK) on, and
    - ``window`` keys for the tile's first token, one for each later token of a tile, and what rounding its start adds.

    With W = Σ tiles_r · span_r, an even share of the work is ``ceil(W / split_target)`` keys. KV is split every so many keys,
    rounded up to KV_BLOCK and `min_split_keys` at least, counted from the first that the tile reads. Where there are fewer tiles
    than `split_target`, splits are longer: by the least of some steps with which there are not more items either, since whoever
    does two of them would be done last. Then they are as short as the same number of each row's allows. Row r contributes
    ``tiles_r · ceil(span_r / split)`` items (rows of query length 0: none); items whose keys lie wholly after their tile's last
    query exit early. Since Σ tiles_r · span_r / split ≤ split_target, there are at most
    ``max_tiles + split_target`` items, and at most ``2 · split_target`` of split rows. A `min_split_keys` above every
    `kv_len` leaves ``max_tiles`` items and none of split rows.

    Args:
        row_slot: [R] int32.
        query_start: [R + 1] int32.
        kv_len: [R] int32, keys of each row, this step's included.
        num_heads, num_kv_heads, head_dim: of the model.
        geometry: sizes for this StepShape.
        window: of the layers that use the plan: a token sees its last `window` keys, its own included; 0: all.
    """
    return AttentionPlan(
        *_attention_plan(
            row_slot,
            query_start,
            kv_len,
            num_heads,
            num_kv_heads,
            head_dim,
            geometry.tile,
            geometry.min_split_keys,
            geometry.split_target,
            geometry.max_items,
            geometry.max_partials,
            window,
        )
    )


_paged_attention = register(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor row_slot, Tensor query_start, "
    "Tensor kv_len, Tensor items, Tensor header, Tensor(a!) partials, Tensor(b!) counters, float scale, int tile, "
    "int num_programs, int window, bool deterministic, Tensor? sinks=None, float softcap=0.0) -> Tensor",
    {
        "cpu": Inlined(cpu.paged_attention, recorded=cpu.recorded_attention),
        "cuda": "stepgraph.ops.attention.triton:paged_attention",
    },
)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    plan: AttentionPlan,
    geometry: AttentionGeometry,
    scale: float,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of every row's queries over its cached keys. Runs inside the graph.

    Token j of row r (query length n, kv_len m) is at position p = ``m - n + j`` and sees keys ``max(0, p - window + 1)`` … p,
    or 0 … p without a window. Each group of H/G consecutive query heads shares one key/value head. Softmax and accumulation
    are in float32. Keys outside a row's `kv_len`, and those before its first token's window, may hold anything, NaN included,
    and their blocks may belong to others.

    With a deterministic geometry, a token's result depends, bit for bit, on its query and the keys and values it sees only.
    On CUDA: one tile height; no splits; keys in blocks at multiples of a fixed size; one masked loop, in which a block that
    a query sees nothing of leaves its maximum, sum and output as they are; and rows of a tensor-core product do not depend
    on each other or on their place in the tile. On CPU: see `stepgraph.ops.attention.cpu`.

    Args:
        q: [T, H, D], contiguous.
        k_cache, v_cache: [blocks, B, G, D] in the dtype of `q` or torch.float8_e4m3fn, whose values are taken as they are;
            this step's keys and values already written.
        block_table: [slots, max blocks] int32; entries of blocks before a row's window are not followed.
        row_slot, kv_len: [R] int32.
        query_start: [R + 1] int32.
        plan: this step's `attention_plan` for the same window; its scratch buffers are written.
        geometry: as given to `attention_plan`.
        scale: multiplies q·k.
        window: a token sees its last `window` keys, its own included; 0: all.
        sinks: [H] float32, a score of each head that every softmax has beside those of keys, and that no value belongs to;
            None: there are none. Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).
        softcap: scores s become ``softcap · tanh(s / softcap)`` before keys are masked; 0: they stay. Source: Gemma Team, "Gemma
            2" (2024).

    Returns:
        [T, H·D], dtype of `q`. Padding tokens get unspecified values.
    """
    return _paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        row_slot,
        query_start,
        kv_len,
        plan.items,
        plan.header,
        plan.partials,
        plan.counters,
        scale,
        geometry.tile,
        geometry.num_programs,
        window,
        geometry.deterministic,
        sinks,
        softcap,
    )
