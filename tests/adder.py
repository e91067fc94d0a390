"""A device in plain Python for executors and engines: the next token is the sum of all before it."""

from dataclasses import dataclass, replace

from stepgraph.abi import slot_line
from stepgraph.config import CacheConfig, EngineConfig, GraphConfig, SchedulerConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.executor.fake import FakeClock, FakeDevice, FakeExecutor, fake_specs
from stepgraph.models.source import resolve
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import RowResult, StepResults
from stepgraph.step.shape_policy import ShapePolicy

VOCAB = 97
_LIMITS = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=48)


@dataclass
class _Slot:
    tokens: list[int]
    computed: int
    generation: int
    max_length: int
    active: bool = True


class Adder:
    """Slots that add up their tokens, modulo `VOCAB`. A mask counts the tokens that it allows from that sum on."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}
        self._allowed: dict[int, list[int]] = {}

    def admit(self, admission: Admission) -> None:
        slot, tokens = admission.slot, list(admission.tokens)
        self._slots[slot] = _Slot(tokens, admission.computed, admission.generation, admission.max_length)
        if not admission.sampling.masked:
            self._allowed[slot] = list(range(VOCAB))

    def set_masks(self, slot, masks) -> None:
        words, bits = masks[0].tolist(), slot_line.MASK_BITS
        self._allowed[slot] = [token for token in range(VOCAB) if words[token // bits] >> token % bits & 1]

    def forget(self) -> None:
        self._slots.clear()

    def run(self, plan: StepPlan) -> StepResults:
        return StepResults.of([self._run(slot, bound) for slot, bound in plan.rows])

    def _run(self, index: int, bound: int) -> RowResult:
        slot = self._slots[index]
        if slot.active:
            slot.computed += min(bound, len(slot.tokens) - slot.computed)
        if not slot.active or slot.computed < len(slot.tokens):
            return RowResult(index, slot.generation, slot_line.RUNNING, 0)
        allowed = self._allowed[index]
        token = allowed[sum(slot.tokens) % len(allowed)]
        slot.tokens.append(token)
        slot.active = len(slot.tokens) < slot.max_length
        finish = slot_line.RUNNING if slot.active else slot_line.FINISHED_LENGTH
        return RowResult(index, slot.generation, finish, 1, tokens=[token])


def fake_executor(
    device: FakeDevice | None = None, *, kind: type[FakeExecutor] = FakeExecutor, **changes
) -> FakeExecutor:
    """An executor over an Adder, or another device; a step takes a millisecond a token. `changes` are those of its specs."""
    policy = ShapePolicy.of(GraphConfig(), _LIMITS)
    specs = fake_specs(policy, vocab_size=VOCAB, max_model_len=512, num_kv_blocks=257, block_size=16, run_ahead=1)
    specs = replace(specs, can_sleep=True, **changes)
    return kind(device or Adder(), specs, policy, FakeClock(), lambda record: record.num_tokens / 1000)


def engine_over(executor: FakeExecutor) -> Engine:
    """The real engine over such an executor, without a prefix cache."""
    config = EngineConfig(scheduler=_LIMITS, cache=CacheConfig(enable_prefix_caching=False))
    source = resolve("qwen3-0.6b", weights=False)  # whose weights and tokenizer nobody looks at
    return build_engine(config, source=source, executor=executor, clock=executor.clock)
