"""The platform's kernels. Operators that are not here run the CPU's, as this device's memory is the host's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simulated_accelerator.stream import STREAM
from stepgraph.ops.build.reference import build_step
from stepgraph.ops.registry import Inlined, Kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `stepgraph.ops.rms_norm`."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `stepgraph.ops.swiglu`."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).to(gate.dtype) * up


def build_step_in_turn(*args: Any) -> Any:
    """See `stepgraph.ops.build_step`, with which every step begins. One that is launched eagerly runs in the host's thread, and
    must not start before what the stream has to do."""
    if not STREAM.is_own_thread:
        STREAM.synchronize()
    return build_step(*args)


KERNELS: dict[str, Kernel] = {
    "rms_norm": Inlined(rms_norm),
    "swiglu": Inlined(swiglu),
    "build_step": build_step_in_turn,
}
