"""Programs for the device that take long and leave something for the host to see."""

from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.graph import Graph, GraphBackend
from stepgraph.platforms import Platform


class Output(NamedTuple):
    """Of the programs here."""

    value: Tensor


class Reporter:
    """Graphs that raise a counter on the device, some milliseconds of work later, and report its value into host buffers.

    Args:
        rounds: of products before the value is raised; they take longer than the host needs to go on.
    """

    def __init__(self, platform: Platform, backend: GraphBackend, *, rounds: int = 40) -> None:
        self.counter = torch.zeros(1, dtype=torch.int32, device=platform.device)
        self.input = torch.zeros(1, dtype=torch.int32, device=platform.device)
        self._platform, self._backend, self._rounds = platform, backend, rounds
        self._matrix = torch.eye(256, device=platform.device)

    def capture(self) -> tuple[Graph[Output], Tensor]:
        """A graph that adds `input` to the counter and writes the sum into a host buffer of its own, [1], which comes with it.
        The counter and the buffer are zero afterwards."""
        report = self._platform.host_buffer(1)

        def program() -> Output:
            product = self._matrix
            for _ in range(self._rounds):
                product = product @ self._matrix  # the identity
            self.counter.add_(self.input * product[0, 0].to(torch.int32))
            report.copy_(self.counter, non_blocking=True)
            return Output(self.counter * 2)

        graph = self._backend.capture(program, 1)
        self._platform.synchronize()
        self.counter.zero_()
        report.zero_()
        return graph, report
