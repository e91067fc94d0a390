"""CPU kernels in C++, compiled for this machine when they are first needed.

`load` finds or builds the library; from then on the operators that `declare` made known have kernels. Where that cannot be,
`load` says why, and the operators of `stepgraph.ops` use torch's kernels instead.
"""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from stepgraph.native.library import Plan, build, plan

logger = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("stepgraph_native", "DEF")


LANES = 16
"""Sizes that kernels split into registers are multiples of this; the widest registers hold so many float32."""


def declare(schema: str) -> Any:
    """Define ``stepgraph_native::<schema>``, whose kernel the library brings, and return the callable operator.

    Args:
        schema: torch.library schema without the namespace.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    return getattr(torch.ops.stepgraph_native, name).default


@functools.cache
def missing() -> str | None:
    """Load the library into this process, compiled first if need be. None if it is there, else why it is not."""
    planned = plan()
    found = build(planned) if isinstance(planned, Plan) else planned
    if isinstance(found, Path):
        library = found
        try:
            torch.ops.load_library(found)
            return None
        except OSError as error:
            found = f"{found} cannot be loaded: {error}"
        finally:
            if isinstance(planned, Plan) and library.parent != planned.library.parent:  # it is for this process alone
                shutil.rmtree(library.parent, ignore_errors=True)
    logger.warning("torch's CPU kernels are used, not our own, which are faster: %s", found)
    return found


def available() -> bool:
    """Whether the kernels can be called."""
    return missing() is None


def describe() -> str:
    """For people: what `missing` would find, without building anything."""
    planned = plan()
    if isinstance(planned, str):
        return f"torch's: {planned}"
    if not planned.command:
        return f"{planned.capability}, compiled ahead"
    return f"{planned.capability}, {'compiled' if planned.library.exists() else 'compiled at first use'}"
