"""The scheduler against a model of the device in plain Python, which computes tokens from the KV entries it is given."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.errors import RequestError
from stepgraph.ops import slot_line
from stepgraph.step.plan import StepKind, StepPlan
from stepgraph.step.runner import RowResult
from stepgraph.step.shape import StepShape

VOCAB = 11
STOP = 0


def next_token(context: tuple[int, ...]) -> int:
    """Depends on every token of the context and on their order."""
    return hash(context) % VOCAB


def answer_alone(request: Request) -> list[int]:
    """What the request must get, whatever runs beside it."""
    tokens = list(request.prompt_token_ids)
    while len(tokens) < request.max_length:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens[request.prompt_len :]


@dataclass
class Slot:
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    active: bool = False
    generation: int = 0
    max_length: int = 0
    stop_token_ids: tuple[int, ...] = ()


class Device:
    """What `build_step`, a model and `commit` do: attention reads the block table and nothing else."""

    def __init__(self, num_slots: int, num_blocks: int, block_size: int):
        self.slots = [Slot() for _ in range(num_slots + 1)]
        self.block_table: dict[tuple[int, int], int] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.num_blocks, self.block_size = num_blocks, block_size

    def admit(self, request: Request) -> None:
        self.slots[request.slot] = Slot(
            list(request.prompt_token_ids), 0, True, request.generation, request.max_length, request.stop_token_ids
        )

    def run(self, plan: StepPlan) -> list[RowResult]:
        for slot, index, block in plan.deltas:
            assert 0 < block < self.num_blocks
            self.block_table[slot, index] = block
        return [self._run_row(index, min(bound, self._wants(index))) for index, bound in plan.rows]

    def _wants(self, index: int) -> int:
        slot = self.slots[index]
        return len(slot.tokens) - slot.computed if slot.active else 0

    def _run_row(self, index: int, query_len: int) -> RowResult:
        slot = self.slots[index]
        for position in range(slot.computed, slot.computed + query_len):
            self.kv[self._entry(index, position)] = slot.tokens[position]
        slot.computed += query_len
        if not query_len or slot.computed < len(slot.tokens):
            return RowResult(index, slot.generation, slot_line.NO_TOKEN, slot_line.RUNNING)
        token = next_token(tuple(self.kv[self._entry(index, position)] for position in range(slot.computed)))
        slot.tokens.append(token)
        finish = slot_line.RUNNING
        if token in slot.stop_token_ids:
            finish = slot_line.FINISHED_STOP
        elif len(slot.tokens) >= slot.max_length:
            finish = slot_line.FINISHED_LENGTH
        slot.active = finish == slot_line.RUNNING
        return RowResult(index, slot.generation, token, finish)

    def _entry(self, index: int, position: int) -> tuple[int, int]:
        return self.block_table[index, position // self.block_size], position % self.block_size


class Loop:
    """The engine's loop around a scheduler; checks every plan."""

    def __init__(self, *, max_num_seqs=4, max_tokens=16, num_kv_blocks=33, block_size=4, run_ahead=0):
        self.limits = (max_num_seqs, max_tokens)
        self.block_size, self.run_ahead = block_size, run_ahead
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs, max_tokens=max_tokens, num_kv_blocks=num_kv_blocks, block_size=block_size
        )
        self.device = Device(max_num_seqs, num_kv_blocks, block_size)
        self.in_flight: deque[list[RowResult]] = deque()
        self.plans: list[StepPlan] = []
        self.admitted: list[str] = []
        self.updates = []
        self._chunks: dict[str, int] = {}  # prompt tokens planned

    def add(self, id: str, prompt_len: int = 5, max_tokens: int = 6, stop: bool = False) -> Request:
        prompt = [(7 * i + len(id) + sum(map(ord, id))) % VOCAB for i in range(prompt_len)]
        request = Request(id, prompt, SamplingParams(), (STOP,) if stop else (), prompt_len + max_tokens, seed=0)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            for request in scheduled.admitted:
                self.device.admit(request)
                self.admitted.append(request.id)
            self._check(scheduled.plan)
            self.plans.append(scheduled.plan)
            self.in_flight.append(self.device.run(scheduled.plan))
        if self.in_flight and (scheduled is None or len(self.in_flight) > self.run_ahead):
            self.updates += self.scheduler.reconcile(self.in_flight.popleft())

    def drain(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_requests and not self.in_flight:
                return
            self.step()
        raise AssertionError("the requests never end")

    def _check(self, plan: StepPlan) -> None:
        max_rows, max_tokens = self.limits
        assert 1 <= len(plan.rows) <= max_rows
        assert plan.num_tokens <= max_tokens
        assert all(bound >= 1 for _, bound in plan.rows)
        slots = [slot for slot, _ in plan.rows]
        assert len(set(slots)) == len(slots)
        assert len(plan.deltas) <= StepShape(plan.num_tokens, len(plan.rows)).num_deltas(self.block_size)
        running = {request.slot: request for request in self.scheduler.running()}
        assert set(slots) <= set(running)
        blocks = [block for request in running.values() for block in request.blocks]
        assert len(set(blocks)) == len(blocks)
        assert slot_line.NULL_BLOCK not in blocks

        num_decodes = len(plan.rows) - plan.num_prefill_rows
        prefills = [(running[slot], bound) for slot, bound in plan.rows[num_decodes:]]
        assert all(bound == 1 for _, bound in plan.rows[:num_decodes])
        for number, (request, bound) in enumerate(prefills, start=1):
            planned = self._chunks[request.id] = self._chunks.get(request.id, 0) + bound
            assert planned <= request.prompt_len
            if planned < request.prompt_len:  # only a step that is full cuts a prompt, and only the newest it holds
                assert number == len(prefills)
                assert plan.num_tokens == max_tokens


requests_of = st.lists(
    st.tuples(
        st.integers(0, 40),  # step of arrival
        st.integers(1, 45),  # prompt length
        st.integers(1, 20),  # max_tokens
        st.booleans(),  # has a stop token
        st.one_of(st.none(), st.integers(0, 25)),  # steps until it is aborted
    ),
    min_size=1,
    max_size=14,
)


@given(
    requests=requests_of,
    max_num_seqs=st.integers(1, 5),
    spare_tokens=st.integers(0, 20),
    num_kv_blocks=st.integers(18, 60),
    block_size=st.sampled_from([4, 8, 16]),
    run_ahead=st.integers(0, 2),
)
@settings(max_examples=300)
def test_any_arrivals_get_the_tokens_they_get_alone_and_leave_nothing_behind(
    requests, max_num_seqs, spare_tokens, num_kv_blocks, block_size, run_ahead
) -> None:
    loop = Loop(
        max_num_seqs=max_num_seqs,
        max_tokens=max_num_seqs + spare_tokens,
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        run_ahead=run_ahead,
    )
    arrivals = sorted(enumerate(requests), key=lambda entry: entry[1][0])
    added: dict[str, Request] = {}
    aborts: dict[str, int] = {}
    aborted: set[str] = set()
    step = 0
    while arrivals or aborts or loop.scheduler.has_requests or loop.in_flight:
        while arrivals and arrivals[0][1][0] <= step:
            number, (_, prompt_len, max_tokens, stop, abort_after) = arrivals.pop(0)
            request = loop.add(f"r{number}", prompt_len, max_tokens, stop)
            added[request.id] = request
            if abort_after is not None:
                aborts[request.id] = step + abort_after
        for id in [id for id, when in aborts.items() if when <= step]:
            del aborts[id]
            update = loop.scheduler.abort(id)
            if update is not None:
                aborted.add(id)
                assert (update.request, update.finish_reason) == (added[id], FinishReason.ABORT)
        loop.step()
        step += 1
        assert step < 3000, "the requests never end"

    for id, request in added.items():
        expected = answer_alone(request)
        tokens = request.output_token_ids
        assert [
            token for update in loop.updates if update.request is request for token in update.new_token_ids
        ] == tokens
        if id in aborted:
            assert request.finish_reason is FinishReason.ABORT
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            stopped = bool(request.stop_token_ids) and tokens[-1] == STOP
            assert request.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert request.stop_token == (STOP if stopped else None)
    arrived = [id for id in added if id in loop.admitted]
    assert loop.admitted == arrived  # first come, first served

    assert (loop.scheduler.num_running, loop.scheduler.num_waiting) == (0, 0)
    assert loop.scheduler.num_free_blocks == num_kv_blocks - 1
    everything = loop.add("all blocks", 1, (num_kv_blocks - 1) * block_size)  # one that needs all that was given back
    loop.drain()
    assert everything.output_token_ids == answer_alone(everything)
    many = [loop.add(f"slot {i}", 1, 3) for i in range(max_num_seqs)]
    loop.step()
    assert len(loop.plans[-1].rows) == max_num_seqs
    loop.drain()
    assert [request.output_token_ids for request in many] == [answer_alone(request) for request in many]


def test_a_prompt_longer_than_a_step_is_cut_and_several_prompts_share_a_step() -> None:
    loop = Loop(max_tokens=16)
    loop.add("long", 37, 2)
    loop.add("short", 6, 4)
    loop.drain()
    assert [[bound for _, bound in plan.rows] for plan in loop.plans[:4]] == [[16], [16], [5, 6], [1, 1]]
    assert [plan.kind for plan in loop.plans[:4]] == [StepKind.PREFILL] * 3 + [StepKind.DECODE]


def test_decodes_come_first_and_prompts_fill_what_is_left_of_the_step() -> None:
    loop = Loop(max_tokens=16)
    loop.add("running", 3, 20)
    loop.step()
    loop.add("long", 40, 2)
    for _ in range(2):
        loop.step()
    assert [[bound for _, bound in plan.rows] for plan in loop.plans[1:]] == [[1, 15], [1, 15]]
    assert loop.plans[1].kind is StepKind.MIXED


def test_a_request_that_must_wait_for_memory_is_not_overtaken() -> None:
    loop = Loop(num_kv_blocks=11, block_size=4)  # 10 blocks
    loop.add("a", 8, 17)  # 6 of them
    loop.add("b", 8, 17)
    loop.add("c", 1, 2)  # would fit at once
    loop.step()
    assert loop.admitted == ["a"]
    assert (loop.scheduler.num_running, loop.scheduler.num_waiting) == (1, 2)
    loop.drain()
    assert loop.admitted == ["a", "b", "c"]


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_rows_planned_before_the_end_of_their_request_was_known_are_dropped(run_ahead) -> None:
    """The next user of the slot gets its own tokens only, though steps of the one before are still in flight."""
    loop = Loop(max_num_seqs=1, run_ahead=run_ahead)
    requests = [loop.add(f"r{i}", 3, 12, stop=True) for i in range(12)]
    assert any(len(answer_alone(request)) < 12 for request in requests)
    loop.drain()
    for request in requests:
        assert request.output_token_ids == answer_alone(request)
        assert request.generation == requests.index(request) + 1


def test_steady_decoding_plans_the_same_rows_and_asks_for_no_block_but_at_borders() -> None:
    loop = Loop(block_size=16)
    loop.add("a", 3, 12)
    loop.drain()
    assert {plan.rows for plan in loop.plans[1:]} == {((1, 1),)}
    assert [len(plan.deltas) for plan in loop.plans] == [1] + [0] * 11


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    loop = Loop(num_kv_blocks=9, block_size=4)
    loop.add("fits", 20, 13)  # the last token is never cached: 32 entries
    with pytest.raises(
        RequestError, match=r"KV blocks for 33 tokens \(9 blocks of 4\), and the cache has 8; lower max_tokens"
    ):
        loop.add("too large", 20, 14)
    assert loop.scheduler.num_waiting == 1


def test_an_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    loop = Loop()
    loop.add("a")
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        loop.add("a")
    loop.drain()
    loop.add("a")


def test_abort_of_a_request_that_is_unknown_or_has_ended_does_nothing() -> None:
    loop = Loop()
    loop.add("a")
    assert loop.scheduler.abort("b") is None
    loop.drain()
    assert loop.scheduler.abort("a") is None
    assert loop.scheduler.schedule() is None
