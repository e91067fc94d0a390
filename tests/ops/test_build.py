from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor

from stepgraph import ops
from stepgraph.abi import slot_line as line
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.build import StepSamples, StepTokens, reference
from stepgraph.ops.build import triton as kernels

SLOTS, MAX_LEN, BLOCK_SIZE = 7, 40, 4

Build = Callable[..., tuple[Tensor, ...]]
NAMES = (*StepTokens._fields, *(f"sample_{name}" for name in StepSamples._fields))


@dataclass(frozen=True)
class Case:
    """A state and a plan for it."""

    lines: Tensor
    tokens: Tensor
    block_table: Tensor
    rows: list[tuple[int, int]]  # slot, bound
    deltas: list[tuple[int, int, int]]  # slot, index, block

    def plan(self) -> Tensor:
        flat = [value for entry in (*self.rows, *self.deltas) for value in entry]
        return torch.tensor([*flat, 99, 99, 99], dtype=torch.int32)  # a staging buffer is longer than the plan


def _case(rows: list[tuple[int, int]], deltas: list[tuple[int, int, int]], *lines: Tensor) -> Case:
    """Every token and block has its own number, so that a wrong gather shows; those of the null slot are 0."""
    absent = [slot_line(active=False, length=0, computed=0)] * (SLOTS - 1 - len(lines))
    tokens = torch.arange(SLOTS * MAX_LEN, dtype=torch.int32).view(SLOTS, MAX_LEN) + 1000
    block_table = torch.arange(SLOTS * MAX_LEN // BLOCK_SIZE, dtype=torch.int32).view(SLOTS, -1)
    tokens[line.NULL_SLOT] = 0
    block_table[line.NULL_SLOT] = line.NULL_BLOCK
    return Case(slot_lines(*lines, *absent), tokens, block_table, rows, deltas)


def _expected(case: Case, num_tokens: int, num_samples: int) -> tuple[dict[str, list[int]], Tensor]:
    """What the documentation of `build_step` says, one token at a time, and the block table afterwards."""
    block_table = case.block_table.clone()
    for slot, index, block in case.deltas:
        block_table[slot, index] = block
    token_ids, positions, kv_slots, query_start, kv_len = [], [], [], [0], []
    sample_start, sample_slot, sample_offset, sample_index = [0], [], [], []
    for slot, bound in case.rows:
        length, computed, active, drafts = case.lines[
            slot, [line.LENGTH, line.COMPUTED, line.ACTIVE, line.NUM_DRAFTS]
        ].tolist()
        query_len = max(0, min(bound, length + drafts - computed)) if active else 0
        for position in range(computed, computed + query_len):
            if position >= length - 1:
                sample_slot.append(slot)
                sample_offset.append(position - (length - 1))
                sample_index.append(len(positions))
            token_ids.append(int(case.tokens[slot, position]))
            positions.append(position)
            kv_slots.append(int(block_table[slot, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE)
        query_start.append(len(positions))
        kv_len.append(computed + query_len)
        sample_start.append(len(sample_slot))
    padding, sample_padding = [0] * (num_tokens - len(positions)), [0] * (num_samples - len(sample_slot))
    columns = (
        token_ids + [int(case.tokens[0, 0])] * len(padding),
        positions + padding,
        kv_slots + padding,
        [slot for slot, _ in case.rows],
        query_start,
        kv_len,
        sample_start,
        sample_slot + sample_padding,
        sample_offset + sample_padding,
        sample_index + sample_padding,
    )
    return dict(zip(NAMES, columns, strict=True)), block_table


def _num_samples(case: Case, num_tokens: int) -> int:
    """S of the shape that a step of these rows runs at: as if each verified as many proposals as the most that any has."""
    return min(num_tokens, len(case.rows) * (1 + int(case.lines[:, line.NUM_DRAFTS].max())))


def _check(build: Build, case: Case, num_tokens: int, device: str) -> None:
    block_table = case.block_table.clone().to(device)
    num_samples = _num_samples(case, num_tokens)
    built = build(
        case.plan().to(device),
        case.lines.to(device),
        case.tokens.to(device),
        block_table,
        num_tokens,
        len(case.rows),
        num_samples,
        len(case.deltas),
        BLOCK_SIZE,
    )
    expected, expected_table = _expected(case, num_tokens, num_samples)
    assert {name: tensor.tolist() for name, tensor in zip(NAMES, built, strict=True)} == expected
    assert {tensor.dtype for tensor in built} == {torch.int32}
    assert block_table.tolist() == expected_table.tolist()


@pytest.fixture(params=["reference", "triton"])
def check(request: pytest.FixtureRequest, device: str) -> Callable[[Case, int], None]:
    """Compare either kernel with the documentation on a case and a number of captured tokens."""
    if request.param == "reference":
        return lambda case, num_tokens: _check(reference.build_step, case, num_tokens, "cpu")
    return lambda case, num_tokens: _check(kernels.build_step, case, num_tokens, device)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Case, int]:
    """Decodes with and without proposals, whole and cut chunks, ended rows and padding in any order."""
    most_drafts = draw(st.integers(0, line.MAX_DRAFTS))
    lines = []
    for _ in range(SLOTS - 1):
        drafts = draw(st.integers(0, most_drafts))
        length = draw(st.integers(1, MAX_LEN - drafts))
        computed = length - 1 if drafts else draw(st.integers(0, length))
        lines.append(slot_line(length=length, computed=computed, active=draw(st.booleans()), num_drafts=drafts))
    slots = draw(st.permutations(range(1, SLOTS)))[: draw(st.integers(0, SLOTS - 1))]
    rows = [(slot, draw(st.integers(1, 12))) for slot in slots]
    for _ in range(draw(st.integers(0 if rows else 1, 3))):  # padding, anywhere
        rows.insert(draw(st.integers(0, len(rows))), (0, 0))
    places = st.tuples(st.integers(1, SLOTS - 1), st.integers(0, MAX_LEN // BLOCK_SIZE - 1))
    deltas = [(*place, draw(st.integers(1, 500))) for place in draw(st.lists(places, unique=True, max_size=4))]
    deltas += [(0, 0, 0)] * draw(st.integers(0, 2))
    num_tokens = max(1, sum(bound for _, bound in rows)) + draw(st.integers(0, 5))
    return _case(rows, deltas, *lines), num_tokens


@given(_cases())
def test_reference_lays_out_every_state_and_plan_as_documented(case: tuple[Case, int]) -> None:
    _check(reference.build_step, *case, "cpu")


@settings(max_examples=30)
@given(case=_cases())
def test_triton_lays_out_every_state_and_plan_as_documented(device: str, case: tuple[Case, int]) -> None:
    _check(kernels.build_step, *case, device)


def test_rows_of_any_length_mix_and_padding_follows(check: Callable[[Case, int], None]) -> None:
    prefill, decode = slot_line(length=20, computed=3), slot_line(length=9, computed=8)
    check(_case([(2, 1), (1, 11), (0, 0)], [(0, 0, 0)], prefill, decode), 16)


def test_a_finished_row_comes_out_empty_and_later_rows_close_up(check: Callable[[Case, int], None]) -> None:
    running, finished = slot_line(length=9, computed=8), slot_line(length=9, computed=8, active=False)
    check(_case([(1, 1), (2, 1), (3, 1)], [], running, finished, running), 4)


def test_a_bound_beyond_what_is_left_is_cut(check: Callable[[Case, int], None]) -> None:
    check(_case([(1, 8), (2, 8)], [], slot_line(length=9, computed=7), slot_line(length=9, computed=9)), 16)


def test_rows_verify_uneven_numbers_of_proposals_and_their_samples_are_packed(
    check: Callable[[Case, int], None],
) -> None:
    three, none, eight = (slot_line(length=9, computed=8, num_drafts=n) for n in (3, 0, 8))
    ended = slot_line(length=9, computed=8, num_drafts=2, active=False)
    prompt, last_chunk = slot_line(length=20, computed=3), slot_line(length=20, computed=13)
    lines = (three, none, eight, ended, prompt, last_chunk)
    rows = [(1, 4), (4, 9), (5, 5), (3, 9), (0, 0), (2, 9), (6, 7)]
    check(_case(rows, [], *lines), 43)


def test_a_bound_cuts_proposals_and_the_last_known_token_still_has_its_sample(
    check: Callable[[Case, int], None],
) -> None:
    lines = [slot_line(length=9, computed=8, num_drafts=5) for _ in range(3)]
    check(_case([(1, 1), (2, 3), (3, 6)], [], *lines), 10)


def test_this_steps_tokens_see_this_steps_deltas(check: Callable[[Case, int], None]) -> None:
    check(_case([(1, 6)], [(1, 1, 77), (1, 2, 78)], slot_line(length=9, computed=3)), 8)


def test_a_plan_of_padding_only_is_all_padding(check: Callable[[Case, int], None]) -> None:
    check(_case([(0, 0), (0, 0)], [(0, 0, 0)]), 4)


def test_more_tokens_than_one_program_holds(check: Callable[[Case, int], None]) -> None:
    check(
        _case([(1, 30), (0, 0), (2, 20)], [], slot_line(length=39, computed=9), slot_line(length=39, computed=2)),
        kernels.BLOCK_TOKENS + 9,
    )


Captured = namedtuple("Captured", NAMES)


def test_a_step_captured_on_one_plan_builds_any_other() -> None:
    captured_on = _case([(1, 5), (0, 0)], [(1, 1, 77)], slot_line(length=9, computed=8, num_drafts=2))
    others = (
        _case([(1, 2), (2, 6)], [(2, 0, 55)], slot_line(length=9, computed=1), slot_line(length=4, computed=0)),
        _case([(2, 3), (1, 3)], [(0, 0, 0)], slot_line(length=9, computed=3), slot_line(length=9, active=False)),
        captured_on,
    )
    plan, tokens = captured_on.plan(), captured_on.tokens
    lines, block_table = captured_on.lines.clone(), captured_on.block_table.clone()

    def program() -> Captured:
        built = ops.build_step(plan, lines, tokens, block_table, 8, 2, 6, 1, BLOCK_SIZE)
        return Captured(*built.tokens, *built.samples)

    graph = CpuBackend().capture(program, warmups=1)
    assert torch.ops.stepgraph.build_step.default not in graph.calls, "its Python would run in each step"
    for case in others:
        for buffer, value in zip((plan, lines, block_table), (case.plan(), case.lines, case.block_table), strict=True):
            buffer.copy_(value)
        expected, expected_table = _expected(case, 8, 6)
        assert {name: tensor.tolist() for name, tensor in graph.replay()._asdict().items()} == expected
        assert block_table.tolist() == expected_table.tolist()
