"""StepProgram: everything the device does in one step. Read this first.

The program is a function of device memory only. It takes no argument that depends on the batch: which requests run, how
long they are and how they are mixed are values in buffers, so a graph captured once is right for every batch that fits its
StepShape. It runs as it stands (eagerly), or captured by a `stepgraph.graph` backend; both do the same operations.

Shapes: T tokens, R rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.layers.inputs import StepInputs
from stepgraph.models.adapters import AdapterStore
from stepgraph.models.language_model import LanguageModel
from stepgraph.ops import slot_line
from stepgraph.step.shape import StepShape, Variant
from stepgraph.step.state import SlotState


class StepOutput(NamedTuple):
    """Tensors of the step for checks; the next step of any graph overwrites them.

    What the engine reads is in `SlotState.ring`.
    """

    logits: Tensor  # [R, V]
    sampled: Tensor  # [R] int32


class LogitBuffers(NamedTuple):
    """Buffers of [max rows, V] that all shapes share: as graph memory they would be kept once per graph."""

    logits: Tensor  # in the model's dtype
    processed: Tensor  # float32: after penalties, biases, bans and masks
    counts: Tensor  # int32 scratch, zero between steps


@dataclass(frozen=True)
class StepProgram:
    """One step at one StepShape over one set of buffers."""

    model: LanguageModel
    state: SlotState
    kv_caches: tuple[tuple[Tensor, Tensor], ...]
    buffers: LogitBuffers
    shape: StepShape
    geometry: ops.AttentionGeometry
    adapters: AdapterStore | None = None

    def __call__(self) -> StepOutput:
        """Run one step of the plan in `state.plan`."""
        state, config = self.state, self.model.config
        T, R = self.shape.num_tokens, self.shape.num_rows
        block_size = self.kv_caches[0][0].shape[1]

        # 1 build: rows → token ids, positions, KV slots, attention work
        built = ops.build_step(
            state.plan,
            state.lines,
            state.tokens,
            state.block_table,
            T,
            R,
            self.shape.num_deltas(block_size),
            block_size,
        )
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        attention = {
            window: ops.attention_plan(built.query_start, built.kv_len, *heads, self.geometry, window)
            for window in sorted(set(config.windows))
        }
        # 2 forward: layers over T tokens, keys and values written in place
        if self.adapters is not None:
            self.adapters.select(built, state.lines)
        inputs = StepInputs(built, attention, self.geometry, state.block_table, self.kv_caches)
        hidden_TE = self.model(inputs)
        # 3 logits: for each row's last token only, unless prompts' log-probabilities are asked for
        if self.shape.variant >= Variant.PROMPT_LOGPROBS:
            self._report_prompts(built, hidden_TE)
        logits_RV = self.model.logits(hidden_TE.index_select(0, built.logit_index), out=self.buffers.logits[:R])
        # 4 sample
        if self.shape.variant >= Variant.EXTENDED:
            sampled_R = self._sample_extended(logits_RV, built.row_slot)
        else:
            sampled_R = ops.sample(logits_RV, built.row_slot, state.lines)
        # 5 commit: append to history, advance, report
        ops.commit(
            state.lines,
            state.tokens,
            state.counter,
            state.ring,
            built.row_slot,
            built.query_start,
            built.kv_len,
            sampled_R,
        )
        return StepOutput(logits_RV, sampled_R)

    def _sample_extended(self, logits_RV: Tensor, row_slot_R: Tensor) -> Tensor:
        """Sample under penalties, biases, bans and masks, and report log-probabilities. Rows that ask for none of it get the
        token that the plain variant gives them."""
        state, R = self.state, self.shape.num_rows
        processed_RV = self.buffers.processed[:R]
        ops.process_logits(
            logits_RV,
            row_slot_R,
            state.lines,
            state.tokens,
            state.biases,
            state.bad_words,
            state.masks,
            self.buffers.counts[:R],
            processed_RV,
        )
        sampled_R = ops.sample(processed_RV, row_slot_R, state.lines)
        count_R = state.lines.index_select(0, row_slot_R)[:, slot_line.NUM_LOGPROBS].contiguous()
        ops.logprobs(logits_RV, sampled_R, count_R, state.counter, state.logprob_ring, 0)
        return sampled_R

    def _report_prompts(self, built: ops.BuiltStep, hidden_TE: Tensor) -> None:
        """Report the log-probability of every prompt token's successor, a chunk of tokens at a time: logits of all tokens at
        once could take more memory than the model."""
        state, T, R = self.state, self.shape.num_tokens, self.shape.num_rows
        token_T = torch.arange(T, dtype=torch.int32, device=hidden_TE.device)
        row_T = torch.searchsorted(built.query_start[1:], token_T, right=True, out_int32=True).clamp_(max=R - 1)
        slot_T = built.row_slot.index_select(0, row_T)
        lines_TL = state.lines.index_select(0, slot_T)
        next_T = built.positions + 1
        in_prompt_T = (next_T < lines_TL[:, slot_line.PROMPT_LENGTH]) & (token_T < built.query_start[-1])
        count_T = lines_TL[:, slot_line.NUM_PROMPT_LOGPROBS] * in_prompt_T
        target_T = state.tokens[slot_T, next_T * in_prompt_T]
        chunk = self.buffers.logits.shape[0]
        for start in range(0, T, chunk):
            part = slice(start, min(start + chunk, T))
            logits_CV = self.model.logits(hidden_TE[part], out=self.buffers.logits[: part.stop - start])
            ops.logprobs(logits_CV, target_T[part], count_T[part], state.counter, state.prompt_logprob_ring, start)
