"""Triton kernels that gather the ranks' tokens, and bring the sums of what was made of them back. See `triton_push` for how ranks
reach each other.

A message has a head, and then rows. Padding rows are not sent. The head says how many rows of gathered tokens there are, and for
how many a message has room. Ranks that launch different shapes differ in that, and give up. The head of sums says no more, and is
there to be waited for.

One program has a whole row, whatever the number of rows, so that a row has the same bits in any company.

Shapes: N ranks, T tokens of each, E hidden size, P programs.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.collectives import mailbox
from stepgraph.ops.collectives.triton import add_and_normalise, row_options
from stepgraph.ops.collectives.triton_push import (
    FAULT,
    LOOP_BACK,
    REGISTERS,
    clear,
    count_launch,
    give_up,
    num_programs,
    receive,
    send,
    send_to,
    sendable,
    slot_of,
)
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.rms_norm.triton import normalise

_GATHER_TOKENS, _SCATTER_SUM = tl.constexpr(mailbox.GATHER_TOKENS), tl.constexpr(mailbox.SCATTER_SUM)
_HEAD_LANES = tl.constexpr(32)
"""Of a block that has a head's two numbers first."""


@triton.jit
def _of_piece(count, START, T):
    """How many of so many rows lie in the T rows from START on."""
    return tl.minimum(tl.maximum(count - START, 0), T)


@triton.jit
def _send_head(count, T, peers, turn, rank, SLOT, inbox_ptr, N: tl.constexpr):
    """Store how many rows there are, and for how many there is room, at the head of this rank's messages."""
    lane = tl.arange(0, _HEAD_LANES)
    bits = tl.where(lane == 0, count, T).to(inbox_ptr.dtype.element_ty)
    send(bits, lane, lane < 2, peers, turn, rank, SLOT, N)


@triton.jit
def _receive_head(
    T, inbox_ptr, turn, sender: tl.constexpr, SLOT, gave_up, COLLECTIVE: tl.constexpr, epoch, flags_ptr, host_ptr, time_limit,
    N: tl.constexpr,
):  # fmt: skip
    """Wait for the head of a sender's message. Returns how many rows there are, at most T, and as `receive`."""
    lane = tl.arange(0, _HEAD_LANES)
    words = slot_of(inbox_ptr, turn, sender, SLOT, N) + lane
    bits, gave_up = receive(words, lane < 2, gave_up, sender, COLLECTIVE, epoch, flags_ptr, host_ptr, time_limit)
    numbers = bits.to(tl.int32)
    room = tl.sum(tl.where(lane == 1, numbers, 0), axis=0)
    if (gave_up == 0) & (room != T):
        give_up(sender, COLLECTIVE, epoch, flags_ptr, host_ptr)
        gave_up += 1
    count = tl.sum(tl.where(lane == 0, numbers, 0), axis=0)
    return _of_piece(count, 0, T), gave_up  # also of what was there where waiting was given up


@triton.jit
def _token_bits(x, weight, eps, inbox_ptr, E: tl.constexpr, NORM: tl.constexpr):
    """A row as it is sent, after the norm if there is one."""
    if NORM:
        x = normalise(x.to(tl.float32), weight, eps, E).to(x.dtype)
    return sendable(x.to(inbox_ptr.dtype.element_ty, bitcast=True))


