"""A device in plain Python for tests of what schedules its steps.

It computes what `build_step`, a model of two layers (or one for each block group) and `commit` compute, in exact integers: a
layer writes every row's entries before any row reads, and a token's value depends on every entry of its context. Two runs can
only agree if every entry they read is the right one.

It proposes too: random numbers of tokens, some of them right. Where the scheduler looks ahead, a draft model's entries are kept
like those of a layer, that of a position being made of all tokens up to `lookahead` after it.

Where there are checkpoints, it has lines for states, too: a line holds all tokens that its state is made of.
"""

import random
from dataclasses import dataclass, field
from functools import cache

from stepgraph.abi import slot_line
from stepgraph.engine.request import Request
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import RowResult, StepResults
from stepgraph.step.slot_sampling import SlotSampling

VOCAB = 11
STOP = 0


def answer_alone(request: Request, window: int | tuple[int, ...] = 0) -> list[int]:
    """What the request must get, whatever runs beside it, where a token sees the last `window` ones of each layer, or as many as
    it says of each; 0: all."""
    sampling = request.sampling
    prompt = tuple(request.prompt_token_ids)
    windows = (window, window) if isinstance(window, int) else window
    return list(_answer(prompt, request.max_length, sampling.seed, sampling.stop_token_ids, windows))


@cache
def _answer(
    prompt: tuple[int, ...], max_length: int, seed: int, stop_token_ids: tuple[int, ...], windows: tuple[int, ...]
) -> tuple[int, ...]:
    tokens = list(prompt)
    layers: list[list[object]] = [[] for _ in windows]
    while len(tokens) < max_length:
        for position in range(len(layers[0]), len(tokens)):
            layers[0].append((position, tokens[position]))
            for before, layer, window in zip(layers, layers[1:], windows, strict=False):
                layer.append(hash(tuple(before[first_seen(position, window) :])))
        tokens.append(next_token(layers[-1][first_seen(len(tokens) - 1, windows[-1]) :], seed))
        if tokens[-1] in stop_token_ids:
            break
    return tuple(tokens[len(prompt) :])


def first_seen(position: int, window: int) -> int:
    return max(0, position - window + 1) if window else 0


def next_token(values: list[int], seed: int) -> int:
    """Depends on every value of the context, on their order, and on the seed."""
    return hash((tuple(values), seed)) % VOCAB


@dataclass
class Slot:
    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)  # what `tokens` will be in the end
    computed: int = 0
    active: bool = False
    generation: int = 0
    max_length: int = 0
    sampling: SlotSampling = field(default_factory=lambda: SlotSampling(seed=0))

    @property
    def room(self) -> int:
        """Proposals that it takes now."""
        if not self.active or self.computed < len(self.tokens) - 1:
            return 0
        return max(0, min(self.sampling.max_num_drafts, self.max_length - len(self.tokens) - 1))


