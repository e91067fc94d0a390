from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import key_words, slot_line, slot_lines
from torch import Tensor

from stepgraph import ops
from stepgraph.abi import slot_line as columns
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.remember import reference
from stepgraph.ops.remember import triton as kernels
from stepgraph.step.program import StepOutput

KEY = (5 << 56) + 7
Remember = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """Requests in slots 1, 2, …: (prompt, answer); a slot's memory key is KEY times its number. A step's rows are (slot,
    finished). The memory holds 100, 101, …, of key 0."""

    slots: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    rows: tuple[tuple[int, bool], ...]
    size: int
    cursor: int = 0

    def tensors(self) -> list[Tensor]:
        lines = slot_lines(
            *(
                slot_line(length=len(prompt + answer), prompt_length=len(prompt), memory_key=KEY * slot)
                for slot, (prompt, answer) in enumerate(self.slots, start=1)
            )
        )
        max_len = max(len(prompt + answer) for prompt, answer in self.slots) + 2
        tokens = torch.full((1 + len(self.slots), max_len), 77, dtype=torch.int32)
        for slot, (prompt, answer) in enumerate(self.slots, start=1):
            tokens[slot, : len(prompt + answer)] = torch.tensor(prompt + answer)
        memory = torch.arange(100, 100 + self.size, dtype=torch.int32)
        cursor = torch.tensor([self.cursor], dtype=torch.int32)
        row_slot = torch.tensor([slot for slot, _ in self.rows], dtype=torch.int32)
        keys = torch.zeros(self.size, 2, dtype=torch.int32)
        return [memory, keys, cursor, lines, tokens, row_slot, torch.tensor([finished for _, finished in self.rows])]


