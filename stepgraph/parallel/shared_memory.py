"""Groups of ranks that share a host's memory: processes that compute on its cores."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Iterator

import torch

from stepgraph.errors import StepgraphError
from stepgraph.ops.collectives import Mailbox
from stepgraph.ops.collectives.cpu import HEADER
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.mailbox_group import MailboxGroup
from stepgraph.parallel.shard import Shard

_MEMORY_FOLDER = "/dev/shm"


def create_shared_group(
    shard: Shard, exchange: Exchange, *, slot_bytes: int, dtype: torch.dtype, time_limit_s: float
) -> MailboxGroup:
    """Have rank 0 make memory that all ranks map. All call it.

    Args:
        shard: this rank's.
        exchange: of the ranks.
        slot_bytes: that a message may have, a multiple of 64.
        dtype: of the numbers in messages.
        time_limit_s: of a wait for another rank.

    Raises:
        StepgraphError: there is no room for the memory, or another rank failed.
    """
    line_bytes = HEADER + 2 * slot_bytes
    memory = map_shared(shard, exchange, shard.size * line_bytes)
    mailbox = Mailbox(
        inbox=torch.frombuffer(memory, dtype=torch.uint8).view(shard.size, line_bytes),  # keeps the mapping
        peers=(),
        state=torch.zeros(1, 1, dtype=torch.int64),
        flags=torch.zeros(2, dtype=torch.int32),
        host=torch.zeros(2, dtype=torch.int64),
    )
    return MailboxGroup(
        "shared_memory",
        shard,
        mailbox,
        slot_elements=slot_bytes // dtype.itemsize,
        time_limit_s=time_limit_s,
        synchronize=lambda: None,
        close=lambda: None,  # the memory goes with the last tensor in it
    )


def map_shared(shard: Shard, exchange: Exchange, num_bytes: int) -> mmap.mmap:
    """Zeroed memory of all ranks, which all call this. Its file has no name any more when it returns.

    Raises:
        StepgraphError: there is no room for it, or another rank failed.
    """
    with contextlib.ExitStack() as stack:
        path, error = b"", b""
        if shard.rank == 0:
            try:
                path = stack.enter_context(_file(num_bytes)).encode()
            except OSError as failed:
                error = f"{num_bytes / 2**20:.0f} MiB of memory that ranks share cannot be made ({failed})".encode()
        told, *_ = exchange(path)
        memory = None
        if told:
            try:
                memory = _map(told.decode(), num_bytes)
            except OSError as failed:
                error = f"rank {shard.rank} cannot map the memory that ranks share ({failed})".encode()
        if errors := [text.decode() for text in exchange(error) if text]:  # and then all have mapped it
            raise StepgraphError("; ".join(errors))
    assert memory is not None
    return memory


@contextlib.contextmanager
def _file(num_bytes: int) -> Iterator[str]:
    """A new file of zeros that is there while it is wanted, in memory if there is room. Where it needs no name, none can be left
    behind by a process that is killed."""
    if hasattr(os, "memfd_create") and os.path.isdir(own := f"/proc/{os.getpid()}/fd"):
        if num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))  # else the kernel ends processes to make room
        descriptor = os.memfd_create("stepgraph-ranks")
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # else a write to it could end the process
            yield f"{own}/{descriptor}"
        finally:
            os.close(descriptor)
        return
    folders = [_MEMORY_FOLDER, tempfile.gettempdir()] if os.path.isdir(_MEMORY_FOLDER) else [tempfile.gettempdir()]
    for folder in folders:
        descriptor, path = tempfile.mkstemp(prefix="stepgraph-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError:
            os.unlink(path)
            if folder == folders[-1]:
                raise
            continue
        finally:
            os.close(descriptor)
        try:
            yield path
        finally:
            os.unlink(path)
        return


def _map(path: str, num_bytes: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
