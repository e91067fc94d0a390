"""Drafting by looking up where the end of a request's history occurred before, and proposing what followed there.

One rule serves two methods: n-gram drafting (prompt lookup, Saxena 2023) is a short `max_match` over the request's own
history; suffix drafting (SuffixDecoding, Oliaro et al. 2024) is a long one, over a memory of past answers as well, with
drafts no longer than the match that speaks for them.
"""

from torch import Tensor

from stepgraph.ops.lookup import cpu
from stepgraph.ops.registry import register

_lookup = register(
    "lookup(Tensor row_slot, Tensor lines, Tensor tokens, Tensor memory, Tensor keys, int num_drafts, int min_match, "
    "int max_match, bool adaptive) -> (Tensor, Tensor, Tensor)",
    {"cpu": cpu.lookup, "cuda": "stepgraph.ops.lookup.triton:lookup"},
)


def lookup(
    row_slot: Tensor,
    lines: Tensor,
    tokens: Tensor,
    memory: Tensor,
    keys: Tensor,
    num_drafts: int,
    min_match: int,
    max_match: int,
    adaptive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft up to K tokens per row. Runs inside the graph.

    H is the slot's history, `tokens[slot, :length]`, its newest token included. A position with at least one token before
    it and one at it, in H or in `memory`, matches as many tokens as, read backwards from before it, equal those read
    backwards from the end of H, at most `max_match`; in H they may overlap the end they are compared with. In `memory` -1
    separates texts: it equals no token and is none, so no match or draft crosses it, nor the ends of the array. Texts of another
    key than the slot's do not match.

    The longest match wins; among equals H before `memory`, then the highest position. The drafts are the tokens from there
    on. A draft that reaches the end of H reads on in itself, i.e. repeats the H[position:] it started with; one from
    `memory` ends with its text.

    Args:
        row_slot: [R] int32.
        lines: [slots, LINE_WIDTH] int32.
        tokens: [slots, max_model_len] int32, contiguous; none negative within a history.
        memory: [M] int32, tokens of past texts and -1 between them; M = 0 for none. See `stepgraph.ops.remember`.
        keys: [M, 2] int32, contiguous; one and the same for all tokens of a text, compared with the line's MEMORY_KEY.
        num_drafts: K, at least 1.
        min_match: rows whose longest match is shorter get no draft; at least 1.
        max_match: longer matches count as this long.
        adaptive: draft at most as many tokens as match.

    Returns:
        drafts [R, K], match_len [R] and count [R], int32. The first `count` drafts of a row are valid, the others 0;
        `count` leaves room for the token that verification adds before `max_length`: at most max_length - length - 1.
        Inactive slots and the null slot have match_len and count 0.
    """
    return _lookup(row_slot, lines, tokens, memory, keys, num_drafts, min_match, max_match, adaptive)