@launched
@triton.jit(do_not_specialize=["T", "START", "rank"])
def _gather_tokens_kernel(
    x_ptr,
    count_ptr,
    weight_ptr,
    out_ptr,
    counts_ptr,
    inbox_ptr,
    peers,
    state_ptr,
    flags_ptr,
    host_ptr,
    T,
    START,
    OUT_STRIDE,
    SLOT,
    rank,
    time_limit,
    eps,
    N: tl.constexpr,
    E: tl.constexpr,
    HEAD: tl.constexpr,
    MOST_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < E
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    wait_for_previous()
    P = tl.num_programs(0)
    offset = program * E + column
    x = tl.load(x_ptr + offset, mask=inside & (program < T), other=0.0)
    count = _of_piece(tl.load(count_ptr), START, T)
    epoch = tl.load(state_ptr + 2 * program)
    last_length = tl.load(state_ptr + 2 * program + 1)
    alone = tl.load(flags_ptr + LOOP_BACK) | tl.load(flags_ptr + FAULT)
    turn = epoch % 3
    own_bits = _token_bits(x, weight, eps, inbox_ptr, E, NORM)
    if alone == 0:
        if program == 0:
            _send_head(count, T, peers, turn, rank, SLOT, inbox_ptr, N)
        if program < count:
            send(own_bits, HEAD + offset, inside, peers, turn, rank, SLOT, N)
        clear(inbox_ptr, (turn + 2) % 3, last_length, rank, SLOT, N)
    gave_up = alone
    counts = ()
    for sender in tl.static_range(N):
        there = count
        if (alone == 0) & (sender != rank):
            there, gave_up = _receive_head(
                T, inbox_ptr, turn, sender, SLOT, gave_up, _GATHER_TOKENS, epoch, flags_ptr, host_ptr, time_limit, N
            )
        counts = counts + (there,)  # noqa: RUF005  # Triton has no other way
        if program == 0:
            before = tl.load(counts_ptr + sender, mask=START > 0, other=0)
            tl.store(counts_ptr + sender, before + there)
    for row in range(program, T, P):
        offset = row * E + column
        x = tl.load(x_ptr + offset + P * E, mask=inside & (row + P < T), other=0.0)
        next_bits = _token_bits(x, weight, eps, inbox_ptr, E, NORM)
        if (alone == 0) & (row + P < count):
            send(next_bits, HEAD + offset + P * E, inside, peers, turn, rank, SLOT, N)
        for sender in tl.static_range(N):
            if (sender == rank) | (row < counts[sender]):
                bits = own_bits
                if (alone == 0) & (sender != rank):
                    words = slot_of(inbox_ptr, turn, sender, SLOT, N) + HEAD + offset
                    bits, gave_up = receive(
                        words, inside, gave_up, sender, _GATHER_TOKENS, epoch, flags_ptr, host_ptr, time_limit
                    )
                tl.store(out_ptr + tl.cast(OUT_STRIDE, tl.int64) * sender + offset, bits, mask=inside)
        own_bits = next_bits
    if alone == 0:
        count_launch(state_ptr, epoch, (HEAD + T * E).to(tl.int64), MOST_PROGRAMS)


@triton.jit
def _send_parts(
    part_ptr, row, column, inside, counts_ptr, peers, turn, rank, T, START, PART_STRIDE, SLOT,
    N: tl.constexpr, E: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Send each other rank the part of its row, if it has so many."""
    offset = row * E + column
    for peer in tl.static_range(N):
        if (peer != rank) & (row < _of_piece(tl.load(counts_ptr + peer), START, T)):
            bits = tl.load(part_ptr + tl.cast(PART_STRIDE, tl.int64) * peer + offset, mask=inside, other=0)
            send_to(peer, bits, HEAD + offset, inside, peers, turn, rank, SLOT, N)


@launched
@triton.jit(do_not_specialize=["T", "START", "rank"])
def _scatter_sum_kernel(
    part_ptr,
    counts_ptr,
    residual_ptr,
    out_ptr,
    post_weight_ptr,
    weight_ptr,
    inbox_ptr,
    peers,
    state_ptr,
    flags_ptr,
    host_ptr,
    T,
    START,
    PART_STRIDE,
    SLOT,
    rank,
    time_limit,
    multiplier,
    post_eps,
    eps,
    N: tl.constexpr,
    E: tl.constexpr,
    HEAD: tl.constexpr,
    MOST_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    POST_NORM: tl.constexpr,
    NORM: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < E
    wait_for_previous()
    P = tl.num_programs(0)
    epoch = tl.load(state_ptr + 2 * program)
    last_length = tl.load(state_ptr + 2 * program + 1)
    alone = tl.load(flags_ptr + LOOP_BACK) | tl.load(flags_ptr + FAULT)
    turn = epoch % 3
    if alone == 0:
        if program == 0:
            _send_head(0, T, peers, turn, rank, SLOT, inbox_ptr, N)
        _send_parts(
            part_ptr, program, column, inside, counts_ptr, peers, turn, rank, T, START, PART_STRIDE, SLOT, N, E, HEAD
        )
    count = _of_piece(tl.load(counts_ptr + rank), START, T)
    own_ptr = part_ptr + tl.cast(PART_STRIDE, tl.int64) * rank
    offset = program * E + column
    own_bits = tl.load(own_ptr + offset, mask=inside & (program < count), other=0)
    residual = tl.load(residual_ptr + offset, mask=inside & (program < T), other=0.0)
    if alone == 0:
        clear(inbox_ptr, (turn + 2) % 3, last_length, rank, SLOT, N)
    post_weight = tl.load(post_weight_ptr + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    gave_up = alone
    if (alone == 0) & (program == 0):
        for sender in tl.static_range(N):
            if sender != rank:
                _, gave_up = _receive_head(
                    T, inbox_ptr, turn, sender, SLOT, gave_up, _SCATTER_SUM, epoch, flags_ptr, host_ptr, time_limit, N
                )
    for row in range(program, T, P):
        offset = row * E + column
        if alone == 0:
            _send_parts(
                part_ptr, row + P, column, inside, counts_ptr, peers, turn, rank, T, START, PART_STRIDE, SLOT, N, E,
                HEAD,
            )  # fmt: skip
        sum = tl.zeros([BLOCK], tl.float32)
        if row < count:
            for sender in tl.static_range(N):
                bits = own_bits
                if (alone == 0) & (sender != rank):
                    words = slot_of(inbox_ptr, turn, sender, SLOT, N) + HEAD + offset
                    bits, gave_up = receive(
                        words, inside, gave_up, sender, _SCATTER_SUM, epoch, flags_ptr, host_ptr, time_limit
                    )
                sum += bits.to(residual.dtype, bitcast=True).to(tl.float32)
        add_and_normalise(
            sum, offset, inside, residual, post_weight, weight, residual_ptr, out_ptr, multiplier, post_eps, eps, E,
            POST_NORM, NORM,
        )  # fmt: skip
        own_bits = tl.load(own_ptr + offset + P * E, mask=inside & (row + P < count), other=0)
        residual = tl.load(residual_ptr + offset + P * E, mask=inside & (row + P < T), other=0.0)
    if alone == 0:
        count_launch(state_ptr, epoch, (HEAD + T * E).to(tl.int64), MOST_PROGRAMS)


def gather_tokens(
    x: Tensor,
    count: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    counts: Tensor,
    start: int,
    inbox: Tensor,
    peers: Sequence[int],
    state: Tensor,
    flags: Tensor,
    host: Tensor,
    rank: int,
    time_limit_ns: int,
) -> None:
    """See `stepgraph.ops.collectives.gather_tokens`."""
    rows, width = x.shape
    _, num_ranks, slot = inbox.shape
    head = mailbox.HEAD_BYTES // inbox.element_size()
    assert head + x.numel() <= slot, (x.shape, slot)
    options = row_options(width)
    _gather_tokens_kernel[(num_programs(state, rows, options["num_warps"]),)](
        x,
        count,
        x if weight is None else weight,
        out.view(inbox.dtype),
        counts,
        inbox,
        tuple(peers),
        state,
        flags,
        host,
        rows,
        start,
        out.stride(0),
        slot,
        rank,
        time_limit_ns,
        eps,
        N=num_ranks,
        E=width,
        HEAD=head,
        MOST_PROGRAMS=state.shape[0],
        NORM=weight is not None,
        maxnreg=REGISTERS,
        **options,
        **LAUNCH,
    )


def scatter_sum(
    part: Tensor,
    counts: Tensor,
    residual: Tensor,
    out: Tensor | None,
    start: int,
    inbox: Tensor,
    peers: Sequence[int],
    state: Tensor,
    flags: Tensor,
    host: Tensor,
    rank: int,
    time_limit_ns: int,
    multiplier: float,
    post_weight: Tensor | None,
    post_eps: float,
    weight: Tensor | None,
    eps: float,
) -> None:
    """See `stepgraph.ops.collectives.scatter_sum`."""
    rows, width = residual.shape
    _, num_ranks, slot = inbox.shape
    head = mailbox.HEAD_BYTES // inbox.element_size()
    assert head + residual.numel() <= slot, (residual.shape, slot)
    options = row_options(width)
    _scatter_sum_kernel[(num_programs(state, rows, options["num_warps"]),)](
        part.view(inbox.dtype),
        counts,
        residual,
        residual if out is None else out,
        residual if post_weight is None else post_weight,
        residual if weight is None else weight,
        inbox,
        tuple(peers),
        state,
        flags,
        host,
        rows,
        start,
        part.stride(0),
        slot,
        rank,
        time_limit_ns,
        multiplier,
        post_eps,
        eps,
        N=num_ranks,
        E=width,
        HEAD=head,
        MOST_PROGRAMS=state.shape[0],
        POST_NORM=post_weight is not None,
        NORM=weight is not None,
        maxnreg=REGISTERS,
        **options,
        **LAUNCH,
    )
