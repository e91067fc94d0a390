"""Triton kernels of the collectives. See `triton_push` for how ranks reach each other.

One program has a whole row, whatever the number of rows, so that a row has the same bits in any company.

Shapes: N ranks, T tokens, E hidden size, R rows, W columns that a rank computes, V all columns, P programs.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from stepgraph.ops.collectives import mailbox
from stepgraph.ops.collectives.triton_push import (
    FAULT,
    LOOP_BACK,
    REGISTERS,
    clear,
    count_launch,
    num_programs,
    receive,
    send,
    sendable,
    slot_of,
)
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.rms_norm.triton import normalise

_ALL_REDUCE, _ALL_GATHER = tl.constexpr(mailbox.ALL_REDUCE), tl.constexpr(mailbox.ALL_GATHER)
_COLUMNS, _COLUMN_WARPS = 2048, 8
"""Of a piece of a row that is gathered, and of its program. Between two H200s, 1, 64 and 256 rows of 151,936 columns take 2.9, 31
and 120 us; with 4 warps 3.3, 33 and 124, with pieces of 4,096 3.5, 34 and 125."""


@triton.jit
def add_and_normalise(
    sum,
    offset,
    inside,
    residual,
    post_weight,
    weight,
    residual_ptr,
    out_ptr,
    multiplier,
    post_eps,
    eps,
    E: tl.constexpr,
    POST_NORM: tl.constexpr,
    NORM: tl.constexpr,
):
    """What follows the sum of one row, [BLOCK] float32 with zeros beyond E, as `residual`, `post_weight` and `weight` are."""
    if POST_NORM:
        sum = normalise(sum, post_weight, post_eps, E).to(tl.float32)
    updated = (residual.to(tl.float32) + sum * multiplier).to(residual.dtype)
    tl.store(residual_ptr + offset, updated, mask=inside)
    if NORM:
        normed = normalise(updated.to(tl.float32), weight, eps, E)
        tl.store(out_ptr + offset, normed.to(updated.dtype), mask=inside)


@launched
@triton.jit
def _reduce_gathered_kernel(
    parts_ptr,
    residual_ptr,
    out_ptr,
    post_weight_ptr,
    weight_ptr,
    PART_STRIDE,
    count_ptr,
    multiplier,
    post_eps,
    eps,
    N: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    POST_NORM: tl.constexpr,
    NORM: tl.constexpr,
    COUNTED: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < E
    post_weight = tl.load(post_weight_ptr + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    wait_for_previous()
    offset = tl.program_id(0).to(tl.int64) * E + column
    residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
    there = inside
    if COUNTED:
        there = inside & (tl.program_id(0) < tl.load(count_ptr))
    sum = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(N):
        sum += tl.load(parts_ptr + rank * PART_STRIDE + offset, mask=there, other=0.0).to(tl.float32)
    add_and_normalise(
        sum, offset, inside, residual, post_weight, weight, residual_ptr, out_ptr, multiplier, post_eps, eps, E,
        POST_NORM, NORM,
    )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["T", "rank"])
def _all_reduce_add_kernel(
    part_ptr,
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
    SLOT,
    rank,
    time_limit,
    multiplier,
    post_eps,
    eps,
    N: tl.constexpr,
    E: tl.constexpr,
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
    offset = program * E + column
    own_bits = tl.load(part_ptr + offset, mask=inside & (program < T), other=0)
    residual = tl.load(residual_ptr + offset, mask=inside & (program < T), other=0.0)
    epoch = tl.load(state_ptr + 2 * program)
    last_length = tl.load(state_ptr + 2 * program + 1)
    alone = tl.load(flags_ptr + LOOP_BACK) | tl.load(flags_ptr + FAULT)
    turn = epoch % 3
    if alone == 0:
        if program < T:
            send(own_bits, offset, inside, peers, turn, rank, SLOT, N)
        clear(inbox_ptr, (turn + 2) % 3, last_length, rank, SLOT, N)
    post_weight = tl.load(post_weight_ptr + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    gave_up = alone
    for row in range(program, T, P):
        offset = row * E + column
        next_inside = inside & (row + P < T)
        if (alone == 0) & (row + P < T):
            next_bits = tl.load(part_ptr + offset + P * E, mask=inside, other=0)
            send(next_bits, offset + P * E, inside, peers, turn, rank, SLOT, N)
        sum = tl.zeros([BLOCK], tl.float32)
        for sender in tl.static_range(N):
            bits = own_bits
            if (alone == 0) & (sender != rank):
                words = slot_of(inbox_ptr, turn, sender, SLOT, N) + offset
                bits, gave_up = receive(
                    words, inside, gave_up, sender, _ALL_REDUCE, epoch, flags_ptr, host_ptr, time_limit
                )
            sum += bits.to(residual.dtype, bitcast=True).to(tl.float32)
        add_and_normalise(
            sum, offset, inside, residual, post_weight, weight, residual_ptr, out_ptr, multiplier, post_eps, eps, E,
            POST_NORM, NORM,
        )  # fmt: skip
        own_bits = tl.load(part_ptr + offset + P * E, mask=next_inside, other=0)
        residual = tl.load(residual_ptr + offset + P * E, mask=next_inside, other=0.0)
    if alone == 0:
        count_launch(state_ptr, epoch, (T * E).to(tl.int64), MOST_PROGRAMS)


@triton.jit
def _block_of(item, W, BLOCK: tl.constexpr):
    """The row of a piece of a message, its columns, and which of them there are."""
    num_blocks = tl.cdiv(W, BLOCK)
    column = item % num_blocks * BLOCK + tl.arange(0, BLOCK)
    return item // num_blocks, column, column < W


@launched
@triton.jit(do_not_specialize=["R", "rank"])
def _all_gather_columns_kernel(
    part_ptr,
    out_ptr,
    inbox_ptr,
    peers,
    state_ptr,
    flags_ptr,
    host_ptr,
    R,
    W,
    V,
    SLOT,
    rank,
    time_limit,
    N: tl.constexpr,
    MOST_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    wait_for_previous()
    epoch = tl.load(state_ptr + 2 * program)
    last_length = tl.load(state_ptr + 2 * program + 1)
    alone = tl.load(flags_ptr + LOOP_BACK) | tl.load(flags_ptr + FAULT)
    turn = epoch % 3
    P, num_items = tl.num_programs(0), R * tl.cdiv(W, BLOCK)
    row, column, inside = _block_of(program, W, BLOCK)
    own_bits = tl.load(part_ptr + row * W + column, mask=inside & (program < num_items), other=0)
    if alone == 0:
        if program < num_items:
            send(own_bits, row * W + column, inside, peers, turn, rank, SLOT, N)
        clear(inbox_ptr, (turn + 2) % 3, last_length, rank, SLOT, N)
    gave_up = alone
    for item in range(program, num_items, P):
        row, column, inside = _block_of(item, W, BLOCK)
        next_row, next_column, next_inside = _block_of(item + P, W, BLOCK)
        next_bits = tl.load(part_ptr + next_row * W + next_column, mask=next_inside & (item + P < num_items), other=0)
        if (alone == 0) & (item + P < num_items):
            send(next_bits, next_row * W + next_column, next_inside, peers, turn, rank, SLOT, N)
        for sender in tl.static_range(N):
            bits = sendable(own_bits)
            if (alone == 0) & (sender != rank):
                words = slot_of(inbox_ptr, turn, sender, SLOT, N) + row * W + column
                bits, gave_up = receive(
                    words, inside, gave_up, sender, _ALL_GATHER, epoch, flags_ptr, host_ptr, time_limit
                )
            there = sender * W + column
            tl.store(out_ptr + row * V + there, bits, mask=inside & (there < V))
        own_bits = next_bits
    if alone == 0:
        count_launch(state_ptr, epoch, (R * W).to(tl.int64), MOST_PROGRAMS)


def row_options(width: int) -> dict[str, int]:
    """Of kernels in which a program has a row. Nothing is fused: a product is rounded before it is added.

    Between two H200s, sums of 1, 128 and 2,048 rows of 4,096 columns take 3.1, 6.1 and 54 us; with half or twice the warps, as
    long within 4 %."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16), "enable_fp_fusion": False}


