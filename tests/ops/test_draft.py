from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.draft import reference
from stepgraph.ops.draft import triton as kernels

MAX_LEN, BLOCK_SIZE, DEPTH = 40, 4, 3


@dataclass(frozen=True)
class Case:
    """A step that was just committed: `lines` are those after it."""

    lines: Tensor
    rows: list[tuple[int, int]]  # slot, tokens it ran
    fallen: list[int]  # of these, the last so many do not stand

    @property
    def tokens(self) -> Tensor:
        """Every token has its own number."""
        tokens = torch.arange(len(self.lines) * MAX_LEN, dtype=torch.int32).view(-1, MAX_LEN) + 1000
        tokens[line.NULL_SLOT] = 0
        return tokens

    @property
    def block_table(self) -> Tensor:
        """So has every block."""
        table = torch.arange(len(self.lines) * MAX_LEN // BLOCK_SIZE, dtype=torch.int32).view(len(self.lines), -1)
        table[line.NULL_SLOT] = line.NULL_BLOCK
        return table

    def room(self, slot: int) -> int:
        """Proposals that the slot's request takes now."""
        length, computed, active, max_length, most = self.lines[
            slot, [line.LENGTH, line.COMPUTED, line.ACTIVE, line.MAX_LENGTH, line.MAX_NUM_DRAFTS]
        ].tolist()
        return max(0, min(most, max_length - length - 1)) if active and computed == length - 1 else 0


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """Decodes that verified proposals, chunks of prompts, rows that had ended or ended now, and padding."""
    lines, rows = [], []
    for slot in range(1, draw(st.integers(2, 7))):
        is_chunk, active = draw(st.booleans()), draw(st.integers(0, 3)) > 0
        length = draw(st.integers(2, MAX_LEN - 1))
        computed = draw(st.integers(1, length - 1)) if is_chunk else length - 1
        fallen = 0 if is_chunk else draw(st.integers(0, min(line.MAX_DRAFTS, MAX_LEN - 1 - computed)))
        ran = draw(st.integers(1, computed)) + fallen if active or draw(st.booleans()) else 0
        lines.append(
            slot_line(
                length=length,
                computed=computed,
                active=active,
                max_length=draw(st.integers(length + active, MAX_LEN)),
                num_drafts=draw(st.integers(0, 8)),
                max_num_drafts=draw(st.integers(0, 8)),
            )
        )
        rows.append((slot, ran, fallen if ran else 0))
    rows = draw(st.permutations([*rows, *[(0, 0, 0)] * draw(st.integers(0, 2))]))
    return Case(slot_lines(*lines), [(slot, ran) for slot, ran, _ in rows], [fallen for _, _, fallen in rows])


def _check_inputs(ops: ModuleType, case: Case, device: str) -> None:
    starts, positions, next_ids = [0], [], []
    slots, index, kv_len = [], [], []
    for (slot, ran), fallen in zip(case.rows, case.fallen, strict=True):
        computed = int(case.lines[slot, line.COMPUTED])
        end = computed + fallen
        positions += range(end - ran, end)
        next_ids += [int(case.tokens[slot, position + 1]) for position in range(end - ran, end)]
        drafts = ran > 0 and case.room(slot) > 0
        slots.append(slot if drafts else line.NULL_SLOT)
        index.append(starts[-1] + ran - fallen - 1 if drafts else 0)
        starts.append(starts[-1] + ran)
        kv_len.append(end)
    padding = [0] * 3
    inputs = (
        case.lines,
        case.tokens,
        *(torch.tensor(x, dtype=torch.int32) for x in ([slot for slot, _ in case.rows], starts, kv_len)),
        torch.tensor([*positions, *padding, *[0] * len(case.rows)], dtype=torch.int32),
    )
    found = ops.draft_inputs(*(tensor.to(device) for tensor in inputs))
    assert [tensor.tolist() for tensor in found] == [[*next_ids, *padding, *[0] * len(case.rows)], slots, index]


def _check_row_tokens(ops: ModuleType, case: Case, device: str) -> None:
    slots = [slot if case.room(slot) else line.NULL_SLOT for slot, _ in case.rows]
    for place in (1, 2, 7):
        expected = []
        for slot in slots:
            position = int(case.lines[slot, line.COMPUTED]) - 1 + place
            if case.room(slot) > place:
                block = int(case.block_table[slot, position // BLOCK_SIZE])
                expected.append((position, block * BLOCK_SIZE + position % BLOCK_SIZE, slot, position + 1))
            else:
                expected.append((0, 0, line.NULL_SLOT, 1))
        inputs = (case.lines, case.block_table, torch.tensor(slots, dtype=torch.int32))
        positions, kv_slots, row_slot, query_start, kv_len = (
            tensor.tolist()
            for tensor in ops.draft_row_tokens(*(tensor.to(device) for tensor in inputs), place, BLOCK_SIZE)
        )
        assert list(zip(positions, kv_slots, row_slot, kv_len, strict=True)) == expected
        assert query_start == list(range(len(slots) + 1))


def _check_propose(ops: ModuleType, case: Case, device: str, counts: list[int], num_drafts: int) -> None:
    num_rows = len(case.rows)
    drafts = torch.arange(num_rows * num_drafts, dtype=torch.int32).view(num_rows, num_drafts) + 1
    counter, before = torch.tensor([1], dtype=torch.int32), torch.full((DEPTH, num_rows + 1, line.OUTPUT_WIDTH), -7)
    slots = [slot for slot, _ in case.rows]
    lines, tokens, ring = case.lines.to(device, copy=True), case.tokens.to(device), before.to(device, torch.int32)
    row_slot, count = (torch.tensor(x, dtype=torch.int32, device=device) for x in (slots, counts))
    ops.propose(lines, tokens, counter.to(device), ring, row_slot, drafts.to(device), count)

    expected_lines, expected_tokens, ring = case.lines.clone(), case.tokens, ring.cpu()
    for row, slot in enumerate(slots):
        n = max(0, min(counts[row], num_drafts, case.room(slot)))
        length = int(case.lines[slot, line.LENGTH])
        expected_lines[slot, line.NUM_DRAFTS] = n
        expected_tokens[slot, length : length + n] = drafts[row, :n]
        assert ring[0, row, line.OUT_NUM_DRAFTS] == n
        assert ring[0, row, line.OUT_DRAFTS : line.OUT_DRAFTS + n].tolist() == drafts[row, :n].tolist()
    assert lines.tolist() == expected_lines.tolist()
    assert tokens.tolist() == expected_tokens.tolist()
    ring[0, :num_rows, [line.OUT_NUM_DRAFTS, *range(line.OUT_DRAFTS, line.OUT_DRAFTS + num_drafts)]] = -7
    assert (ring == -7).all(), "only the proposals' columns of the step's entry are written"


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest, device: str) -> tuple[ModuleType, str]:
    """Either kernels, and where they run."""
    return (reference, "cpu") if request.param == "reference" else (kernels, device)


Check = Callable[[ModuleType, Case, str], None]
CHECKS = {"draft_inputs": _check_inputs, "draft_row_tokens": _check_row_tokens}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@settings(max_examples=40)
@given(case=_cases())
def test_reference_lays_out_drafting_after_every_step_as_documented(check: Check, case: Case) -> None:
    check(reference, case, "cpu")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@settings(max_examples=25)
@given(case=_cases())
def test_triton_lays_out_drafting_after_every_step_as_documented(check: Check, device: str, case: Case) -> None:
    check(kernels, case, device)


@settings(max_examples=60)
@given(case=_cases(), num_drafts=st.integers(1, line.MAX_DRAFTS), data=st.data())
def test_reference_stores_proposals_as_documented(case: Case, num_drafts: int, data) -> None:
    counts = data.draw(st.lists(st.integers(-1, 10), min_size=len(case.rows), max_size=len(case.rows)))
    _check_propose(reference, case, "cpu", counts, num_drafts)


@settings(max_examples=25)
@given(case=_cases(), num_drafts=st.integers(1, line.MAX_DRAFTS), data=st.data())
def test_triton_stores_proposals_as_documented(device: str, case: Case, num_drafts: int, data) -> None:
    counts = data.draw(st.lists(st.integers(-1, 10), min_size=len(case.rows), max_size=len(case.rows)))
    _check_propose(kernels, case, device, counts, num_drafts)


def test_drafting_starts_after_the_last_token_that_stands(kernel: tuple[ModuleType, str]) -> None:
    """Of 4 tokens that ran, the last 2 fell; the row before has none that did."""
    lines = slot_lines(slot_line(length=9, computed=8), slot_line(length=12, computed=11))
    _check_inputs(kernel[0], Case(lines, [(1, 2), (2, 4), (0, 0)], [0, 2, 0]), kernel[1])


def test_no_proposal_takes_the_place_of_the_last_token_allowed(kernel: tuple[ModuleType, str]) -> None:
    for room in range(1, 5):
        case = Case(slot_lines(slot_line(length=9, computed=8, max_length=9 + room)), [(1, 1)], [0])
        assert case.room(1) == room - 1
        for check in CHECKS.values():
            check(kernel[0], case, kernel[1])
        _check_propose(*(kernel[0], case, kernel[1]), [8], 8)


def test_more_tokens_than_one_program_holds(device: str) -> None:
    lines = [slot_line(length=38, computed=37) for _ in range(9)]
    rows = [(slot, 37) for slot in range(1, 10)]
    _check_inputs(kernels, Case(slot_lines(*lines), rows, [0] * 9), device)
