"""No capture: each launch runs the program operator by operator. The reference the other backends are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import torch

from stepgraph.graph.base import Output


@dataclass(frozen=True)
class EagerGraph(Generic[Output]):
    """Runs the program at every launch."""

    program: Callable[[], Output]

    def replay(self) -> Output:
        with torch.no_grad():
            return self.program()


class EagerBackend:
    """See `stepgraph.graph.base.GraphBackend`."""

    name = "eager"

    def capture(self, program: Callable[[], Output], warmups: int) -> EagerGraph[Output]:
        return EagerGraph(program)

    def memory_bytes(self) -> int:
        return 0
