"""`paged_attention` on the CPU: our own kernel for float32, which is deterministic as it is, and `torch_attention`.

That one calls torch's flash attention for rows of equal query length and similar context together, with the query heads of a
group folded into the query dimension so that each key is read once. If it is to be deterministic, it instead calls it once per
tile of queries at fixed positions of their sequence, over keys at fixed positions: all sizes of the call, and a query's place in
it, follow from the query's position.

Shapes: n pieces of a batch, q query length, L keys (padded to the longest piece), G key/value heads, g group, D head size;
M queries of a deterministic tile.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph import native
from stepgraph.ops.attention.geometry import KV_BLOCK

MIN_PIECE = 64
"""Queries of a row that are attended together although their window is smaller."""

TILE_TOKENS = 16
"""Tokens of a deterministic tile; divides KV_BLOCK, so that all queries of a tile see keys up to the same block of keys."""


_paged_attention = native.declare(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor row_slot, Tensor query_start, "
    "Tensor kv_len, float scale, int window, Tensor? sinks=None, float softcap=0.0) -> Tensor"
)


def attention_plan(
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tile: int,
    min_split_keys: int,
    split_target: int,
    max_items: int,
    max_partials: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CPU kernel needs no item list: four empty tensors."""
    empty = [query_start.new_empty(0) for _ in range(4)]
    return empty[0], empty[1], empty[2], empty[3]


class _Piece(NamedTuple):
    """Consecutive queries of one row, and the keys that some of them see."""

    slot: int
    token: int  # the first query, in 0 … T-1
    query_len: int
    first_key: int
    kv_len: int  # keys up to the last query's, those before `first_key` counted

    @property
    def context_len(self) -> int:
        return self.kv_len - self.query_len


