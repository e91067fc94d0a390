"""`head_linear` on the CPU: our own kernel for float32, which is deterministic as it is, else the reference."""

from typing import Any

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.ops.head_linear import reference

_head_linear = native.declare("head_linear(Tensor x, Tensor weight) -> Tensor")
_MULTIPLE = 32
"""Inputs that the kernel takes at a time."""


def head_linear(x: Tensor, weight: Tensor, deterministic: bool) -> Tensor:
    """See `stepgraph.ops.head_linear.head_linear`."""
    return _head_linear(x, weight) if _has_native_kernel(x) else reference.head_linear(x, weight, deterministic)


def recorded(x: Tensor, weight: Tensor, deterministic: bool) -> Any:
    """What a recording of `head_linear` holds: its operators, or NotImplemented for the opaque operator where these would be one
    product per token."""
    return NotImplemented if deterministic and not _has_native_kernel(x) else head_linear(x, weight, deterministic)


def _has_native_kernel(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.shape[2] % _MULTIPLE == 0 and native.available()
