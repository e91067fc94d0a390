"""How an operator of stepgraph is made known to torch.

Each folder of `stepgraph.ops` is one operator: its schema and documentation (`__init__.py`), a plain torch reference that defines
what is right (`reference.py`), and kernels: a Triton kernel (`triton.py`) and, where the reference would be slow, one for the CPU
(`cpu.py`). `register` joins them under `torch.ops.stepgraph.<name>`; other platforms add theirs by `register_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepgraph.platforms.kernels import INLINED, Inlined, Kernel, add_operator, brings_kernel, register_kernels

__all__ = ["INLINED", "Inlined", "Kernel", "brings_kernel", "register", "register_kernels"]

_LIBRARY = torch.library.Library("stepgraph", "DEF")


def register(schema: str, kernels: Mapping[str, Kernel]) -> Any:
    """Define `stepgraph::<schema>` and return the callable operator.

    Args:
        schema: torch.library schema without the namespace, e.g. ``"swiglu(Tensor x) -> Tensor"``.
        kernels: of the built-in platforms: ``"cpu"`` (often the reference), ``"cuda"``, and ``"meta"`` for an operator that is
            called on tensors without memory.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    add_operator(name, kernels)
    return getattr(torch.ops.stepgraph, name).default