def _expected(case: Case) -> tuple[list[int], int]:
    """What the documentation of `remember` says, a token at a time: the memory and the cursor."""
    memory, cursor = list(range(100, 100 + case.size)), case.cursor
    for slot, finished in case.rows:
        answer = case.slots[slot - 1][1] if slot else ()
        kept = answer[-(case.size // 8) :] if case.size >= 8 else ()
        for token in (*kept, -1) if finished and kept else ():
            memory[cursor] = token
            cursor = (cursor + 1) % case.size
    return memory, cursor


def _expected_keys(case: Case) -> list[int]:
    keys, cursor = [0] * case.size, case.cursor
    for slot, finished in case.rows:
        num_kept = min(len(case.slots[slot - 1][1]), case.size // 8) if slot else 0
        for _ in range(num_kept + 1 if finished and num_kept else 0):
            keys[cursor] = KEY * slot
            cursor = (cursor + 1) % case.size
    return keys


def _run(remember: Remember, case: Case, device: str = "cpu") -> tuple[list[int], int]:
    tensors = [tensor.to(device) for tensor in case.tensors()]
    before = [tensor.clone() for tensor in tensors[3:]]
    remember(*tensors)
    assert all(torch.equal(left, right) for left, right in zip(before, tensors[3:], strict=True))
    memory, keys, cursor = tensors[:3]
    assert torch.equal(keys.cpu(), key_words(*_expected_keys(case)))
    return memory.tolist(), int(cursor)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    token = st.integers(0, 9)
    texts = st.tuples(st.lists(token, min_size=1, max_size=4).map(tuple), st.lists(token, max_size=9).map(tuple))
    slots = tuple(draw(st.lists(texts, min_size=1, max_size=12)))
    rows = draw(st.permutations(range(1, 1 + len(slots))))
    rows = [(slot, draw(st.booleans())) for slot in [0, *rows]]
    size = draw(st.integers(0, 60))
    return Case(slots, tuple(rows), size, cursor=draw(st.integers(0, max(0, size - 1))))


@settings(max_examples=200)
@given(_cases())
def test_reference_remembers_what_the_documentation_says(case: Case) -> None:
    assert _run(reference.remember, case) == _expected(case)


@settings(max_examples=60)
@given(case=_cases())
def test_triton_remembers_what_the_documentation_says(device: str, case: Case) -> None:
    assert _run(kernels.remember, case, device) == _expected(case)


@pytest.fixture(params=["reference", "triton"])
def remember(request: pytest.FixtureRequest, device: str) -> Callable[[Case], tuple[list[int], int]]:
    """Either kernel."""
    if request.param == "reference":
        return lambda case: _run(reference.remember, case)
    return lambda case: _run(kernels.remember, case, device)


def test_an_answer_is_kept_without_its_prompt_and_closed_by_a_separator(remember) -> None:
    memory, cursor = remember(Case((((1, 2), (3, 4)), ((5,), (6,))), rows=((1, True), (2, False)), size=24, cursor=2))
    assert memory == [100, 101, 3, 4, -1, *range(105, 124)]
    assert cursor == 5


def test_answers_of_one_step_follow_each_other_in_the_order_of_its_rows(remember) -> None:
    case = Case(
        (((1,), (2, 3)), ((1,), (4,)), ((1,), ()), ((1,), (5, 6, 7))), rows=((4, True), (3, True), (1, True)), size=24
    )
    assert remember(case) == ([5, 6, 7, -1, 2, 3, -1, *range(107, 124)], 7)


def test_a_long_answer_keeps_its_last_tokens(remember) -> None:
    assert remember(Case((((1,), tuple(range(2, 12))),), rows=((1, True),), size=16)) == (
        [10, 11, -1, *range(103, 116)],
        3,
    )


def test_the_ring_wraps_around_and_overwrites_the_oldest(remember) -> None:
    case = Case((((1,), (2, 3, 4)),), rows=((1, True),), size=24, cursor=22)
    assert remember(case) == ([4, -1, *range(102, 122), 2, 3], 2)


def test_more_than_the_ring_holds_leaves_the_last_rows(remember) -> None:
    slots = range(1, 9)
    case = Case(tuple(((0,), (slot, slot)) for slot in slots), tuple((slot, True) for slot in slots), size=16)
    assert remember(case) == ([6, -1, 7, 7, -1, 8, 8, -1, -1, 4, 4, -1, 5, 5, -1, 6], 8)


def test_an_answer_of_many_blocks_is_kept_whole(remember) -> None:
    answer = tuple(range(5000))
    case = Case((((7,), answer),), rows=((0, True), (1, True)), size=8 * 5000, cursor=8 * 5000 - 2500)
    memory, cursor = remember(case)
    assert (*memory[-2500:], *memory[:2501]) == (*answer, -1)
    assert cursor == 2501


def test_what_is_remembered_is_found_by_the_next_request_of_its_key() -> None:
    memory, keys, cursor, lines, tokens, row_slot, finished = Case(
        (((1,), (2, 3, 4, 5)), ((9,), (2, 3)), ((9,), (2, 3))), rows=((1, True), (2, False), (3, False)), size=64
    ).tensors()
    memory.fill_(-1)
    lines[2, columns.MEMORY_KEY :][: columns.MEMORY_KEY_WIDTH] = lines[1, columns.MEMORY_KEY :][
        : columns.MEMORY_KEY_WIDTH
    ]
    ops.remember(memory, keys, cursor, lines, tokens, row_slot, finished)
    drafts, match_len, count = ops.lookup(row_slot, lines, tokens, memory, keys, 4, 2, 8, False)
    assert (drafts[1].tolist(), match_len[1].tolist(), count[1].tolist()) == ([4, 5, 0, 0], 2, 2)
    assert (drafts[2].tolist(), match_len[2].tolist(), count[2].tolist()) == ([0, 0, 0, 0], 0, 0), "of another key"


def test_a_captured_step_remembers_only_when_replayed_and_follows_its_buffers() -> None:
    case = Case((((1, 2), (3, 4)),), rows=((1, False),), size=24)
    memory, keys, cursor, lines, tokens, row_slot, finished = case.tensors()

    def program() -> StepOutput:
        ops.remember(memory, keys, cursor, lines, tokens, row_slot, finished)
        return StepOutput(memory, cursor)

    graph = CpuBackend().capture(program, warmups=1)
    graph.replay()
    assert (memory.tolist(), int(cursor)) == (list(range(100, 124)), 0)
    finished.fill_(True)
    graph.replay()
    assert (memory[:3].tolist(), int(cursor)) == ([3, 4, -1], 3)
