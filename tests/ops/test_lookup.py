from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import key_words, slot_line, slot_lines
from torch import Tensor

from stepgraph import ops
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.lookup import cpu, reference
from stepgraph.ops.lookup import triton as kernels

BIG = 1 << 20
KEYS = (0, 1, 1 << 32, (1 << 64) - 1)


@dataclass(frozen=True)
class Row:
    """A request: what it has said, its memory key, and whether it still runs."""

    history: tuple[int, ...]
    key: int = 0
    active: bool = True
    max_length: int = BIG


@dataclass(frozen=True)
class Case:
    """Requests in slots 1, 2, …; `rows` are the slots of the step's rows."""

    slots: tuple[Row, ...]
    rows: tuple[int, ...] = (1,)
    memory: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()  # of the memory's tokens; none given: all 0
    num_drafts: int = 4
    min_match: int = 1
    max_match: int = 4
    adaptive: bool = False

    def arguments(self, device: str) -> list:
        lines = slot_lines(
            *(
                slot_line(length=len(row.history), active=row.active, max_length=row.max_length, memory_key=row.key)
                for row in self.slots
            )
        )
        max_len = max(len(row.history) for row in self.slots) + 3
        tokens = torch.ones(1 + len(self.slots), max_len, dtype=torch.int32)  # ones would match if they were read
        for slot, row in enumerate(self.slots, start=1):
            tokens[slot, : len(row.history)] = torch.tensor(row.history)
        row_slot, memory = (torch.tensor(values, dtype=torch.int32) for values in (self.rows, self.memory))
        keys = key_words(*(self.keys or (0,) * len(self.memory)))
        tensors = [tensor.to(device) for tensor in (row_slot, lines, tokens, memory, keys)]
        return [*tensors, self.num_drafts, self.min_match, self.max_match, self.adaptive]


class Found(NamedTuple):
    """A row's valid drafts, and the length of its match."""

    drafts: list[int]
    match_len: int


class _Results(NamedTuple):
    drafts: Tensor
    match_len: Tensor
    count: Tensor


Find = Callable[[Case], list[Found]]


def _run(lookup: Callable[..., tuple[Tensor, Tensor, Tensor]], case: Case, device: str = "cpu") -> list[Found]:
    arguments = case.arguments(device)
    drafts, match_len, count = lookup(*arguments)
    assert drafts.shape == (len(case.rows), case.num_drafts)
    assert {drafts.dtype, match_len.dtype, count.dtype} == {torch.int32}
    results = zip(drafts.tolist(), match_len.tolist(), count.tolist(), strict=True)
    found = []
    for draft, length, valid in results:
        assert not any(draft[valid:])
        found.append(Found(draft[:valid], length))
    return found


def _matching(text: Sequence[int], position: int, history: Sequence[int], max_match: int) -> int:
    length = 0
    while (
        length < min(max_match, len(history), position)
        and text[position - 1 - length] == history[len(history) - 1 - length]
    ):
        length += 1
    return length


def _expected(case: Case) -> list[Found]:
    """What the documentation of `lookup` says, a position and a token at a time."""
    found = []
    for slot in case.rows:
        row = case.slots[slot - 1] if slot else Row((0,), active=False)
        best, drafts = 0, []
        if row.active:
            history = list(row.history)
            for position in range(1, len(case.memory)):
                length = _matching(case.memory, position, history, case.max_match)
                is_own = row.key == (case.keys[position] if case.keys else 0)
                if is_own and case.memory[position] != -1 and 0 < length >= best:
                    best, drafts = length, []
                    for token in case.memory[position : position + case.num_drafts]:
                        if token == -1:
                            break
                        drafts.append(token)
            for position in range(1, len(history)):
                length = _matching(history, position, history, case.max_match)
                if 0 < length >= best:
                    best, extended = length, list(history)
                    for i in range(case.num_drafts):
                        extended.append(extended[position + i])
                    drafts = extended[len(history) :]
            room = row.max_length - len(history) - 1
            drafts = drafts[: max(0, min(room, best if case.adaptive else room))]
            drafts = drafts if best >= case.min_match else []
        found.append(Found(drafts, best))
    return found


