"""StepProgram: everything the device does in one step. Read this first.

The program is a function of device memory only. It takes no argument that depends on the batch: which requests run, how
long they are and how they are mixed are values in buffers, so a graph captured once is right for every batch that fits its
StepShape. It runs as it stands (eagerly), or captured by a `stepgraph.graph` backend; both do the same operations.

A speculative round is no different: a row of 1 + n tokens verifies n proposals of the step before, and the step ends with
proposals for the next.

Shapes: T tokens, R rows, S samples, of which C and D are worked on at a time, E hidden size, V vocabulary, K proposals of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.layers.cache import LayerCache
from stepgraph.layers.inputs import (
    AttentionSpec,
    AttentionWork,
    DispatchTable,
    GroupInputs,
    LineRows,
    StepInputs,
    WriteSignals,
)
from stepgraph.models.adapters import AdapterStore
from stepgraph.models.language_model import LanguageModel
from stepgraph.ops.rows import row_of
from stepgraph.spec.drafter import Drafter, DraftStep
from stepgraph.step.logits import LogitBuffers
from stepgraph.step.plan import BlockTables
from stepgraph.step.shape import StepShape, Variant
from stepgraph.step.state import SlotState


class StepOutput(NamedTuple):
    """Tensors of the step for checks; the next step of any graph overwrites them.

    What the engine reads is in `SlotState.ring`.
    """

    logits: Tensor  # [S, V], of the last chunk if the samples do not fit into `LogitBuffers` at once
    sampled: Tensor  # [S] int32


@dataclass(frozen=True)
class StepProgram:
    """One step at one StepShape over one set of buffers."""

    model: LanguageModel
    state: SlotState
    caches: tuple[LayerCache, ...]  # the model's
    draft_caches: tuple[LayerCache, ...]  # the drafter's
    buffers: LogitBuffers
    shape: StepShape
    attention: Mapping[AttentionSpec, ops.AttentionGeometry]  # of all layers
    tables: BlockTables
    dispatch: DispatchTable  # of layers with experts
    adapters: AdapterStore | None = None
    drafter: Drafter | None = None
    acceptance: float | None = None
    """Let proposals stand with this probability, whatever the logits say; for tests and measurements."""
    fault: Tensor | None = None
    """[1] int32, not zero once a sum of several ranks lacks a part: nothing is committed any more."""
    signals: WriteSignals | None = None
    """Of the model's layers, and one more of the whole step; None: nobody copies keys and values while a step runs."""

    def __call__(self) -> StepOutput:
        """Run one step of the plan in `state.plan`."""
        state, line_table = self.state, self.state.line_table
        T, R, K = self.shape.num_tokens, self.shape.num_rows, self.shape.num_drafts

        # 1 build: rows → token ids, positions, KV slots, samples, attention work
        tokens, samples = ops.build_step(
            state.plan,
            state.lines,
            state.tokens,
            state.tables,
            T,
            R,
            self.shape.num_samples,
            self.shape.num_deltas(self.tables.block_size, self.tables.per_place),
            self.tables.block_sizes[0],
        )
        attention = {spec: AttentionWork.of(spec, tokens, geometry) for spec, geometry in self.attention.items()}
        # 2 forward: layers over T tokens, their caches written in place
        if self.adapters is not None:
            self.adapters.select(tokens, state.lines)
        inputs = StepInputs(
            tokens,
            attention,
            self._groups(tokens),
            self.caches,
            self.dispatch,
            self.signals,
            None if line_table is None else LineRows.take(line_table, tokens.row_slot),
        )
        hidden_TE = self.model(inputs)
        # 3 logits, 4 sample: after each row's last known token and each of its proposals
        if self.shape.variant >= Variant.PROMPT_LOGPROBS:
            self._report_prompts(tokens, hidden_TE)
        logits_CV, sampled_S = self._sample(samples, hidden_TE)
        if self.acceptance is not None:
            sampled_S = ops.force_acceptance(
                state.lines,
                state.tokens,
                samples.slot,
                samples.offset,
                sampled_S,
                self.acceptance,
                self.model.config.vocab_size,
            )
        # 5 commit: verify, append to history, advance, report
        ops.commit(
            state.lines,
            state.tokens,
            state.counter,
            state.ring,
            tokens.row_slot,
            tokens.query_start,
            tokens.kv_len,
            samples.start,
            sampled_S,
            K,
            self.fault,
        )
        # 6 draft: proposals behind the history
        if self.drafter is not None:
            step = DraftStep(inputs, hidden_TE, state.lines, state.tokens, self.draft_caches, K)
            if K:
                drafts = self.drafter.propose(step)
                ops.propose(state.lines, state.tokens, state.counter, state.ring, tokens.row_slot, *drafts)
            else:
                self.drafter.follow(step)
        if self.signals is not None:
            self.signals.wrote(len(self.caches))
        return StepOutput(logits_CV, sampled_S)

    def _groups(self, tokens: ops.StepTokens) -> tuple[GroupInputs, ...]:
        """What the layers of each block group see."""
        sizes, tables = self.tables.block_sizes, self.state.block_tables
        groups = [GroupInputs(tables[0], tokens, sizes[0])]
        if len(tables) > 1:
            kv_slots = ops.group_slots(self.state.tables, tokens.row_slot, tokens.query_start, tokens.positions, sizes)
            groups += (
                GroupInputs(table, tokens._replace(kv_slots=kv_slots_T), size)
                for table, kv_slots_T, size in zip(tables[1:], kv_slots.unbind(), sizes[1:], strict=True)
            )
        return tuple(groups)

    def _sample(self, samples: ops.StepSamples, hidden_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The last chunk's logits, and all that was sampled."""
        S, C = self.shape.num_samples, self.buffers.logits.shape[0]
        sampled: list[Tensor] = []
        for start in range(0, S, C):
            slot_C, offset_C, index_C = (x_S[start : start + C] for x_S in samples[1:])
            logits_CV = self.model.logits(
                hidden_TE.index_select(0, index_C), out=self.buffers.logits[: slot_C.shape[0]]
            )
            if self.shape.variant >= Variant.EXTENDED:
                sampled += self._sample_extended(logits_CV, slot_C, offset_C, start)
            else:
                sampled.append(ops.sample(logits_CV, slot_C, offset_C, self.state.lines))
        return logits_CV, sampled[0] if len(sampled) == 1 else torch.cat(sampled)

    def _sample_extended(self, logits_CV: Tensor, slot_C: Tensor, offset_C: Tensor, start: int) -> Iterator[Tensor]:
        """Sample under penalties, biases, bans and masks, and report log-probabilities, D samples at a time. Rows that ask for
        none of it get the token that the plain variant gives them."""
        state, (_, processed_DV, counts_DV) = self.state, self.buffers
        assert processed_DV is not None, self.shape
        assert counts_DV is not None, self.shape
        for first in range(0, slot_C.shape[0], processed_DV.shape[0]):
            part = slice(first, first + processed_DV.shape[0])
            logits_DV, slot_D, offset_D = logits_CV[part], slot_C[part], offset_C[part]
            ops.process_logits(
                logits_DV,
                slot_D,
                offset_D,
                state.lines,
                state.tokens,
                state.biases,
                state.bad_words,
                state.masks,
                counts_DV[: slot_D.shape[0]],
                processed_DV[: slot_D.shape[0]],
            )
            sampled_D = ops.sample(processed_DV[: slot_D.shape[0]], slot_D, offset_D, state.lines)
            count_D = state.lines.index_select(0, slot_D)[:, slot_line.NUM_LOGPROBS].contiguous()
            ops.logprobs(logits_DV, sampled_D, count_D, state.counter, state.logprob_ring, start + first)
            yield sampled_D

    def _report_prompts(self, tokens: ops.StepTokens, hidden_TE: Tensor) -> None:
        """Report the log-probability of every prompt token's successor, a chunk of tokens at a time: logits of all tokens at
        once could take more memory than the model."""
        state, T = self.state, self.shape.num_tokens
        token_T = torch.arange(T, dtype=torch.int32, device=hidden_TE.device)
        row_T = row_of(token_T, tokens.query_start[1:])
        slot_T = tokens.row_slot.index_select(0, row_T)
        lines_TL = state.lines.index_select(0, slot_T)
        next_T = tokens.positions + 1
        in_prompt_T = (next_T < lines_TL[:, slot_line.PROMPT_LENGTH]) & (token_T < tokens.query_start[-1])
        count_T = lines_TL[:, slot_line.NUM_PROMPT_LOGPROBS] * in_prompt_T
        target_T = state.tokens[slot_T, next_T * in_prompt_T]
        chunk = self.buffers.logits.shape[0]
        for start in range(0, T, chunk):
            part = slice(start, min(start + chunk, T))
            logits_CV = self.model.logits(hidden_TE[part], out=self.buffers.logits[: part.stop - start])
            ops.logprobs(logits_CV, target_T[part], count_T[part], state.counter, state.prompt_logprob_ring, start)
