"""What the ranks of one model compute together: the sum of their parts, added to the residual stream; columns put beside each
other; and, where each has tokens of its own, the tokens of all, and the sums of what the ranks make of them.

A sum is one defined value, whatever carries the parts and however many tokens there are: of float32, begun with zero, in the
order of the ranks; it is multiplied, rounded to float32, added to the residual and rounded to float32, then rounded to the
residual's dtype. No two of these are fused. So all ranks hold the same bits, and the same ones with every back end; the norm that
follows sums squares in an order of its own on each platform.

Shapes: N ranks, T tokens, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

from __future__ import annotations

from torch import Tensor

from stepgraph.ops.collectives import cpu, reference
from stepgraph.ops.collectives.mailbox import Mailbox
from stepgraph.ops.registry import Inlined, register

__all__ = ["Mailbox", "all_gather_columns", "all_reduce_add", "gather_tokens", "reduce_gathered", "scatter_sum"]

_reduce_gathered = register(
    "reduce_gathered(Tensor parts, Tensor(a!) residual, Tensor(b!)? out, float multiplier, Tensor? post_weight, "
    "float post_eps, Tensor? weight, float eps, Tensor? count=None) -> ()",
    {"cpu": Inlined(reference.reduce_gathered), "cuda": "stepgraph.ops.collectives.triton:reduce_gathered"},
)
_all_reduce_add = register(
    "all_reduce_add(Tensor part, Tensor(a!) residual, Tensor(b!)? out, Tensor(c!) inbox, int[] peers, Tensor(d!) state, "
    "Tensor(e!) flags, Tensor(f!) host, int rank, int time_limit_ns, float multiplier, Tensor? post_weight, "
    "float post_eps, Tensor? weight, float eps) -> ()",
    {"cpu": cpu.all_reduce_add, "cuda": "stepgraph.ops.collectives.triton:all_reduce_add"},
)
_all_gather_columns = register(
    "all_gather_columns(Tensor part, Tensor(a!) out, Tensor(b!) inbox, int[] peers, Tensor(c!) state, Tensor(d!) flags, "
    "Tensor(e!) host, int rank, int time_limit_ns) -> ()",
    {"cpu": cpu.all_gather_columns, "cuda": "stepgraph.ops.collectives.triton:all_gather_columns"},
)
_gather_tokens = register(
    "gather_tokens(Tensor x, Tensor count, Tensor? weight, float eps, Tensor(a!) out, Tensor(b!) counts, int start, "
    "Tensor(c!) inbox, int[] peers, Tensor(d!) state, Tensor(e!) flags, Tensor(f!) host, int rank, int time_limit_ns) -> ()",
    {"cpu": cpu.gather_tokens, "cuda": "stepgraph.ops.collectives.triton_tokens:gather_tokens"},
)
_scatter_sum = register(
    "scatter_sum(Tensor part, Tensor counts, Tensor(a!) residual, Tensor(b!)? out, int start, Tensor(c!) inbox, int[] peers, "
    "Tensor(d!) state, Tensor(e!) flags, Tensor(f!) host, int rank, int time_limit_ns, float multiplier, Tensor? post_weight, "
    "float post_eps, Tensor? weight, float eps) -> ()",
    {"cpu": cpu.scatter_sum, "cuda": "stepgraph.ops.collectives.triton_tokens:scatter_sum"},
)


def reduce_gathered(
    parts: Tensor,
    residual: Tensor,
    out: Tensor | None,
    multiplier: float = 1.0,
    post_weight: Tensor | None = None,
    post_eps: float = 0.0,
    weight: Tensor | None = None,
    eps: float = 0.0,
    count: Tensor | None = None,
) -> None:
    """Add the sum of all ranks' parts, which are here already, to the residual stream, and normalise the stream. May run inside
    a graph.

    Args:
        parts: [N, T, E] bfloat16, float16 or float32; rows of E are contiguous.
        residual: [T, E], dtype of `parts`, contiguous; updated.
        out: [T, E], likewise, overwritten with the updated residual normalised; None without `weight`.
        multiplier: of the sum.
        post_weight, post_eps: of an RMS norm of the sum before it is multiplied, [E], dtype of `parts` or float32. The
            normalised sum is rounded to the weight's dtype before the product and after it, and not to that of `parts`.
        weight, eps: of the norm of the updated residual, see `stepgraph.ops.rms_norm`.
        count: [] or [1] int32: the sums of rows from there on are 0, whatever their parts; None: all rows count.
    """
    _reduce_gathered(parts, residual, out, multiplier, post_weight, post_eps, weight, eps, count)


def all_reduce_add(
    part: Tensor,
    residual: Tensor,
    out: Tensor | None,
    mailbox: Mailbox,
    rank: int,
    time_limit_ns: int,
    multiplier: float = 1.0,
    post_weight: Tensor | None = None,
    post_eps: float = 0.0,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """`reduce_gathered` of the parts that all ranks have, this one's and those that come through the mailbox. May run inside a
    graph.

    All ranks call the same collectives in the same order. While `mailbox.flags` say LOOP_BACK, or FAULT, nothing is sent and
    nobody is waited for: the other ranks' parts are as this one's. A rank that waits longer than the time limit, or while
    `mailbox.host` says ABORT, sets FAULT and leaves a `Record`; what it computes then is undefined. Likewise one that finds that
    another has called something else; not all that differs is found.

    Args:
        part: [T, E], contiguous, T · E at most a slot of the inbox.
        mailbox: this rank's.
        rank: this rank.
        time_limit_ns: of waiting for one part, in nanoseconds.
        residual, out, multiplier, post_weight, post_eps, weight, eps: see `reduce_gathered`.
    """
    _all_reduce_add(part, residual, out, *mailbox, rank, time_limit_ns, multiplier, post_weight, post_eps, weight, eps)


def all_gather_columns(part: Tensor, out: Tensor, mailbox: Mailbox, rank: int, time_limit_ns: int) -> None:
    """Put the columns that the ranks have beside each other; in place of -0.0 they may have 0.0, and then on all ranks.
    Otherwise as `all_reduce_add`.

    Args:
        part: [R, W], contiguous, R · W at most a slot of the inbox.
        out: [R, V], W · (N - 1) < V ≤ W · N, dtype of `part`, contiguous, overwritten with the first V columns of all.
        mailbox, rank, time_limit_ns: see `all_reduce_add`.
    """
    _all_gather_columns(part, out, *mailbox, rank, time_limit_ns)


def gather_tokens(
    x: Tensor,
    count: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    counts: Tensor,
    start: int,
    mailbox: Mailbox,
    rank: int,
    time_limit_ns: int,
) -> None:
    """Put the tokens of all ranks one after another, normalised; in place of -0.0 they have 0.0. Otherwise as `all_reduce_add`.

    More tokens than fit into a message are gathered by several calls, with ever greater `start`.

    Args:
        x: [T, E] bfloat16, float16 or float32, contiguous: T rows of this rank from row `start` on; at most `mailbox.MOST_ROWS`.
            HEAD_BYTES and they fit into a slot of the inbox.
        count: [1] int32: so many of this rank's rows are tokens, those from `start` on and those before. The others are padding.
        weight, eps: of an RMS norm of the tokens, [E]; None: they stay as they are.
        out: [N, T, E], dtype of `x`, rows of E contiguous; all rows of this rank are overwritten, and of others the tokens. What
            their other rows hold is left open.
        counts: [N] int32, overwritten with the counts of all ranks, each at most `start` + T.
        start: the first of the rows.
        mailbox, rank, time_limit_ns: see `all_reduce_add`.
    """
    _gather_tokens(x, count, weight, eps, out, counts, start, *mailbox, rank, time_limit_ns)


def scatter_sum(
    part: Tensor,
    counts: Tensor,
    residual: Tensor,
    out: Tensor | None,
    start: int,
    mailbox: Mailbox,
    rank: int,
    time_limit_ns: int,
    multiplier: float = 1.0,
    post_weight: Tensor | None = None,
    post_eps: float = 0.0,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """`reduce_gathered` of what all ranks made of this one's tokens; others get the sums for theirs. Otherwise as
    `all_reduce_add`.

    Args:
        part: [N, T, E], rows of E contiguous: what this rank made of T rows of each, from row `start` on. Padding is not read.
        counts: [N] int32: so many rows of each rank are tokens, as `gather_tokens` tells. Sums of others are 0.
        start: the first of the rows.
        mailbox, rank, time_limit_ns: see `all_reduce_add`. A slot has room for HEAD_BYTES and T rows; on a CPU, N · T rows.
        residual, out, multiplier, post_weight, post_eps, weight, eps: see `reduce_gathered`; of the T rows of this rank.
    """
    _scatter_sum(
        part,
        counts,
        residual,
        out,
        start,
        *mailbox,
        rank,
        time_limit_ns,
        multiplier,
        post_weight,
        post_eps,
        weight,
        eps,
    )