@pytest.fixture(params=["cpu", "triton"])
def find(request: pytest.FixtureRequest, device: str) -> Find:
    """Either kernel."""
    if request.param == "cpu":
        return lambda case: _run(cpu.lookup, case)
    return lambda case: _run(kernels.lookup, case, device)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """Few different tokens, so that matches abound."""
    token = st.integers(0, draw(st.integers(0, 3)))
    keys = st.sampled_from(KEYS[: draw(st.integers(1, len(KEYS)))])
    texts = draw(st.lists(st.tuples(st.lists(token, max_size=12).map(tuple), keys), max_size=4))
    starts = draw(st.booleans())  # with a separator
    memory = [(token, key) for text, key in texts for token in ((-1, *text) if starts else (*text, -1))]
    slots = []
    for _ in range(draw(st.integers(1, 4))):
        history = tuple(draw(st.lists(token, min_size=1, max_size=24)))
        room = draw(st.sampled_from([0, 1, 2, 3, BIG]))
        slots.append(Row(history, draw(keys), active=draw(st.integers(0, 5)) > 0, max_length=len(history) + room))
    min_match = draw(st.integers(1, 3))
    return Case(
        slots=tuple(slots),
        rows=tuple(draw(st.lists(st.integers(0, len(slots)), min_size=1, max_size=6))),
        memory=tuple(token for token, _ in memory),
        keys=tuple(key for _, key in memory),
        num_drafts=draw(st.integers(1, 8)),
        min_match=min_match,
        max_match=draw(st.integers(min_match, 6)),
        adaptive=draw(st.booleans()),
    )


@settings(max_examples=300)
@given(_cases())
def test_reference_finds_what_the_documentation_says(case: Case) -> None:
    assert _run(reference.lookup, case) == _expected(case)


@settings(max_examples=300)
@given(_cases())
def test_cpu_finds_what_the_reference_finds(case: Case) -> None:
    assert _run(cpu.lookup, case) == _run(reference.lookup, case)


@settings(max_examples=40)
@given(case=_cases())
def test_triton_finds_what_the_reference_finds(device: str, case: Case) -> None:
    assert _run(kernels.lookup, case, device) == _run(reference.lookup, case)