def reduce_gathered(
    parts: Tensor,
    residual: Tensor,
    out: Tensor | None,
    multiplier: float,
    post_weight: Tensor | None,
    post_eps: float,
    weight: Tensor | None,
    eps: float,
    count: Tensor | None = None,
) -> None:
    """See `stepgraph.ops.collectives.reduce_gathered`."""
    rows, width = residual.shape
    _reduce_gathered_kernel[(rows,)](
        parts,
        residual,
        residual if out is None else out,
        residual if post_weight is None else post_weight,
        residual if weight is None else weight,
        parts.stride(0),
        residual if count is None else count,
        multiplier,
        post_eps,
        eps,
        N=parts.shape[0],
        E=width,
        POST_NORM=post_weight is not None,
        NORM=weight is not None,
        COUNTED=count is not None,
        **row_options(width),
        **LAUNCH,
    )


def all_reduce_add(
    part: Tensor,
    residual: Tensor,
    out: Tensor | None,
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
    """See `stepgraph.ops.collectives.all_reduce_add`."""
    rows, width = part.shape
    _, num_ranks, slot = inbox.shape
    assert part.numel() <= slot, (part.shape, slot)
    options = row_options(width)
    _all_reduce_add_kernel[(num_programs(state, rows, options["num_warps"]),)](
        part.view(inbox.dtype),
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
        slot,
        rank,
        time_limit_ns,
        multiplier,
        post_eps,
        eps,
        N=num_ranks,
        E=width,
        MOST_PROGRAMS=state.shape[0],
        POST_NORM=post_weight is not None,
        NORM=weight is not None,
        maxnreg=REGISTERS,
        **options,
        **LAUNCH,
    )


def all_gather_columns(
    part: Tensor,
    out: Tensor,
    inbox: Tensor,
    peers: Sequence[int],
    state: Tensor,
    flags: Tensor,
    host: Tensor,
    rank: int,
    time_limit_ns: int,
) -> None:
    """See `stepgraph.ops.collectives.all_gather_columns`."""
    rows, width = part.shape
    _, num_ranks, slot = inbox.shape
    assert part.numel() <= slot, (part.shape, slot)
    pieces = rows * triton.cdiv(width, _COLUMNS)
    _all_gather_columns_kernel[(num_programs(state, pieces, _COLUMN_WARPS),)](
        part.view(inbox.dtype),
        out.view(inbox.dtype),
        inbox,
        tuple(peers),
        state,
        flags,
        host,
        rows,
        width,
        out.shape[1],
        slot,
        rank,
        time_limit_ns,
        N=num_ranks,
        MOST_PROGRAMS=state.shape[0],
        BLOCK=_COLUMNS,
        num_warps=_COLUMN_WARPS,
        maxnreg=REGISTERS,
        **LAUNCH,
    )
