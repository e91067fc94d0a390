"""Capturing steps: the backends, the pool of captured graphs, and the check that a graph is right."""

from stepgraph.graph.base import Graph, GraphBackend
from stepgraph.graph.eager import EagerBackend

__all__ = ["Graph", "GraphBackend", "create_backend"]


def create_backend(name: str) -> GraphBackend:
    """The backend of that name: ``"cuda"``, ``"cpu"`` or ``"eager"``."""
    if name == "cuda":
        from stepgraph.graph.cuda import CudaBackend

        return CudaBackend()
    if name == "cpu":
        from stepgraph.graph.cpu import CpuBackend

        return CpuBackend()
    assert name == "eager", name
    return EagerBackend()
