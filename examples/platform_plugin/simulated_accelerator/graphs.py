"""Capture: the step is recorded as on the CPU, and the stream's thread replays the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from simulated_accelerator.stream import STREAM
from stepgraph.graph import Graph
from stepgraph.graph.base import Output
from stepgraph.graph.cpu import CpuBackend


@dataclass(frozen=True, eq=False)
class StreamGraph(Generic[Output]):
    """A recorded program and the tensors that its replays leave results in."""

    recorded: Graph[Output]
    output: Output

    def replay(self) -> Output:
        STREAM.submit(self._run)
        return self.output

    def _run(self) -> None:
        for target, result in zip(self.output, self.recorded.replay(), strict=True):  # type: ignore[call-overload]
            target.copy_(result)


class StreamBackend:
    """See `stepgraph.graph.GraphBackend`."""

    name = "simulated_accelerator.graphs:StreamBackend"

    def capture(self, program: Callable[[], Output], warmups: int) -> StreamGraph[Output]:
        STREAM.synchronize()  # capturing runs the program, here and now
        recorded = CpuBackend().capture(program, warmups)
        first = recorded.replay()
        return StreamGraph(recorded, type(first)(*(tensor.clone() for tensor in first)))  # type: ignore[attr-defined]

    def memory_bytes(self) -> int:
        return 0  # what a replay allocates it gives back
