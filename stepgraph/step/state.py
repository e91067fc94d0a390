"""SlotState: what the device knows about the running requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from stepgraph.ops import slot_line
from stepgraph.platforms import Platform
from stepgraph.step.shape import StepShape

RING_DEPTH = 4
"""Steps whose output is kept; more than any platform runs ahead."""


class SlotState:
    """Device arrays with one line per slot, and the buffers that carry plans in and tokens out.

    Line 0 is the null slot: inactive, all zero, where padding points. All addresses are fixed for the engine's life.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, max_shape: StepShape, platform: Platform
    ):
        slots = max_num_seqs + 1

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.int32, device=platform.device)

        self.lines = zeros(slots, slot_line.LINE_WIDTH)  # see stepgraph.ops.slot_line
        self.tokens = zeros(slots, max_model_len)  # token history
        self.block_table = zeros(slots, -(-max_model_len // block_size))
        self.plan = zeros(max_shape.plan_length(block_size))
        self.counter = zeros(1)  # steps committed, modulo RING_DEPTH
        self.ring = platform.host_buffer(RING_DEPTH, max_shape.num_rows, slot_line.OUTPUT_WIDTH)
        self._platform = platform

    def admit(
        self,
        slot: int,
        *,
        prompt: Sequence[int],
        generation: int,
        max_length: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        stop_token_ids: Sequence[int],
    ) -> None:
        """Start a request in `slot`: two copies, ordered before the next step on the device's stream.

        Args:
            slot: 1 … max_num_seqs.
            prompt: token ids.
            generation: differs from that of the slot's previous request.
            max_length: tokens of prompt and answer at which the request ends.
            temperature, top_k, top_p: as `stepgraph.ops.sample` defines them.
            seed: 64 bits.
            stop_token_ids: at most MAX_STOP_TOKENS.
        """
        assert 0 < slot < self.lines.shape[0], slot
        assert len(stop_token_ids) <= slot_line.MAX_STOP_TOKENS, stop_token_ids
        line = np.zeros(slot_line.LINE_WIDTH, dtype=np.int32)
        line[slot_line.LENGTH] = len(prompt)
        line[slot_line.ACTIVE] = 1
        line[slot_line.GENERATION] = generation
        line[slot_line.MAX_LENGTH] = max_length
        line[slot_line.TOP_K] = top_k
        floats = line.view(np.float32)
        floats[slot_line.TEMPERATURE] = temperature
        floats[slot_line.TOP_P] = top_p
        line.view(np.uint32)[[slot_line.SEED_LOW, slot_line.SEED_HIGH]] = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        line[slot_line.STOP_TOKENS :] = -1
        line[slot_line.STOP_TOKENS : slot_line.STOP_TOKENS + len(stop_token_ids)] = stop_token_ids
        self._copy(np.asarray(prompt, dtype=np.int32), self.tokens[slot])
        self._copy(line, self.lines[slot])

    def _copy(self, values: np.ndarray, target: Tensor) -> None:
        staging = self._platform.host_buffer(len(values))
        staging.numpy()[:] = values
        target[: len(values)].copy_(staging, non_blocking=True)

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Put back what runs inside leave behind beside the null slot: the step counter and the output ring."""
        self._platform.synchronize()
        counter, ring = self.counter.clone(), self.ring.clone()
        try:
            yield
        finally:
            self._platform.synchronize()
            self.counter.copy_(counter)
            self.ring.copy_(ring)
