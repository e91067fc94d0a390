"""Triton kernels of the collectives.

Between GPUs, a rank stores what it has straight into the other ranks' inboxes, and polls its own: one way over the link, with no
barrier (the one-shot "Lamport" all-reduce of TensorRT-LLM). A number of -0.0 in an inbox says that none has arrived; one that is
to be sent is replaced by 0.0, which changes no sum that begins with zero.

**Why it is right.** An inbox has three buffers. A launch has an *epoch*, the number of launches before it, and uses the buffer of
its epoch modulo three. All ranks launch the same collectives in the same order, and every launch, whatever it carries and with
however many programs, counts itself once for each program that a launch may have, in device memory: so all programs of all ranks
agree on the epoch, and a graph replayed any number of times keeps count. Launch e

1. sends: stores this rank's numbers into buffer e mod 3 of the other ranks;
2. clears the buffer of launch e - 1 in its own inbox, as far as launch e - 1 was sent (the programs keep its length);
3. receives: polls buffer e mod 3 of its own inbox until no number is -0.0.

Which program stores, clears or polls which word differs from launch to launch. That is no matter, as what must come in order is
apart by whole launches, and kernels of one GPU run one after the other (a dependent launch waits for the end of the one before as
its first act):

- *A buffer is clear before anything arrives in it.* Rank A sends launch e + 2 after its launch e + 1 has ended, which has
  received numbers of launch e + 1 of every other rank B. B sent these after its launch e had ended, which cleared that buffer.
- *Nothing arrives before what was there has been read.* Launch e of B began after its launch e - 1 had read the buffer. The rest
  is as above.
- *What is read was sent in this launch.* Launch e - 3 was the last one that used the buffer; its numbers were cleared by launch
  e - 2.

Clearing goes beyond the length to whole blocks: those words are -0.0 already, and nothing arrives there until launch e + 2. A
launch that carries nothing would receive nothing to wait for, so there is none.

A program sends a piece of the message, and then the next one, before it waits for the first piece of others: what it waits for is
sent by the program of its number on another rank before that one waits for anything later, and no program waits for another one
of its GPU. So a launch ends if all programs run at some time; their number is such that they all fit at once.

**Waiting ends.** Now and then a poll looks at a word in host memory, ABORT, and at the clock. The first program that gives up
sets FAULT and writes a `Record`; others see FAULT, and later launches begin with it, and neither send nor wait.

One program has a whole row, whatever the number of rows, so that a row has the same bits in any company.

Shapes: N ranks, T tokens, E hidden size, R rows, W columns that a rank computes, V all columns, P programs.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import cuda

from stepgraph.ops.collectives import mailbox
from stepgraph.ops.collectives.mailbox import MOST_PROGRAMS_A_MULTIPROCESSOR
from stepgraph.ops.dependent_launch import LAUNCH, wait_for_previous
from stepgraph.ops.launched import launched
from stepgraph.ops.rms_norm.triton import normalise

_ABORT, _RECORD = tl.constexpr(mailbox.ABORT), tl.constexpr(mailbox.RECORD)
_LOOP_BACK, _FAULT = tl.constexpr(mailbox.LOOP_BACK), tl.constexpr(mailbox.FAULT)
_ALL_REDUCE, _ALL_GATHER = tl.constexpr(mailbox.ALL_REDUCE), tl.constexpr(mailbox.ALL_GATHER)
_HAS_CLOCK = tl.constexpr(not knobs.runtime.interpret)
_POLLS = tl.constexpr(8 if knobs.runtime.interpret else 1024)
"""Between two looks at the clock; a poll takes about a microsecond."""
CLEARED_AT_ONCE = 2048
"""Elements; slots of inboxes are multiples of it."""
_CLEARED_AT_ONCE = tl.constexpr(CLEARED_AT_ONCE)
_MOST_PROGRAMS_A_MULTIPROCESSOR = tl.constexpr(MOST_PROGRAMS_A_MULTIPROCESSOR)
_WARPS_A_MULTIPROCESSOR, _REGISTERS = 24, 80
"""That run at once, of so many registers a thread: nearly all there are. With fewer, some would be kept in memory."""
_COLUMNS, _COLUMN_WARPS = 2048, 8
"""Of a piece of a row that is gathered, and of its program. Between two H200s, 1, 64 and 256 rows of 151,936 columns take 2.9, 31
and 120 us; with 4 warps 3.3, 33 and 124, with pieces of 4,096 3.5, 34 and 125."""


@triton.jit
def _empty(bits):
    """What stands for a number that has not arrived: -0.0, the least whole number of its size."""
    return tl.full(bits.shape, -(1 << (bits.dtype.primitive_bitwidth - 1)), bits.dtype)


@triton.jit
def _slot_of(inbox, turn, sender, SLOT, N: tl.constexpr):
    """Where in an inbox the numbers of a sender lie in a turn."""
    return inbox + (turn * N + sender) * SLOT


@triton.jit
def _send(bits, offset, inside, peers, turn, rank, SLOT, N: tl.constexpr):
    """Store numbers at their place in the message in the inboxes of all other ranks."""
    bits = tl.where(bits == _empty(bits), 0, bits)
    for peer in tl.static_range(N):
        if peer != rank:
            inbox = tl.multiple_of(peers[peer].to(tl.pointer_type(bits.dtype)), 16)
            tl.store(_slot_of(inbox, turn, rank, SLOT, N) + offset, bits, mask=inside)


@triton.jit
def _clear(inbox_ptr, turn, length, rank, SLOT, N: tl.constexpr):
    """This program's share of making a turn's messages empty: most of it falls to programs that have nothing to send."""
    empty = _empty(tl.zeros([_CLEARED_AT_ONCE], inbox_ptr.dtype.element_ty))
    first = tl.num_programs(0) - 1 - tl.program_id(0)
    for sender in tl.static_range(N):
        if sender != rank:
            slot = _slot_of(inbox_ptr, turn, sender, SLOT, N)
            for block in range(first, tl.cdiv(length, _CLEARED_AT_ONCE), tl.num_programs(0)):
                tl.store(slot + block * _CLEARED_AT_ONCE + tl.arange(0, _CLEARED_AT_ONCE), empty)


@triton.jit
def _count(state_ptr, epoch, length, MOST_PROGRAMS: tl.constexpr):
    """Note the launch and the length of its messages for this program, and for those which it stands for that have not run."""
    tl.debug_barrier()  # all threads have read them
    program = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, _MOST_PROGRAMS_A_MULTIPROCESSOR)
    there = program < MOST_PROGRAMS
    tl.store(state_ptr + 2 * program, epoch + 1 + tl.zeros_like(program), mask=there)
    tl.store(state_ptr + 2 * program + 1, length + tl.zeros_like(program).to(tl.int64), mask=there)


@triton.jit
def _receive(words, inside, gave_up, sender, COLLECTIVE: tl.constexpr, epoch, flags_ptr, host_ptr, time_limit):
    """Wait for numbers of a sender. Returns their bits, and whether this or an earlier wait was given up."""
    bits = tl.load(words, mask=inside, other=0, volatile=True)
    empty = _empty(bits)
    missing = tl.max((bits == empty).to(tl.int32), axis=0)
    polls = missing * 0
    deadline = epoch * 0
    while (missing != 0) & (gave_up == 0):
        bits = tl.load(words, mask=inside, other=0, volatile=True)
        missing = tl.max((bits == empty).to(tl.int32), axis=0)
        polls += 1
        if (polls % _POLLS == 0) & (missing != 0):
            ends = tl.load(host_ptr + _ABORT, volatile=True) != 0
            ends |= tl.load(flags_ptr + _FAULT, volatile=True) != 0
            if _HAS_CLOCK:
                now = cuda.globaltimer()
                deadline = tl.where(deadline == 0, now + time_limit, deadline)
                ends |= now > deadline
            if ends:
                if tl.atomic_cas(flags_ptr + _FAULT, 0, 1) == 0:
                    tl.store(host_ptr + _RECORD, (epoch << 16) | (COLLECTIVE << 8) | (sender + 1))
                gave_up += 1
    return bits, gave_up


@triton.jit
def _add_and_normalise(
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
    multiplier,
    post_eps,
    eps,
    N: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    POST_NORM: tl.constexpr,
    NORM: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < E
    post_weight = tl.load(post_weight_ptr + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    wait_for_previous()
    offset = tl.program_id(0).to(tl.int64) * E + column
    residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
    sum = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(N):
        sum += tl.load(parts_ptr + rank * PART_STRIDE + offset, mask=inside, other=0.0).to(tl.float32)
    _add_and_normalise(
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
    alone = tl.load(flags_ptr + _LOOP_BACK) | tl.load(flags_ptr + _FAULT)
    turn = epoch % 3
    if alone == 0:
        if program < T:
            _send(own_bits, offset, inside, peers, turn, rank, SLOT, N)
        _clear(inbox_ptr, (turn + 2) % 3, last_length, rank, SLOT, N)
    post_weight = tl.load(post_weight_ptr + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    gave_up = alone
    for row in range(program, T, P):
        offset = row * E + column
        next_inside = inside & (row + P < T)
        if (alone == 0) & (row + P < T):
            next_bits = tl.load(part_ptr + offset + P * E, mask=inside, other=0)
            _send(next_bits, offset + P * E, inside, peers, turn, rank, SLOT, N)
        sum = tl.zeros([BLOCK], tl.float32)
        for sender in tl.static_range(N):
            bits = own_bits
            if (alone == 0) & (sender != rank):
                words = _slot_of(inbox_ptr, turn, sender, SLOT, N) + offset
                bits, gave_up = _receive(
                    words, inside, gave_up, sender, _ALL_REDUCE, epoch, flags_ptr, host_ptr, time_limit
                )
            sum += bits.to(residual.dtype, bitcast=True).to(tl.float32)
        _add_and_normalise(
            sum, offset, inside, residual, post_weight, weight, residual_ptr, out_ptr, multiplier, post_eps, eps, E,
            POST_NORM, NORM,
        )  # fmt: skip
        own_bits = tl.load(part_ptr + offset + P * E, mask=next_inside, other=0)
        residual = tl.load(residual_ptr + offset + P * E, mask=next_inside, other=0.0)
    if alone == 0:
        _count(state_ptr, epoch, (T * E).to(tl.int64), MOST_PROGRAMS)


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
    alone = tl.load(flags_ptr + _LOOP_BACK) | tl.load(flags_ptr + _FAULT)
    turn = epoch % 3
    P, num_items = tl.num_programs(0), R * tl.cdiv(W, BLOCK)
    row, column, inside = _block_of(program, W, BLOCK)
    own_bits = tl.load(part_ptr + row * W + column, mask=inside & (program < num_items), other=0)
    if alone == 0:
        if program < num_items:
            _send(own_bits, row * W + column, inside, peers, turn, rank, SLOT, N)
        _clear(inbox_ptr, (turn + 2) % 3, last_length, rank, SLOT, N)
    gave_up = alone
    for item in range(program, num_items, P):
        row, column, inside = _block_of(item, W, BLOCK)
        next_row, next_column, next_inside = _block_of(item + P, W, BLOCK)
        next_bits = tl.load(part_ptr + next_row * W + next_column, mask=next_inside & (item + P < num_items), other=0)
        if (alone == 0) & (item + P < num_items):
            _send(next_bits, next_row * W + next_column, next_inside, peers, turn, rank, SLOT, N)
        for sender in tl.static_range(N):
            bits = tl.where(own_bits == _empty(own_bits), 0, own_bits)
            if (alone == 0) & (sender != rank):
                words = _slot_of(inbox_ptr, turn, sender, SLOT, N) + row * W + column
                bits, gave_up = _receive(
                    words, inside, gave_up, sender, _ALL_GATHER, epoch, flags_ptr, host_ptr, time_limit
                )
            there = sender * W + column
            tl.store(out_ptr + row * V + there, bits, mask=inside & (there < V))
        own_bits = next_bits
    if alone == 0:
        _count(state_ptr, epoch, (R * W).to(tl.int64), MOST_PROGRAMS)


def _num_programs(state: Tensor, pieces: int, num_warps: int) -> int:
    """Programs of a launch: one on each multiprocessor or more, up to one for each piece of its message, if they all fit."""
    programs = state.shape[0] // MOST_PROGRAMS_A_MULTIPROCESSOR
    return min(
        max(programs, pieces), programs * min(_WARPS_A_MULTIPROCESSOR // num_warps, MOST_PROGRAMS_A_MULTIPROCESSOR)
    )


def _row_options(width: int) -> dict[str, int]:
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
        multiplier,
        post_eps,
        eps,
        N=parts.shape[0],
        E=width,
        POST_NORM=post_weight is not None,
        NORM=weight is not None,
        **_row_options(width),
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
    options = _row_options(width)
    _all_reduce_add_kernel[(_num_programs(state, rows, options["num_warps"]),)](
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
        maxnreg=_REGISTERS,
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
    _all_gather_columns_kernel[(_num_programs(state, pieces, _COLUMN_WARPS),)](
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
        maxnreg=_REGISTERS,
        **LAUNCH,
    )