def test_many_blocks_and_shares_find_what_the_reference_finds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 9)
    generator = torch.Generator().manual_seed(5)
    for alphabet in (1, 2, 30):
        texts = [torch.randint(0, alphabet, (length,), generator=generator).tolist() for length in (1, 17, 90, 190)]
        memory = [-1 if place % 50 == 49 else token for place, token in enumerate(texts[-1])]
        slots = tuple(Row(tuple(text[:90])) for text in texts)
        case = Case(slots, rows=(4, 2, 0, 3, 1), memory=tuple(memory), max_match=32, num_drafts=8, adaptive=True)
        keyed = replace(case, keys=tuple(KEYS[place // 50] for place in range(len(memory))))
        changes = (case, keyed, replace(case, memory=()), replace(case, rows=(4,)))
        for changed in changes if alphabet == 2 else changes[:1]:
            assert _run(kernels.lookup, changed, device) == _run(reference.lookup, changed)


def test_the_longest_match_beats_a_more_recent_one(find: Find) -> None:
    history = (7, 8, 9, 1, 2, 3, 8, 9, 4, 5, 7, 8, 9)
    assert find(Case((Row(history),))) == [Found([1, 2, 3, 8], 3)]


def test_between_equals_the_most_recent_wins_and_own_history_beats_the_memory(find: Find) -> None:
    case = Case((Row((8, 9, 1, 1, 8, 9, 2, 2, 8, 9)),), memory=(8, 9, 3, 3, -1), max_match=2, num_drafts=2)
    assert find(case) == [Found([2, 2], 2)]
    shorter = Case((Row((9, 1, 9, 2, 8, 9)),), memory=(8, 9, 3, 3, -1, 8, 9, 4, 4, -1), num_drafts=2)
    assert find(shorter) == [Found([4, 4], 2)]


@pytest.mark.parametrize("key", KEYS)
def test_a_text_of_another_key_is_passed_over_however_long_its_match(find: Find, key: int) -> None:
    memory, keys = (1, 2, 3, 4, -1) * len(KEYS), tuple(other for other in KEYS for _ in range(5))
    others = tuple(token + 10 * (other == key) for token, other in zip(memory, keys, strict=True))
    assert find(Case((Row((1, 2, 3), key),), memory=others, keys=keys)) == [Found([], 0)]
    assert find(Case((Row((1, 2, 3), key),), memory=memory, keys=keys)) == [Found([4], 3)]


def test_a_draft_that_reaches_the_end_of_the_history_repeats_itself(find: Find) -> None:
    assert find(Case((Row((5, 6, 1, 2, 3, 1, 2, 3)),), num_drafts=8)) == [Found([1, 2, 3, 1, 2, 3, 1, 2], 3)]
    assert find(Case((Row((4, 4)),), num_drafts=3)) == [Found([4, 4, 4], 1)]


def test_a_history_of_one_token_finds_nothing_but_in_the_memory(find: Find) -> None:
    assert find(Case((Row((3,)),))) == [Found([], 0)]
    assert find(Case((Row((3,)),), memory=(3, 4, -1))) == [Found([4], 1)]


def test_a_match_ends_at_the_start_of_its_text(find: Find) -> None:
    assert find(Case((Row((1, 2, 5, 1, 2)),))) == [Found([5, 1, 2, 5], 2)]
    assert find(Case((Row((6, 1, 2)),), memory=(1, 2, 5))) == [Found([5], 2)]
    assert find(Case((Row((6, 1, 2)),), memory=(6, -1, 1, 2, 5, -1, 9))) == [Found([5], 2)]


def test_a_text_in_the_memory_that_ends_with_the_match_is_passed_over(find: Find) -> None:
    assert find(Case((Row((1, 2, 3)),), memory=(3, 7, -1, 1, 2, 3, -1, 2, 3))) == [Found([7], 1)]


def test_no_history_is_read_beyond_its_end_or_before_its_slot(find: Find) -> None:
    slots = (Row((2, 1)), Row((1, 3, 1, 1)), Row((9,)))  # every buffer goes on with ones
    assert find(Case(slots, rows=(1, 2, 3), max_match=3)) == [Found([], 0), Found([1, 1, 1, 1], 1), Found([], 0)]


def test_slots_that_do_not_run_and_the_null_slot_get_nothing(find: Find) -> None:
    slots = (Row((4, 4, 4), active=False), Row((4, 4, 4)))
    found = find(Case(slots, rows=(0, 1, 2, 0), memory=(4, 4, 5), num_drafts=1))
    assert found == [Found([], 0), Found([], 0), Found([4], 2), Found([], 0)]


@pytest.mark.parametrize(("room", "valid"), [(0, 0), (1, 0), (2, 1), (4, 3), (5, 4), (6, 4)])
def test_drafts_leave_room_for_the_token_that_verification_adds(find: Find, room: int, valid: int) -> None:
    history = (7,) * 6
    assert find(Case((Row(history, max_length=6 + room),))) == [Found([7] * valid, 4)]


def test_the_shortest_match_allowed_drafts_and_one_token_less_does_not(find: Find) -> None:
    case = Case((Row((1, 2, 5, 1, 2)),), num_drafts=1)
    assert find(replace(case, min_match=2)) == [Found([5], 2)]
    assert find(replace(case, min_match=3)) == [Found([], 2)]


def test_adaptive_drafts_are_no_longer_than_their_match(find: Find) -> None:
    case = Case((Row((1, 2, 5, 6, 7, 1, 2)),), adaptive=True)
    assert find(case) == [Found([5, 6], 2)]
    assert find(replace(case, adaptive=False)) == [Found([5, 6, 7, 1], 2)]


def test_a_captured_lookup_is_one_opaque_call_that_follows_its_buffers() -> None:
    before, after = Case((Row((1, 1, 1, 1, 1, 1)),)), Case((Row((5, 6, 1, 2, 5, 6)),))
    buffers = before.arguments("cpu")
    graph = CpuBackend().capture(lambda: _Results(*ops.lookup(*buffers)), warmups=1)
    assert graph.calls.count(torch.ops.stepgraph.lookup.default) == 1
    for buffer, value in zip(buffers[:4], after.arguments("cpu")[:4], strict=True):
        buffer.copy_(value)
    assert [result.tolist() for result in graph.replay()] == [[[1, 2, 5, 6]], [2], [4]]
