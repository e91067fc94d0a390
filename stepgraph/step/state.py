"""SlotState: what the device knows about the running requests."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepgraph.abi import slot_line
from stepgraph.platforms import Platform
from stepgraph.step.admission import Admission
from stepgraph.step.output_rings import OutputRings
from stepgraph.step.plan import BlockTables
from stepgraph.step.shape import StepShape
from stepgraph.step.slot_sampling import SlotSampling

_Copy: TypeAlias = "tuple[array[int] | npt.NDArray[np.int32], Tensor]"


class SlotState:
    """Device arrays with one line per slot, and the buffers that carry plans in and tokens out. `rings` are those that another
    process reads; default: new ones.

    Line 0 is the null slot: inactive, all zero, where padding points. All addresses are fixed for the engine's life.

    `has_lines`: whether layers have lines, of which slots are told.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        tables: BlockTables,
        vocab_size: int,
        max_shape: StepShape,
        platform: Platform,
        rings: OutputRings | None = None,
        has_lines: bool = False,
    ):
        slots, num_groups = max_num_seqs + 1, len(tables.splits)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.int32, device=platform.device)

        self.lines = zeros(slots, slot_line.LINE_WIDTH)  # see stepgraph.abi.slot_line
        self.tokens = zeros(slots, max_model_len)  # token history
        self._tables, self._has_lines = tables, has_lines
        self._max_blocks = -(-max_model_len // tables.block_size) * max(tables.splits)
        assert num_groups == 1 or not has_lines, tables
        # What deltas change: of all block groups, one behind the other.
        self.tables = zeros(num_groups * slots, self._max_blocks + has_lines * slot_line.NUM_LINES)
        self.biases = zeros(slots, slot_line.MAX_BIASES, 2)
        self.bad_words = zeros(slots, slot_line.MAX_BAD_WORDS, slot_line.BAD_WORD_WIDTH)
        self.masks = zeros(slots, 1 + max_shape.num_drafts, -(-vocab_size // slot_line.MASK_BITS))
        self.plan = zeros(max_shape.plan_length(tables.block_size, tables.per_place))
        self.counter = zeros(1)  # steps committed, modulo RING_DEPTH
        self.rings = OutputRings.create(max_shape, platform.host_buffer) if rings is None else rings
        self.ring, self.logprob_ring, self.prompt_logprob_ring, _ = self.rings
        self._platform = platform

    @property
    def block_tables(self) -> tuple[Tensor, ...]:
        """The KV blocks of slots, for each block group: [slots, max blocks]. May be asked for inside a graph."""
        if len(self._tables.splits) > 1:
            return self.tables.chunk(len(self._tables.splits))
        return (self.tables[:, : self._max_blocks] if self._has_lines else self.tables,)

    @property
    def line_table(self) -> Tensor | None:
        """The lines of slots, as `LineRows.take` wants them; None if layers have none. May be asked for inside a graph."""
        return self.tables[:, self._max_blocks :] if self._has_lines else None

    def admit(self, admission: Admission) -> None:
        """Start a request in its slot: a few copies, ordered before the next step on the device's stream."""
        slot, tokens, prompt_len, generation, max_length, sampling, blocks, computed, lines = admission
        assert 0 < slot < self.lines.shape[0], slot
        assert computed < len(tokens), (computed, len(tokens))
        line = _line(sampling)
        copies: list[_Copy] = [(line, self.lines[slot]), (array("i", tokens), self.tokens[slot])]
        if blocks:
            of_groups = zip(self._tables.by_group(blocks), self.block_tables, strict=True)
            copies += ((of_group, table[slot]) for of_group, table in of_groups)
        if self.line_table is not None:
            read, write = lines or (slot, slot)
            copies.append((array("i", (read, write, write)), self.line_table[slot]))
        if sampling.logit_bias:
            biases = np.zeros((len(sampling.logit_bias), 2), dtype=np.int32)
            biases[:, 0] = [token for token, _ in sampling.logit_bias]
            biases.view(np.float32)[:, 1] = [bias for _, bias in sampling.logit_bias]
            copies.append((biases.ravel(), self.biases[slot].view(-1)))
        if sampling.bad_words:
            words = np.full((len(sampling.bad_words), slot_line.BAD_WORD_WIDTH), slot_line.NO_TOKEN, dtype=np.int32)
            for row, word in zip(words, sampling.bad_words, strict=True):
                row[-len(word) :] = word
            copies.append((words.ravel(), self.bad_words[slot].view(-1)))
        line[slot_line.LENGTH] = len(tokens)
        line[slot_line.COMPUTED] = line[slot_line.START] = computed
        line[slot_line.ACTIVE] = 1
        line[slot_line.GENERATION] = generation
        line[slot_line.MAX_LENGTH] = max_length
        line[slot_line.PROMPT_LENGTH] = prompt_len
        line[slot_line.MIN_LENGTH] = prompt_len + sampling.min_tokens if sampling.min_tokens else 0
        self._send(copies)

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """Say which tokens `slot` may sample from the next step on. One copy, ordered as in `admit`.

        Args:
            slot: admitted with `SlotSampling.masked`.
            masks: [n, ceil(V / MASK_BITS)], n ≤ 1 + K; bit v % MASK_BITS of word v // MASK_BITS of line j allows token v as the
                j-th new token of a step. Lines not given stay.
        """
        self._send([(masks.ravel(), self.masks[slot].view(-1))])

    def _send(self, copies: Sequence[_Copy]) -> None:
        """Write values to where their targets begin, staged in a new buffer: the device may be late to read it."""
        staging, start = self._platform.host_buffer(sum(len(values) for values, _ in copies)), 0
        staged = staging.numpy()
        for values, target in copies:
            end = start + len(values)
            staged[start:end] = values
            target[: len(values)].copy_(staging[start:end], non_blocking=True)
            start = end

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Put back what runs inside leave behind beside the null slot: the step counter and the output rings."""
        self._platform.synchronize()
        written = (self.counter, self.ring, self.logprob_ring, self.prompt_logprob_ring)
        before = [tensor.clone() for tensor in written]
        try:
            yield
        finally:
            self._platform.synchronize()
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)


def _line(sampling: SlotSampling) -> array[int]:
    """A slot line with the columns of `sampling` filled in."""
    assert len(sampling.stop_token_ids) <= slot_line.MAX_STOP_TOKENS, sampling
    assert len(sampling.logit_bias) <= slot_line.MAX_BIASES, sampling
    assert len(sampling.bad_words) <= slot_line.MAX_BAD_WORDS, sampling
    line = array("i", _NO_SAMPLING)
    line[slot_line.TOP_K] = sampling.top_k
    line[slot_line.NUM_BIASES] = len(sampling.logit_bias)
    line[slot_line.NUM_BAD_WORDS] = len(sampling.bad_words)
    line[slot_line.MASKED] = sampling.masked
    line[slot_line.ADAPTER] = sampling.adapter
    line[slot_line.MAX_NUM_DRAFTS] = sampling.max_num_drafts
    line[slot_line.NUM_LOGPROBS] = sampling.num_logprobs
    line[slot_line.NUM_PROMPT_LOGPROBS] = sampling.num_prompt_logprobs
    bits = _BITS.unpack(
        _VALUES.pack(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.seed & 0xFFFFFFFF,
            sampling.seed >> 32 & 0xFFFFFFFF,
            sampling.memory_key & 0xFFFFFFFF,
            sampling.memory_key >> 32,
        )
    )
    for column, value in zip(_BIT_COLUMNS, bits, strict=True):
        line[column] = value
    for column, token in enumerate(sampling.stop_token_ids, slot_line.STOP_TOKENS):
        line[column] = token
    return line


_NO_SAMPLING = [0] * slot_line.STOP_TOKENS + [slot_line.NO_TOKEN] * slot_line.MAX_STOP_TOKENS
_VALUES, _BITS = struct.Struct("6f4I"), struct.Struct("10i")
_BIT_COLUMNS = (
    slot_line.TEMPERATURE,
    slot_line.TOP_P,
    slot_line.MIN_P,
    slot_line.REPETITION_PENALTY,
    slot_line.PRESENCE_PENALTY,
    slot_line.FREQUENCY_PENALTY,
    slot_line.SEED_LOW,
    slot_line.SEED_HIGH,
    slot_line.MEMORY_KEY,
    slot_line.MEMORY_KEY + 1,
)
