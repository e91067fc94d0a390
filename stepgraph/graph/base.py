"""What a graph backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Output = TypeVar("Output")
OutputCo = TypeVar("OutputCo", covariant=True)


class Graph(Protocol, Generic[OutputCo]):
    """A step that can be launched again and again over the buffers it was captured with."""

    def replay(self) -> OutputCo:
        """Launch it. The returned tensors live in graph memory that the next launch of any graph may overwrite."""


class GraphBackend(Protocol):
    """Turns a program into a graph."""

    name: str
    """What `stepgraph.graph.create_backend` makes it of."""

    def capture(self, program: Callable[[], Output], warmups: int) -> Graph[Output]:
        """Capture `program`, a function of fixed device buffers that returns a NamedTuple of tensors.

        The program is run for real `warmups` times or more, so its buffers must hold a plan that leaves no trace.

        Whatever it raises, Ctrl-C included, nothing is being captured any more.

        Raises:
            CaptureError: something in the program depends on the values in its buffers.
            DeviceMemoryError: memory ran out, in a warm-up or while it was captured.
        """

    def memory_bytes(self) -> int:
        """Memory that the graphs which are still there hold for their tensors, all together."""
