"""StepProgram: everything the device does in one step. Read this first.

The program is a function of device memory only. It takes no argument that depends on the batch: which requests run, how
long they are and how they are mixed are values in buffers, so a graph captured once is right for every batch that fits its
StepShape. It runs as it stands (eagerly), or captured by a `stepgraph.graph` backend; both do the same operations.

Shapes: T tokens, R rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from stepgraph import ops
from stepgraph.layers.inputs import StepInputs
from stepgraph.models.decoder import Decoder
from stepgraph.step.shape import StepShape
from stepgraph.step.state import SlotState


class StepOutput(NamedTuple):
    """Tensors of the step for checks; the next step of any graph overwrites them.

    What the engine reads is in `SlotState.ring`.
    """

    logits: Tensor  # [R, V]
    sampled: Tensor  # [R] int32


@dataclass(frozen=True)
class StepProgram:
    """One step at one StepShape over one set of buffers."""

    model: Decoder
    state: SlotState
    kv_caches: tuple[tuple[Tensor, Tensor], ...]
    logits: Tensor  # [max rows, V], shared by all shapes: as graph memory it would be kept once per graph
    shape: StepShape
    geometry: ops.AttentionGeometry

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
        attention = ops.attention_plan(
            built.query_start, built.kv_len, config.num_heads, config.num_kv_heads, config.head_dim, self.geometry
        )
        # 2 forward: layers over T tokens, keys and values written in place
        inputs = StepInputs(built, attention, self.geometry, state.block_table, self.kv_caches)
        hidden_TE = self.model(inputs)
        # 3 logits: for each row's last token only
        logits_RV = self.model.logits(hidden_TE.index_select(0, built.logit_index), out=self.logits[:R])
        # 4 sample
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
