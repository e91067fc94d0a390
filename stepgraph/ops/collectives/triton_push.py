"""What Triton kernels that push are made of.

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

Clearing goes beyond the length to whole blocks: those words are -0.0 already, and nothing arrives there until launch e + 2.

A launch in which a rank received nothing of another one would not wait for it, and what it sends next could come too early. So
each sends every other one a number at least: where rows may all be padding, which is not sent, messages have a head.

A program sends a piece of the message, and then the next one, before it waits for the first piece of others: what it waits for is
sent by the program of its number on another rank before that one waits for anything later, and no program waits for another one
of its GPU. So a launch ends if all programs run at some time; their number is such that they all fit at once.

**Waiting ends.** Now and then a poll looks at a word in host memory, ABORT, and at the clock. The first program that gives up
sets FAULT and writes a `Record`; others see FAULT, and later launches begin with it, and neither send nor wait.

Shapes: N ranks, P programs.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import cuda

from stepgraph.ops.collectives import mailbox
from stepgraph.ops.collectives.mailbox import MOST_PROGRAMS_A_MULTIPROCESSOR

_ABORT, _RECORD = tl.constexpr(mailbox.ABORT), tl.constexpr(mailbox.RECORD)
LOOP_BACK, FAULT = tl.constexpr(mailbox.LOOP_BACK), tl.constexpr(mailbox.FAULT)
_HAS_CLOCK = tl.constexpr(not knobs.runtime.interpret)
_POLLS = tl.constexpr(8 if knobs.runtime.interpret else 1024)
"""Between two looks at the clock; a poll takes about a microsecond."""
CLEARED_AT_ONCE = 2048
"""Elements; slots of inboxes are multiples of it."""
_CLEARED_AT_ONCE = tl.constexpr(CLEARED_AT_ONCE)
_MOST_PROGRAMS_A_MULTIPROCESSOR = tl.constexpr(MOST_PROGRAMS_A_MULTIPROCESSOR)
_WARPS_A_MULTIPROCESSOR, REGISTERS = 24, 80
"""That run at once, of so many registers a thread: nearly all there are. With fewer, some would be kept in memory."""


@triton.jit
def _empty(bits):
    """What stands for a number that has not arrived: -0.0, the least whole number of its size."""
    return tl.full(bits.shape, -(1 << (bits.dtype.primitive_bitwidth - 1)), bits.dtype)


@triton.jit
def slot_of(inbox, turn, sender, SLOT, N: tl.constexpr):
    """Where in an inbox the numbers of a sender lie in a turn."""
    return inbox + (turn * N + sender) * SLOT


@triton.jit
def sendable(bits):
    """Numbers as they are sent: 0.0 for -0.0."""
    return tl.where(bits == _empty(bits), 0, bits)


@triton.jit
def send_to(peer: tl.constexpr, bits, offset, inside, peers, turn, rank, SLOT, N: tl.constexpr):
    """Store numbers at their place in the message in another rank's inbox."""
    inbox = tl.multiple_of(peers[peer].to(tl.pointer_type(bits.dtype)), 16)
    tl.store(slot_of(inbox, turn, rank, SLOT, N) + offset, sendable(bits), mask=inside)


@triton.jit
def send(bits, offset, inside, peers, turn, rank, SLOT, N: tl.constexpr):
    """Store numbers at their place in the message in the inboxes of all other ranks."""
    for peer in tl.static_range(N):
        if peer != rank:
            send_to(peer, bits, offset, inside, peers, turn, rank, SLOT, N)


@triton.jit
def clear(inbox_ptr, turn, length, rank, SLOT, N: tl.constexpr):
    """This program's share of making a turn's messages empty: most of it falls to programs that have nothing to send."""
    empty = _empty(tl.zeros([_CLEARED_AT_ONCE], inbox_ptr.dtype.element_ty))
    first = tl.num_programs(0) - 1 - tl.program_id(0)
    for sender in tl.static_range(N):
        if sender != rank:
            slot = slot_of(inbox_ptr, turn, sender, SLOT, N)
            for block in range(first, tl.cdiv(length, _CLEARED_AT_ONCE), tl.num_programs(0)):
                tl.store(slot + block * _CLEARED_AT_ONCE + tl.arange(0, _CLEARED_AT_ONCE), empty)


@triton.jit
def count_launch(state_ptr, epoch, length, MOST_PROGRAMS: tl.constexpr):
    """Note the launch and the length of its messages for this program, and for those which it stands for that have not run."""
    tl.debug_barrier()  # all threads have read them
    program = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, _MOST_PROGRAMS_A_MULTIPROCESSOR)
    there = program < MOST_PROGRAMS
    tl.store(state_ptr + 2 * program, epoch + 1 + tl.zeros_like(program), mask=there)
    tl.store(state_ptr + 2 * program + 1, length + tl.zeros_like(program).to(tl.int64), mask=there)


@triton.jit
def give_up(sender, COLLECTIVE: tl.constexpr, epoch, flags_ptr, host_ptr):
    """Have all collectives given up; the first program that does leaves a record of the sender."""
    if tl.atomic_cas(flags_ptr + FAULT, 0, 1) == 0:
        tl.store(host_ptr + _RECORD, (epoch << 16) | (COLLECTIVE << 8) | (sender + 1))


@triton.jit
def receive(words, inside, gave_up, sender, COLLECTIVE: tl.constexpr, epoch, flags_ptr, host_ptr, time_limit):
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
            ends |= tl.load(flags_ptr + FAULT, volatile=True) != 0
            if _HAS_CLOCK:
                now = cuda.globaltimer()
                deadline = tl.where(deadline == 0, now + time_limit, deadline)
                ends |= now > deadline
            if ends:
                give_up(sender, COLLECTIVE, epoch, flags_ptr, host_ptr)
                gave_up += 1
    return bits, gave_up


def num_programs(state: Tensor, pieces: int, num_warps: int) -> int:
    """Programs of a launch: one on each multiprocessor or more, up to one for each piece of its message, if they all fit."""
    programs = state.shape[0] // MOST_PROGRAMS_A_MULTIPROCESSOR
    return min(
        max(programs, pieces), programs * min(_WARPS_A_MULTIPROCESSOR // num_warps, MOST_PROGRAMS_A_MULTIPROCESSOR)
    )
