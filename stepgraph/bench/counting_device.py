"""A device that only counts, for an engine whose host is looked at: no model, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.bench.workloads import VOCAB_SIZE
from stepgraph.config import EngineConfig, GraphConfig, SchedulerConfig
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.scheduler import Scheduler
from stepgraph.executor.fake import FakeClock, FakeExecutor, fake_specs
from stepgraph.models.source import resolve
from stepgraph.step.admission import Admission
from stepgraph.step.log import StepRecord
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import RowResult, StepResults
from stepgraph.step.shape_policy import ShapePolicy

BLOCK_SIZE = 16
_RUN_AHEAD = 1


def engine_over(
    device: CountingDevice,
    scheduler: SchedulerConfig,
    graph: GraphConfig,
    *,
    num_kv_blocks: int,
    max_model_len: int,
    create_scheduler: Callable[..., Scheduler],
    token_sizes: tuple[int, ...] | None = None,
    step_seconds: Callable[[StepRecord], float] = lambda record: 0.0,
    kv_events: KVEventsConfig | None = None,
) -> tuple[Engine, FakeExecutor]:
    """The real engine over a device that counts, with one step of run-ahead, and what is between them.

    Args:
        device: runs the steps.
        scheduler, graph: settings.
        num_kv_blocks: the null block included.
        max_model_len: most tokens of a prompt and its answer.
        create_scheduler: makes the scheduler.
        token_sizes: what the scheduler takes for captured token counts; default: those that are.
        step_seconds: time of a step.
        kv_events: whom to tell what is in the prefix cache; default: nobody.
    """
    policy = ShapePolicy.of(graph, scheduler)
    specs = fake_specs(
        policy,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        num_kv_blocks=num_kv_blocks,
        block_size=BLOCK_SIZE,
        run_ahead=_RUN_AHEAD,
    )
    if token_sizes is not None:
        specs = replace(specs, token_sizes=token_sizes)
    executor = FakeExecutor(device, specs, policy, FakeClock(), step_seconds)
    engine = build_engine(
        EngineConfig(scheduler=scheduler, graph=graph, kv_events=kv_events or KVEventsConfig()),
        source=resolve("qwen3-0.6b", weights=False),  # whose weights and tokenizer nobody looks at
        executor=executor,
        create_scheduler=create_scheduler,
        clock=executor.clock,
    )
    return engine, executor


class CountingDevice:
    """Slots that count tokens instead of computing them, as `build_step` and `commit` would.

    Args:
        num_slots: without the null slot.
        answer_lens: tokens of the answers of requests by their seeds; those of others run to their limits.
    """

    def __init__(self, num_slots: int, answer_lens: Sequence[int] = ()):
        self.real_tokens = 0
        """Tokens that the last step really ran."""
        self._slots = [_Slot() for _ in range(num_slots + 1)]
        self._answer_lens = answer_lens

    def admit(self, admission: Admission) -> None:
        """See `Executor.admit`."""
        slot, tokens, prompt_len, generation, max_length, sampling, _, computed, _ = admission
        self._slots[slot] = _Slot(
            generation=generation,
            known=len(tokens),
            computed=computed,
            end=prompt_len + self._answer_lens[sampling.seed] if self._answer_lens else max_length,
            max_length=max_length,
            first_token=sampling.seed * 7919,
            active=True,
        )

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """No request has any."""
        raise AssertionError(slot)

    def forget(self) -> None:
        """There is no content."""

    def run(self, plan: StepPlan) -> StepResults:
        """Results of a step."""
        rows = []
        self.real_tokens = 0
        for index, bound in plan.rows:
            slot = self._slots[index]
            ran = min(bound, slot.known - slot.computed) if slot.active else 0
            slot.computed += ran
            self.real_tokens += ran
            tokens: tuple[int, ...] = ()
            finish = slot_line.RUNNING
            if ran and slot.computed == slot.known:
                tokens = ((slot.first_token + slot.known) % VOCAB_SIZE,)
                slot.known += 1
                if slot.known == slot.end:
                    slot.active = False
                    finish = slot_line.FINISHED_LENGTH if slot.end == slot.max_length else slot_line.FINISHED_STOP
            rows.append(RowResult(index, slot.generation, finish, len(tokens), tokens=tokens))
        return StepResults.of(rows)


@dataclass
class _Slot:
    generation: int = 0
    known: int = 0  # tokens of prompt and answer so far
    computed: int = 0
    end: int = 0  # tokens at which the answer is complete
    max_length: int = 0
    first_token: int = 0
    active: bool = False
