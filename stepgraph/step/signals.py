"""KVSignals: of each layer, how many steps have written its cache, as others see it while steps run.

Step n, counted from 0, has written a layer's entries once that layer's number is above n: `StepRunner.num_launched` counts the
same steps. What a number says is in order with the entries and with nothing else. That the step was right, and its request still
is who it was, only the engine knows, when it has read the step's results: whoever copies entries earlier asks it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepgraph.layers.inputs import WriteSignals
from stepgraph.ops.collectives.cpu import order_memory
from stepgraph.platforms import Platform
from stepgraph.platforms.shared_memory import SharedFile, pin


class KVSignals:
    """The numbers, on the device and in host memory.

    Args:
        num_layers: of the model, that cache anything or not. One number more is of the whole step: whatever it writes, the
            drafter's caches too, and those of layers that say nothing themselves.
        platform: of the device.
    """

    def __init__(self, num_layers: int, platform: Platform) -> None:
        counts = torch.zeros(2 + num_layers, dtype=torch.int64, device=platform.device)
        counts[0] = 1
        self.file = SharedFile(8 * (1 + num_layers))
        """Memory of `tensors.words`, which begin it: others may map it."""
        words = torch.frombuffer(self.file.memory, dtype=torch.int64, count=1 + num_layers)
        self.close = pin(self, words, platform.device)
        """Takes the memory from the device, which is done with it; so does the end of this object."""
        self.tensors = WriteSignals(counts, words)
        """What the program gets."""
        self._platform = platform
        self._seen: memoryview[int] = words.numpy().data

    def has_written(self, layer: int, step: int) -> bool:
        """Whether the entries that a step writes of a layer are there. Any thread may ask."""
        return has_written(self._seen, layer, step)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, steps are not counted: they are nobody's."""
        switch = self.tensors.counts[:1]
        before = switch.clone()
        switch.zero_()
        try:
            yield
        finally:
            self._platform.synchronize()
            switch.copy_(before)

    def set(self, num_steps: int) -> None:
        """So many steps are done, with none under way."""
        self.tensors.counts[1:] = num_steps
        self.tensors.words.fill_(num_steps)


def has_written(words: memoryview[int], layer: int, step: int) -> bool:
    """`KVSignals.has_written`, for those who have mapped its words."""
    seen = words[layer] > step or words[-1] > step
    if seen:
        order_memory()  # what is read then was not read before
    return seen
