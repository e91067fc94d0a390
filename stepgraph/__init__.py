"""stepgraph: LLM inference in which every step is one launch of one captured graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepgraph.openmp import wait_briefly
from stepgraph.version import VERSION

wait_briefly()  # before anything imports torch

__version__ = VERSION
__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]

if TYPE_CHECKING:
    from stepgraph.api import LLM
    from stepgraph.config import EngineConfig
    from stepgraph.engine.async_engine import AsyncEngine
    from stepgraph.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs

_HOMES = {
    "LLM": "stepgraph.api",
    "AsyncEngine": "stepgraph.engine.async_engine",
    "CompletionOutput": "stepgraph.engine.outputs",
    "EngineConfig": "stepgraph.config",
    "Logprob": "stepgraph.engine.outputs",
    "RequestOutput": "stepgraph.engine.outputs",
    "SamplingParams": "stepgraph.engine.sampling_params",
    "StructuredOutputs": "stepgraph.engine.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import stepgraph` and `stepgraph --help` do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
