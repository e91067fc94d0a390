"""Collectives on a CPU: ranks are processes that share memory.

A rank has a line of that memory, in which it alone writes: how many parts it has posted, and two buffers, for parts of even and
of odd numbers, and what lies in each, so that ranks that do not call the same collective notice it. It puts its part into a
buffer, counts it as posted, waits until all have posted as many, and reads their buffers. A buffer is written again two
collectives later. By then every other rank has posted the collective between the two, which it does after it has read this one;
and this rank has waited for that.

The count must become visible after the part, and the part be read after the count, on processors that reorder memory accesses
too: see `order_memory`.

Shapes: N ranks, T tokens, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepgraph.ops.collectives import reference
from stepgraph.ops.collectives.mailbox import (
    ABORT,
    ALL_GATHER,
    ALL_REDUCE,
    FAULT,
    GATHER_TOKENS,
    HEAD_BYTES,
    RECORD,
    SCATTER_SUM,
    Record,
)

HEADER = 64
"""Bytes before a line's two buffers, a cache line; the count of posted parts is the first eight, and those after say of both
buffers what was put there: its length in bytes, times 256, and the collective."""
_YIELDS = 100
"""Polls that only let others run, before a rank sleeps between polls."""
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 1e-3


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
    parts_NTE = _gathered(part, inbox, state, flags, host, rank, time_limit_ns, collective=ALL_REDUCE)
    reference.reduce_gathered(parts_NTE, residual, out, multiplier, post_weight, post_eps, weight, eps)


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
    reference.gather_columns(
        _gathered(part, inbox, state, flags, host, rank, time_limit_ns, collective=ALL_GATHER), out
    )


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
    rows = x.shape[0]
    own_TE = reference.tokens(x, weight, eps)
    [own_count] = _words(count, ctypes.c_int32, 1)
    head = count.new_full((HEAD_BYTES // count.element_size(),), min(max(own_count - start, 0), rows))
    message = torch.cat([head.view(torch.uint8), own_TE.view(torch.uint8).flatten()])
    messages = _gathered(message, inbox, state, flags, host, rank, time_limit_ns, collective=GATHER_TOKENS)
    found_NTE = messages[:, HEAD_BYTES:].view(x.dtype).unflatten(1, x.shape)
    for sender, found in enumerate(messages[:, : count.element_size()].view(torch.int32).flatten().tolist()):
        there = min(max(found, 0), rows)  # also what was there where waiting was given up
        if sender == rank:
            out[sender].copy_(own_TE)
        else:
            out[sender, :there].copy_(found_NTE[sender, :there])
        counts[sender] = there + (counts[sender] if start else 0)


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
    parts_NNTE = _gathered(part, inbox, state, flags, host, rank, time_limit_ns, collective=SCATTER_SUM)
    reference.reduce_gathered(
        parts_NNTE[:, rank], residual, out, multiplier, post_weight, post_eps, weight, eps, counts[rank] - start
    )


def _gathered(
    part: Tensor,
    inbox: Tensor,
    state: Tensor,
    flags: Tensor,
    host: Tensor,
    rank: int,
    time_limit_ns: int,
    collective: int,
) -> Tensor:
    """All ranks' parts, [N, *part.shape]: valid until this rank's next collective but one."""
    num_ranks, line_bytes = inbox.shape
    loop_back, fault = _words(flags, ctypes.c_int32, 2)
    if loop_back or fault:
        return part.expand(num_ranks, *part.shape)
    slot = (line_bytes - HEADER) // 2
    counter = _words(state, ctypes.c_int64, 1)
    sequence = counter[0]
    start = HEADER + sequence % 2 * slot
    num_bytes = part.numel() * part.element_size()
    assert num_bytes <= slot, (num_bytes, slot)
    parts = inbox[:, start : start + num_bytes].view(part.dtype).unflatten(1, part.shape)
    parts[rank].copy_(part)
    lines = [inbox.data_ptr() + line_bytes * other for other in range(num_ranks)]
    posted = [ctypes.c_int64.from_address(line) for line in lines]
    kinds = [ctypes.c_int64.from_address(line + 8 * (1 + sequence % 2)) for line in lines]
    kinds[rank].value = num_bytes << 8 | collective
    order_memory()
    counter[0] = posted[rank].value = sequence + 1
    missing = _wait(posted, sequence + 1, _words(host, ctypes.c_int64, 2), time_limit_ns)
    order_memory()
    if missing is None:
        missing = next((other for other, kind in enumerate(kinds) if kind.value != kinds[rank].value), None)
    if missing is not None:
        _words(flags, ctypes.c_int32, 2)[FAULT] = 1
        _words(host, ctypes.c_int64, 2)[RECORD] = Record(missing, collective, sequence).word
    return parts


def _wait(posted: list[ctypes.c_int64], count: int, host: Any, time_limit_ns: int) -> int | None:
    """Wait until all ranks have posted so many parts. Returns the first rank that had not when waiting was given up, if it
    was."""
    started = time.monotonic_ns()
    polls, sleep_s = 0, _SHORTEST_SLEEP_S
    for rank, number in enumerate(posted):
        while number.value < count:
            if host[ABORT] or time.monotonic_ns() - started > time_limit_ns:
                return rank
            polls += 1
            if polls < _YIELDS:
                os.sched_yield()
            else:
                time.sleep(sleep_s)
                sleep_s = min(1.5 * sleep_s, _LONGEST_SLEEP_S)
    return None


_LOCK = threading.Lock()


def order_memory() -> None:
    """Have all accesses before it be done, for other processes, before any after it.

    A lock that is given back orders what was done before, and one that is taken orders what is done after; a lock's memory
    accesses are not reordered with each other. So it takes twice: what is before comes before the first return, that before the
    second taking, that before what is after.
    """
    for _ in range(2):
        with _LOCK:
            pass


def _words(tensor: Tensor, kind: type[ctypes.c_int32 | ctypes.c_int64], number: int) -> Any:
    """The elements of a tensor, without a call of torch's for each: a record of a graph refuses those that read."""
    return (kind * number).from_address(tensor.data_ptr())
