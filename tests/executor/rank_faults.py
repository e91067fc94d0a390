"""What goes wrong on one rank, for `Executor.on_all`: functions that workers can import."""

import os
import time
from typing import NoReturn

import torch

from stepgraph.executor.local import LocalExecutor


def fail_captures(executor: LocalExecutor, rank: int, message: str) -> None:
    """From now on, no graph can be captured on a rank for lack of memory; on none if the message is empty."""

    def fail(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError(message)

    backend = executor.runner.graphs.store._backend
    if executor.group.shard.rank == rank:
        vars(backend).pop("capture", None)
        if message:
            backend.capture = fail


def fail_eagerly(executor: LocalExecutor, rank: int, message: str) -> None:
    """From now on, no program can be made on a rank for lack of memory; on none if the message is empty."""

    def fail(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError(message)

    if executor.group.shard.rank == rank:
        vars(executor.runner).pop("create_program", None)
        if message:
            executor.runner.create_program = fail


def fail_admissions(executor: LocalExecutor, rank: int, message: str) -> None:
    """From now on, no request can be admitted on a rank; on none if the message is empty."""

    def fail(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError(message)

    if executor.group.shard.rank == rank:
        vars(executor.runner.state).pop("admit", None)
        if message:
            executor.runner.state.admit = fail


def count_steps(executor: LocalExecutor, count: int) -> None:
    """As if so many steps more had been launched."""
    executor.runner.num_launched += count


def fail_launches(executor: LocalExecutor, rank: int) -> None:
    """The next step of a rank fails."""

    def fail(*_: object) -> NoReturn:
        raise RuntimeError("no current")

    if executor.group.shard.rank == rank:
        executor.runner.run = fail


def raise_on(executor: LocalExecutor, rank: int, error: type[Exception], message: str) -> int:
    """Raises on one rank, and gives its number on others."""
    if executor.group.shard.rank == rank:
        raise error(message)
    return executor.group.shard.rank


def num_graphs(executor: LocalExecutor) -> int:
    """Captured on this rank."""
    return executor.runner.graphs.store.num_graphs


def threads(executor: LocalExecutor) -> int:
    """Of torch, on this rank."""
    return torch.get_num_threads()


def change_line(executor: LocalExecutor, rank: int) -> None:
    """Make one number of a rank's slots another."""
    if executor.group.shard.rank == rank:
        executor.runner.state.lines[1, 0] += 1


def pid(executor: LocalExecutor) -> int:
    """Of the rank's process."""
    return os.getpid()


def capture_slowly(executor: LocalExecutor, rank: int, seconds: float) -> None:
    """From now on, a rank takes so long for a graph."""
    backend = executor.runner.graphs.store._backend
    capture = backend.capture

    def slowly(*args: object) -> object:
        time.sleep(seconds)
        return capture(*args)

    if executor.group.shard.rank == rank:
        backend.capture = slowly


def gather_alone(executor: LocalExecutor, rank: int) -> None:
    """A rank comes to a collective that others do not come to."""
    if executor.group.shard.rank == rank:
        executor.group.gather(torch.zeros(1, 4), torch.zeros(1, 4 * executor.group.shard.size))


def fail_sleeping(executor: LocalExecutor, rank: int) -> None:
    """A rank cannot give the memory of its KV cache up, once it has given up that of its weights."""

    def fail(**_: object) -> NoReturn:
        raise MemoryError("no host memory")

    if executor.group.shard.rank == rank:
        executor.runner.kv_memory.release = fail