class Device:
    """Slots, block tables, two layers of KV entries or one for each block group, and those of a draft model."""

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        *,
        lookahead: int = 0,
        accuracy: float = 0.7,
        windows: tuple[int, ...] = (0, 0),
        num_groups: int = 1,
        table_width: int | None = None,
    ):
        """A token sees as many of the last ones as `windows` says of each layer; 0: all. If there are groups, layers are one of
        each, and have the same memory. `accuracy` is the chance that a proposal is right; if all are, there are as many as a
        request takes. `table_width`: of blocks; behind it are a slot's lines. None: there are none."""
        self.slots = [Slot() for _ in range(num_slots + 1)]
        self.block_table: dict[tuple[int, int], int] = {}
        self.num_blocks, self.block_size = num_blocks, block_size
        self.limits = [0] * (num_slots + 1)
        """Positions that a slot may write; set before each step."""
        self._lookahead, self._accuracy, self._windows, self._num_groups = lookahead, accuracy, windows, num_groups
        self._random = random.Random(0)
        self._table_width = table_width
        self._lines = [
            [0, 0, 0] for _ in self.slots
        ]  # that the next step reads and writes, and that the one after writes
        self.forget()

    def forget(self) -> None:
        """Lose the KV cache's content."""
        shared: dict[tuple[int, int], object] = {}
        self.kv = [shared if self._num_groups > 1 else {} for _ in self._windows]
        self.draft_kv: dict[tuple[int, int], object] = {}
        self.states: dict[int, list[int]] = {}

    def admit(self, admission: Admission) -> None:
        """What `SlotState.admit` does with what the engine gives it."""
        slot, tokens, prompt_len, generation, max_length, sampling, blocks, computed, lines = admission
        if self._table_width is not None:
            self._lines[slot] = [*lines, lines[1]]
        for index, block in enumerate(blocks):
            self.block_table[slot, index] = block
        prompt = tuple(tokens[:prompt_len])
        answer = _answer(prompt, max_length, sampling.seed, sampling.stop_token_ids, self._windows)
        whole = [*prompt, *answer]
        self.slots[slot] = Slot(list(tokens), [], whole, computed, True, generation, max_length, sampling)

    def set_masks(self, slot, masks) -> None:
        raise AssertionError("it knows none")

    def run(self, plan: StepPlan) -> StepResults:
        for slot, index, block in plan.deltas:
            if self._table_width is not None and index >= self._table_width:
                self._lines[slot][index - self._table_width] = block
            else:
                assert 0 < block < self.num_blocks
                self.block_table[slot, index] = block
        spans = [self._span(index, bound) for index, bound in plan.rows]
        known = [[*self.slots[i].tokens, *self.slots[i].drafts] for i, _ in plan.rows]
        values = [list(enumerate(tokens))[a:b] for tokens, (a, b) in zip(known, spans, strict=True)]
        for number, (layer, window) in enumerate(zip(self.kv, self._windows, strict=True)):
            for (index, _), (start, end), row in zip(plan.rows, spans, values, strict=True):
                for position in range(start, end):
                    self._write(layer, number, index, position, row[position - start])
            for row, ((index, _), (start, end)) in enumerate(zip(plan.rows, spans, strict=True)):
                first = first_seen(start, window)
                context = [layer[self._entry(number, index, position)] for position in range(first, end)]
                values[row] = [
                    hash(tuple(context[first_seen(position, window) - first : position + 1 - first]))
                    for position in range(start, end)
                ]
        if self._table_width is not None:
            self._read_states(plan)
        results = [self._commit(index, span) for (index, _), span in zip(plan.rows, spans, strict=True)]
        if self._table_width is not None:
            self._write_states(plan)
        if self._lookahead:
            for (index, _), span in zip(plan.rows, spans, strict=True):
                self._follow(index, span)
        return StepResults.of(
            [
                result._replace(num_drafts=self._propose(index, plan.num_drafts))
                for result, (index, _) in zip(results, plan.rows, strict=True)
            ]
        )

    def _read_states(self, plan: StepPlan) -> None:
        read, written = ([self._lines[slot][which] for slot, _ in plan.rows] for which in (0, 1))
        assert 0 not in (*read, *written)
        assert len(set(written)) == len(written)
        for (slot, _), line, own in zip(plan.rows, read, written, strict=True):
            assert line == own or line not in written
            state = self.slots[slot]
            assert (
                not state.active or self.states.get(line if state.computed else 0, []) == state.tokens[: state.computed]
            )

    def _write_states(self, plan: StepPlan) -> None:
        for slot, _ in plan.rows:
            _, own, following = self._lines[slot]
            self.states[own] = self.slots[slot].tokens[: self.slots[slot].computed]
            self._lines[slot] = [own, following, following]

    def _span(self, index: int, bound: int) -> tuple[int, int]:
        slot = self.slots[index]
        wants = len(slot.tokens) + len(slot.drafts) - slot.computed if slot.active else 0
        return slot.computed, slot.computed + min(bound, wants)

    def _commit(self, index: int, span: tuple[int, int]) -> RowResult:
        slot = self.slots[index]
        start, end = span
        length, drafts = len(slot.tokens), slot.drafts
        slot.drafts = []
        if start == end or end < length:
            slot.computed = end
            return RowResult(index, slot.generation, slot_line.RUNNING, 0)
        last, window = len(self.kv) - 1, self._windows[-1]
        first = first_seen(length - 1, window)
        values = [self.kv[last][self._entry(last, index, position)] for position in range(first, end)]
        num_verified, num_accepted = end - length, 0
        finish, stands = slot_line.RUNNING, True
        while stands:
            place = len(slot.tokens) - length
            seen = values[first_seen(length + place - 1, window) - first : length + place - first]
            token = next_token(seen, slot.sampling.seed)
            slot.tokens.append(token)
            stands = place < num_verified and drafts[place] == token
            num_accepted += stands
            if token in slot.sampling.stop_token_ids:
                finish = slot_line.FINISHED_STOP
            elif len(slot.tokens) >= slot.max_length:
                finish = slot_line.FINISHED_LENGTH
            stands = stands and finish == slot_line.RUNNING
        new = slot.tokens[length:]
        slot.computed = len(slot.tokens) - 1
        slot.active = finish == slot_line.RUNNING
        return RowResult(index, slot.generation, finish, len(new), num_verified, num_accepted, tokens=new)

    def _follow(self, index: int, span: tuple[int, int]) -> None:
        """The draft model's entries of a step's tokens, and of those before that lacked tokens after them."""
        tokens = self.slots[index].tokens
        for position in range(max(0, span[0] - self._lookahead + 1), span[1]):
            self._write(self.draft_kv, -1, index, position, self._draft_entry(tokens, position))

    def _draft_entry(self, tokens: list[int], position: int) -> object:
        end = position + 1 + self._lookahead
        return hash(tuple(tokens[:end])) if end <= len(tokens) else "made of proposals"

    def _propose(self, index: int, num_drafts: int) -> int:
        slot = self.slots[index]
        room = min(slot.room, num_drafts)
        if self._lookahead and room:
            end = slot.computed - self._lookahead + 1
            for position in range(first_seen(end - 1, self._windows[-1]), end):
                entry = self.draft_kv[self._entry(-1, index, position)]
                assert entry == self._draft_entry(slot.tokens, position), (index, position)
            for place in range(1, room):
                self._write(self.draft_kv, -1, index, slot.computed - 1 + place, "made of proposals")
        right = slot.whole[len(slot.tokens) :]
        slot.drafts = [
            right[place]
            if place < len(right) and self._random.random() < self._accuracy
            else self._random.randrange(VOCAB)
            for place in range(room if self._accuracy == 1 else self._random.randint(0, room))
        ]
        return len(slot.drafts)

    def _write(
        self, layer: dict[tuple[int, int], object], number: int, index: int, position: int, value: object
    ) -> None:
        assert position < self.limits[index], "no block was granted for it"
        layer[self._entry(number, index, position)] = value

    def _entry(self, layer: int, index: int, position: int) -> tuple[int, int]:
        """Where an entry of a layer is; the draft model's layer is in the group of the last one."""
        place, group = position // self.block_size, layer % self._num_groups
        return self.block_table[index, place * self._num_groups + group], position % self.block_size
