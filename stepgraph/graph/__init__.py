"""Capturing programs: the backends, and the captured graphs."""

import importlib

from stepgraph.graph.base import Graph, GraphBackend
from stepgraph.graph.eager import EagerBackend

__all__ = ["Graph", "GraphBackend", "create_backend"]


def create_backend(name: str) -> GraphBackend:
    """A new backend.

    Args:
        name: ``"cuda"``, ``"cpu"``, ``"eager"``, or ``"module:class"``, as packages with a platform of their own have it.
    """
    if name == "cuda":
        from stepgraph.graph.cuda import CudaBackend

        return CudaBackend()
    if name == "cpu":
        from stepgraph.graph.cpu import CpuBackend

        return CpuBackend()
    if name == "eager":
        return EagerBackend()
    module, class_name = name.split(":")
    backend: GraphBackend = getattr(importlib.import_module(module), class_name)()
    return backend
