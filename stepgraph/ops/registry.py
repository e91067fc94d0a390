"""How an operator of stepgraph is made known to torch.

Each folder of `stepgraph.ops` is one operator: its schema and documentation (`__init__.py`), a plain torch reference
that defines what is right (`reference.py`), and a Triton kernel (`triton.py`). `register` joins them under
`torch.ops.stepgraph.<name>`; a third-party platform adds its kernels with `torch.library.impl` for its own dispatch key.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("stepgraph", "DEF")

INLINED: dict[Any, Callable[..., Any]] = {}
"""Operators whose CPU kernel is recorded call by call when a CPU graph is captured: a handful of aten calls, no data-dependent
value. Keeping them as one opaque call would put Python into every replay. Filled at import, read by `graph.cpu`."""


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: str,
    inline_on_cpu: bool | Callable[..., Any] = False,
) -> Any:
    """Define `stepgraph::<schema>` and return the callable operator.

    Args:
        schema: torch.library schema without the namespace, e.g. ``"swiglu(Tensor x) -> Tensor"``.
        cpu: CPU kernel (usually the reference).
        fake: shape function for fake tensors.
        cuda: ``"module:function"`` of the Triton launcher, imported at its first call so that a machine without a GPU
            never imports Triton.
        inline_on_cpu: record the calls of `cpu` when capturing a CPU graph; requires that `cpu` reads no tensor values. A
            function is recorded instead of `cpu`, or the operator stays one call if it returns NotImplemented.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, _lazy(cuda), "CUDA")
    torch.library.register_fake(f"stepgraph::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.stepgraph, name).default
    if inline_on_cpu:
        INLINED[operator] = cpu if inline_on_cpu is True else inline_on_cpu
    return operator


def _lazy(target: str) -> Callable[..., Any]:
    module_name, function_name = target.split(":")
    loaded: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(module_name), function_name))
        return loaded[0](*args)

    return call
