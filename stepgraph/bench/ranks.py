"""Runs a function on every rank of a group, each a process of its own."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from stepgraph.errors import StepgraphError
from stepgraph.parallel.shard import Shard

_PRELOADED = ["stepgraph.parallel.create"]
_ENDS_WITHIN_S = 10.0


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, time_limit_s: float = 300.0) -> list[Any]:
    """Call `function(shard, exchange, *arguments)` in `num_ranks` processes.

    Args:
        function: of a module, by whose name processes find it.
        num_ranks: N.
        arguments: that can be pickled.
        time_limit_s: after which processes are killed.

    Returns:
        What the calls return, in the order of the ranks.

    Raises:
        StepgraphError: a rank failed, with its traceback, ended, or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    pipes = [context.Pipe() for _ in range(num_ranks)]
    processes = [
        context.Process(target=_rank, args=(Shard(rank, num_ranks), there, function, arguments), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    try:
        for process, (_, there) in zip(processes, pipes, strict=True):
            process.start()
            there.close()
        return _serve([here for here, _ in pipes], time.monotonic() + time_limit_s)
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(_ENDS_WITHIN_S)
                process.kill()


def _rank(shard: Shard, connection: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    def exchange(value: bytes) -> list[bytes]:
        connection.send((_GAVE, value))
        values: list[bytes] = connection.recv()
        return values

    try:
        result = pickle.dumps(function(shard, exchange, *arguments))
    except BaseException:
        connection.send((_FAILED, traceback.format_exc()))
    else:
        connection.send((_RETURNED, result))


_GAVE, _RETURNED, _FAILED = "gave", "returned", "failed"


def _serve(connections: list[Connection], deadline: float) -> list[Any]:
    """Exchange values between ranks until all have returned."""
    given: dict[int, bytes] = {}
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        running = [connection for rank, connection in enumerate(connections) if rank not in results]
        ready = wait(running, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(str(rank) for rank in range(len(connections)) if rank not in results)
            raise StepgraphError(f"rank {missing} did not end in time")
        for connection in ready:
            rank = connections.index(connection)  # type: ignore[arg-type]  # only connections were waited for
            try:
                kind, value = connections[rank].recv()
            except EOFError:
                raise StepgraphError(f"rank {rank} ended") from None
            if kind == _FAILED:
                raise StepgraphError(f"rank {rank} failed:\n{value}")
            if kind == _RETURNED:
                results[rank] = pickle.loads(value)
            else:
                given[rank] = value
        if len(given) == len(connections):
            values = [given[rank] for rank in range(len(connections))]
            given.clear()
            for connection in connections:
                connection.send(values)
    return [results[rank] for rank in range(len(connections))]