class _Scoring(NamedTuple):
    """What becomes of products of queries and keys."""

    scale: float
    softcap: float
    sinks: Tensor | None  # [G, g] float32

    @property
    def is_plain(self) -> bool:
        return self.sinks is None and not self.softcap

    def attend(self, q_nGMD: Tensor, k_nGLD: Tensor, v_nGLD: Tensor, mask: Tensor | None) -> Tensor:
        """[n, G, M, D], the M of all query heads of a group one after the other; `mask` is true where a query sees a key. By
        torch's flash attention or, as that knows neither sinks nor caps, head by head in float32."""
        if self.is_plain:
            return F.scaled_dot_product_attention(q_nGMD, k_nGLD, v_nGLD, attn_mask=mask, scale=self.scale)
        out_nGMD = torch.empty_like(q_nGMD)
        for head in range(q_nGMD.shape[1]):
            score_nML = q_nGMD[:, head].float() @ k_nGLD[:, head].float().mT * self.scale
            if self.softcap:
                score_nML = self.softcap * torch.tanh(score_nML / self.softcap)
            if mask is not None:
                score_nML.masked_fill_(~(mask[:, 0] if mask.ndim == 4 else mask), -torch.inf)
            value_nLD = v_nGLD[:, head].float()
            if self.sinks is not None:  # a key without a value
                sink_M1 = self.sinks[head].repeat_interleave(score_nML.shape[1] // self.sinks.shape[1]).unsqueeze(1)
                score_nML = torch.cat((score_nML, sink_M1.expand(len(score_nML), -1, 1)), 2)
                value_nLD = F.pad(value_nLD, (0, 0, 0, 1))
            out_nGMD[:, head] = score_nML.softmax(-1) @ value_nLD
        return out_nGMD


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    items: Tensor,
    header: Tensor,
    partials: Tensor,
    counters: Tensor,
    scale: float,
    tile: int,
    num_programs: int,
    window: int,
    deterministic: bool,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """See `stepgraph.ops.attention.paged_attention`."""
    operands = q, k_cache, v_cache, block_table, row_slot, query_start, kv_len, scale, window
    if _has_native_kernel(q, k_cache):
        return _paged_attention(*operands, sinks, softcap)
    return torch_attention(*operands, deterministic=deterministic, sinks=sinks, softcap=softcap)


def torch_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int,
    *,
    deterministic: bool,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`paged_attention` by torch's kernels, for any dtype; `v_cache` may be `k_cache`, which is read once then. Reads tensor
    values: opaque to a recording."""
    T, H, D = q.shape
    block_size = k_cache.shape[1]
    scoring = _Scoring(scale, softcap, None if sinks is None else sinks.view(k_cache.shape[2], -1))
    out = q.new_zeros(T, H * D)
    rows = zip(row_slot.tolist(), query_start.tolist(), query_start[1:].tolist(), kv_len.tolist(), strict=False)
    pieces = [piece for row in rows for piece in _pieces(*row, window, deterministic)]
    if deterministic:
        for piece in pieces:
            span = slice(piece.token, piece.token + piece.query_len)
            out[span] = _attend_tile(q[span], piece, k_cache, v_cache, block_table[piece.slot], scoring, window)
        return out
    batches: defaultdict[tuple[int, int], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        num_blocks = -(-piece.kv_len // block_size) - piece.first_key // block_size
        batches[piece.query_len, num_blocks.bit_length()].append(piece)
    for batch in batches.values():
        tokens = [token for piece in batch for token in range(piece.token, piece.token + piece.query_len)]
        if tokens[-1] - tokens[0] + 1 == len(tokens):  # contiguous
            span = slice(tokens[0], tokens[-1] + 1)
            out[span] = _attend_batch(q[span], batch, k_cache, v_cache, block_table, scoring, window)
        else:
            out[tokens] = _attend_batch(q[tokens], batch, k_cache, v_cache, block_table, scoring, window)
    return out


def recorded_attention(q: Tensor, k_cache: Tensor, *others: Any) -> Any:
    """What a recording of `paged_attention` holds: our own kernel, or NotImplemented for the opaque operator."""
    return paged_attention(q, k_cache, *others) if _has_native_kernel(q, k_cache) else NotImplemented


def _has_native_kernel(q: Tensor, k_cache: Tensor) -> bool:
    return q.dtype == k_cache.dtype == torch.float32 and q.shape[2] % native.LANES == 0 and native.available()


def _pieces(slot: int, start: int, end: int, kv_len: int, window: int, deterministic: bool) -> Iterator[_Piece]:
    """Cut a row so that the keys which the queries of a piece do not share are few, or, if deterministic, at positions that
    are multiples of TILE_TOKENS."""
    position = kv_len - (end - start)
    if deterministic:
        most, first_len = TILE_TOKENS, TILE_TOKENS - position % TILE_TOKENS
    else:
        most = first_len = max(window, MIN_PIECE) if window else end - start
    while start < end:
        query_len = min(first_len, end - start)
        first_key = max(0, position - window + 1) if window else 0
        yield _Piece(slot, start, query_len, first_key, position + query_len)
        start, position, first_len = start + query_len, position + query_len, most


def _attend_batch(
    q_n: Tensor,
    pieces: list[_Piece],
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    scoring: _Scoring,
    window: int,
) -> Tensor:
    """Attention of pieces of equal query length: [n · q, H · D]."""
    (H, D), (block_size, G) = q_n.shape[1:], k_cache.shape[1:3]
    query_len = pieces[0].query_len
    # From here on, key 0 of a piece is the first of its first block, less keys that no piece needs.
    first_blocks = [piece.first_key // block_size for piece in pieces]
    skip = min(piece.first_key % block_size for piece in pieces)
    bases = [block * block_size + skip for block in first_blocks]
    lens = [piece.kv_len - base for piece, base in zip(pieces, bases, strict=True)]
    longest = max(lens)
    num_blocks = -(-(longest + skip) // block_size)
    slots = [piece.slot for piece in pieces]
    if any(first_blocks):
        column_nB = torch.tensor(first_blocks).unsqueeze(1) + torch.arange(num_blocks)
        blocks = block_table[torch.tensor(slots).unsqueeze(1), column_nB.clamp_(max=block_table.shape[1] - 1)].flatten()
    else:
        blocks = block_table[slots, :num_blocks].flatten()

    def entries(cache: Tensor) -> Tensor:
        held = cache.index_select(0, blocks).to(q_n.dtype)
        return held.view(len(pieces), num_blocks * block_size, G, D)[:, skip : skip + longest]

    k_nLGD = entries(k_cache)
    v_nLGD = k_nLGD if v_cache is k_cache else entries(v_cache)
    if scoring.is_plain and len(pieces) == 1 and query_len == longest > 1 and (not window or window >= query_len):
        # a whole prompt: half of the scores need not be computed
        q_nHqD = q_n.view(1, query_len, H, D).transpose(1, 2)
        k_nGLD, v_nGLD = k_nLGD.transpose(1, 2), v_nLGD.transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            q_nHqD, k_nGLD, v_nGLD, is_causal=True, scale=scoring.scale, enable_gqa=True
        )
        return attended.transpose(1, 2).reshape(query_len, H * D)
    mask = None
    if len(pieces) > 1 or query_len > 1:
        m_n1 = torch.tensor(lens, dtype=torch.int32).unsqueeze(1)
        key_L = torch.arange(longest, dtype=torch.int32)
        query_position_nq1 = (m_n1 - query_len + torch.arange(query_len, dtype=torch.int32)).unsqueeze(2)
        seen_nqL = key_L <= query_position_nq1
        if window:
            seen_nqL &= key_L > query_position_nq1 - window
        mask = seen_nqL.unsqueeze(1).expand(-1, H // G, -1, -1).reshape(len(pieces), 1, -1, longest)
    if len(pieces) > 1:  # what surrounds a shorter piece's keys may hold anything, and 0 · NaN is NaN
        outside_nL = key_L >= m_n1
        if window:
            first_keys = [piece.first_key - base for piece, base in zip(pieces, bases, strict=True)]
            outside_nL |= key_L < torch.tensor(first_keys).unsqueeze(1)
        k_nLGD.masked_fill_(outside_nL[:, :, None, None], 0)
        v_nLGD.masked_fill_(outside_nL[:, :, None, None], 0)
    q_nqGgD = q_n.view(len(pieces), query_len, G, H // G, D)
    attended = scoring.attend(
        q_nqGgD.permute(0, 2, 3, 1, 4).reshape(len(pieces), G, -1, D),
        k_nLGD.transpose(1, 2),
        v_nLGD.transpose(1, 2),
        mask,
    )
    return attended.view(len(pieces), G, H // G, query_len, D).permute(0, 3, 1, 2, 4).reshape(-1, H * D)


def _attend_tile(
    q_q: Tensor, piece: _Piece, k_cache: Tensor, v_cache: Tensor, table: Tensor, scoring: _Scoring, window: int
) -> Tensor:
    """Attention of one deterministic tile, whose queries that this step lacks are zeros: [q, H · D]."""
    (query_len, H, D), (block_size, G) = q_q.shape, k_cache.shape[1:3]
    offset = piece.context_len % TILE_TOKENS
    tile_start = piece.context_len - offset
    begin = max(0, tile_start - window + 1) // KV_BLOCK * KV_BLOCK if window else 0
    end = (tile_start // KV_BLOCK + 1) * KV_BLOCK

    position_M = torch.arange(tile_start, tile_start + TILE_TOKENS)
    key_L = torch.arange(begin, end)
    seen_ML = key_L <= position_M.unsqueeze(1)
    if window:
        seen_ML &= key_L > position_M.unsqueeze(1) - window
    # A key that no present query sees may hold anything: one that is seen stands in its place, and gets weight 0.
    held_L = key_L.clamp(piece.first_key, piece.kv_len - 1)
    entry_L = table[held_L // block_size].long() * block_size + held_L % block_size

    def entries(cache: Tensor) -> Tensor:
        return cache.view(-1, G, D).index_select(0, entry_L).to(q_q.dtype).transpose(0, 1)

    k_GLD = entries(k_cache)
    v_GLD = k_GLD if v_cache is k_cache else entries(v_cache)
    q_MGgD = q_q.new_zeros(TILE_TOKENS, G, H // G, D)
    q_MGgD[offset : offset + query_len] = q_q.view(query_len, G, H // G, D)
    attended = scoring.attend(
        q_MGgD.permute(1, 2, 0, 3).reshape(1, G, -1, D),
        k_GLD.unsqueeze(0),
        v_GLD.unsqueeze(0),
        seen_ML.repeat(H // G, 1),
    )
    attended = attended.view(G, H // G, TILE_TOKENS, D)[:, :, offset : offset + query_len]
    return attended.permute(2, 0, 1, 3).reshape(query_len, H * D)
