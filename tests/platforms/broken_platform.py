"""The example's platform with one of its rules broken, that which FAULT names in the environment; sound if none. Installed by
tests/platforms/test_platform_plugin.py as another package's platform, "broken"."""

import os

from simulated_accelerator import SimulatedPlatform
from simulated_accelerator.kernels import KERNELS, swiglu
from simulated_accelerator.memory import MappedMemory
from simulated_accelerator.stream import Completion

from stepgraph.ops import register_kernels
from stepgraph.ops.registry import Inlined


def fault() -> str:
    return os.environ["FAULT"]


class EarlyCompletion(Completion):
    """Says that work is done whose results the ring does not hold yet."""

    def record(self) -> None:
        pass


class MovingMemory(MappedMemory):
    """Gives its tensors other addresses when it is taken back."""

    def __init__(self, sizes) -> None:
        super().__init__(sizes)
        self._tensors = []

    def zeros(self, shape, dtype):
        self._tensors.append(super().zeros(shape, dtype))
        return self._tensors[-1]

    def restore(self) -> None:
        super().restore()
        for tensor in self._tensors:
            tensor.data = tensor.clone()


def greedy_swiglu(gate, up=None):
    """May read the last row for all of them, though it makes nothing of it."""
    out = swiglu(gate, up)
    return out + 0 * out[-1:] if fault() == "read past its rows" else out


class BrokenPlatform(SimulatedPlatform):
    name = "broken"

    def completion(self):
        return EarlyCompletion() if fault() == "completion before the write" else super().completion()

    def memory(self, sizes, *, sleepable):
        return MovingMemory(sizes) if fault() == "moved address" else super().memory(sizes, sleepable=sleepable)


register_kernels("broken", KERNELS | {"swiglu": Inlined(greedy_swiglu)})
