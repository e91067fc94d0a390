from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor

from stepgraph import ops
from stepgraph.abi import slot_line as line
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.commit import reference
from stepgraph.ops.commit import triton as kernels

MAX_LEN, DEPTH = 24, 3

Commit = Callable[..., None]
Row = tuple[int, int, list[int]]
"""Slot, query length, and what was sampled: as many tokens as the row has samples."""


@dataclass(frozen=True)
class Case:
    """Arguments of `commit`, in its order."""

    lines: Tensor
    tokens: Tensor
    counter: Tensor
    ring: Tensor
    row_slot: Tensor
    query_start: Tensor
    kv_len: Tensor
    sample_start: Tensor
    sampled: Tensor
    num_drafts: int

    def arguments(self) -> list[Tensor | int]:
        return [getattr(self, field.name) for field in fields(self)]

    def copy(self, device: str = "cpu") -> "Case":
        return Case(*(x.clone().to(device) if isinstance(x, Tensor) else x for x in self.arguments()))


def _starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def _case(lines: Tensor, rows: list[Row], *, num_drafts: int = 0, step: int = 0) -> Case:
    """The ring has room for one row more than the step, and the samples for a row more at their end."""
    slots = torch.tensor([slot for slot, _, _ in rows], dtype=torch.int32)
    query_lens = torch.tensor([query_len for _, query_len, _ in rows], dtype=torch.int32)
    tokens = torch.arange(lines.shape[0] * MAX_LEN, dtype=torch.int32).view(-1, MAX_LEN) + 1000
    tokens[line.NULL_SLOT] = 0
    return Case(
        lines=lines,
        tokens=tokens,
        counter=torch.tensor([step], dtype=torch.int32),
        ring=torch.full((DEPTH, len(rows) + 1, line.OUTPUT_WIDTH), -7, dtype=torch.int32),
        row_slot=slots,
        query_start=_starts(query_lens.tolist()),
        kv_len=lines[slots.long(), line.COMPUTED] + query_lens,
        sample_start=_starts([len(sampled) for _, _, sampled in rows]),
        sampled=torch.tensor(
            [*chain(*(sampled for _, _, sampled in rows)), *[5] * (1 + num_drafts)], dtype=torch.int32
        ),
        num_drafts=num_drafts,
    )


def _decode(lines: list[Tensor], rows: list[tuple[list[int], list[int]]], *, num_drafts: int) -> Case:
    """A row per line that verifies its proposals, all of them: rows are (proposals, what was sampled)."""
    for line_L, (drafts, _) in zip(lines, rows, strict=True):
        line_L[line.NUM_DRAFTS] = len(drafts)
    case = _case(
        slot_lines(*lines),
        [(slot, 1 + len(drafts), sampled) for slot, (drafts, sampled) in enumerate(rows, start=1)],
        num_drafts=num_drafts,
    )
    for slot, (drafts, _) in enumerate(rows, start=1):
        length = int(case.lines[slot, line.LENGTH])
        case.tokens[slot, length : length + len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
    return case


@dataclass(frozen=True)
class Outcome:
    """Everything that `commit` specifies."""

    lines: list[list[int]]
    tokens: list[list[int]]
    counter: int
    reports: list[list[int]]  # a row's line of the ring up to its last new token
    other_entries: list[list[list[int]]]  # of the ring, and lines of this entry that belong to no row

    def line(self, slot: int) -> list[int]:
        """Length, computed, active and number of proposals."""
        return [self.lines[slot][i] for i in (line.LENGTH, line.COMPUTED, line.ACTIVE, line.NUM_DRAFTS)]

    def new_tokens(self, row: int) -> list[int]:
        return self.reports[row][line.OUT_TOKENS :]


def _outcome(after: Case, before: Case) -> Outcome:
    entry = int(before.counter) % DEPTH
    ring = after.ring.tolist()
    reports = [ring[entry].pop(0) for _ in range(len(before.row_slot))]
    return Outcome(
        after.lines.tolist(),
        after.tokens.tolist(),
        int(after.counter),
        [report[: line.OUT_TOKENS + report[line.OUT_NUM_TOKENS]] for report in reports],
        ring,
    )


def _expected(case: Case) -> Outcome:
    """What the documentation of `commit` says, one sample at a time."""
    after = case.copy()
    for row, slot in enumerate(case.row_slot.tolist()):
        before = case.lines[slot].tolist()
        samples = case.sampled[case.sample_start[row] : case.sample_start[row + 1]].tolist()
        new, num_accepted, finish = [], 0, line.RUNNING
        for j, token in enumerate(samples):
            if token == line.NO_TOKEN:
                finish = line.FINISHED_ERROR
                break
            new.append(token)
            stands = j + 1 < len(samples) and int(case.tokens[slot, before[line.LENGTH] + j]) == token
            num_accepted += stands
            if token in before[line.STOP_TOKENS :]:
                finish = line.FINISHED_STOP
            elif before[line.LENGTH] + len(new) >= before[line.MAX_LENGTH]:
                finish = line.FINISHED_LENGTH
            if not stands or finish != line.RUNNING:
                break
        length = before[line.LENGTH] + len(new)
        if case.query_start[row + 1] > case.query_start[row]:
            # The newest token has no keys and values yet, unless there is none because nothing could be sampled.
            computed = length - (finish != line.FINISHED_ERROR) if samples else int(case.kv_len[row])
            after.tokens[slot, before[line.LENGTH] : length] = torch.tensor(new, dtype=torch.int32)
            after.lines[slot, line.LENGTH], after.lines[slot, line.COMPUTED] = length, computed
            if finish != line.RUNNING:
                after.lines[slot, line.ACTIVE] = 0
        after.lines[slot, line.NUM_DRAFTS] = 0
        report = [0] * line.OUT_TOKENS
        report[line.OUT_SLOT], report[line.OUT_GENERATION] = slot, before[line.GENERATION]
        report[line.OUT_FINISH], report[line.OUT_NUM_TOKENS] = finish, len(new)
        report[line.OUT_NUM_VERIFIED], report[line.OUT_NUM_ACCEPTED] = max(0, len(samples) - 1), num_accepted
        report[line.OUT_FIRST_SAMPLE] = int(case.sample_start[row])
        after.ring[int(case.counter) % DEPTH, row, : line.OUT_TOKENS + len(new)] = torch.tensor(report + new)
    after.counter.add_(1).remainder_(DEPTH)
    return _outcome(after, case)


def _check(commit: Commit, case: Case, device: str) -> None:
    actual = case.copy(device)
    commit(*actual.arguments())
    assert _outcome(actual.copy(), case) == _expected(case)
    assert not actual.lines[line.NULL_SLOT].any()


@pytest.fixture(params=["reference", "triton"])
def check(request: pytest.FixtureRequest, device: str) -> Callable[[Case], None]:
    """Compare either kernel with the documentation."""
    if request.param == "reference":
        return lambda case: _check(reference.commit, case, "cpu")
    return lambda case: _check(kernels.commit, case, device)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """Decodes that verify uneven numbers of proposals, most of them right, beside chunks, ended rows and padding."""
    num_drafts = draw(st.integers(0, line.MAX_DRAFTS))
    token = st.integers(0, 5)
    lines, rows, drafts = [], [], []
    for slot in range(1, 7):
        num_proposed = draw(st.integers(0, num_drafts))
        length = draw(st.integers(1, MAX_LEN - 1 - num_proposed))
        computed = length - 1 if num_proposed else draw(st.integers(0, length))
        active = draw(st.booleans())
        lines.append(
            slot_line(
                length=length,
                computed=computed,
                active=active,
                generation=draw(st.integers(0, 9)),
                max_length=draw(st.integers(length + 1, MAX_LEN)),
                num_drafts=num_proposed,
                stop_tokens=tuple(draw(st.lists(token, max_size=2) | st.lists(token, max_size=line.MAX_STOP_TOKENS))),
            )
        )
        query_len = draw(st.integers(0, length + num_proposed - computed)) if active else 0
        num_samples = max(0, computed + query_len - length + 1) if query_len else 0
        sampled = draw(st.lists(token | token | st.just(line.NO_TOKEN), min_size=num_samples, max_size=num_samples))
        right = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=num_proposed, max_size=num_proposed))
        guesses = [*sampled, *[5] * num_proposed][:num_proposed]
        drafts.append([max(t, 0) if is_right else (t + 1) % 6 for t, is_right in zip(guesses, right, strict=True)])
        rows.append((slot, query_len, sampled))
    rows = draw(st.permutations(rows))[: draw(st.integers(0, len(rows)))]
    for _ in range(draw(st.integers(0 if rows else 1, 3))):  # padding, anywhere
        rows.insert(draw(st.integers(0, len(rows))), (0, 0, []))
    case = _case(slot_lines(*lines), rows, num_drafts=num_drafts, step=draw(st.integers(0, 100)))
    for slot, proposed in enumerate(drafts, start=1):
        length = int(case.lines[slot, line.LENGTH])
        case.tokens[slot, length : length + len(proposed)] = torch.tensor(proposed, dtype=torch.int32)
    return case


@given(_cases())
def test_reference_commits_every_state_as_documented(case: Case) -> None:
    _check(reference.commit, case, "cpu")


@settings(max_examples=30)
@given(case=_cases())
def test_triton_commits_every_state_as_documented(device: str, case: Case) -> None:
    _check(kernels.commit, case, device)


def test_a_decode_row_emits_and_a_chunk_row_does_not(check: Callable[[Case], None]) -> None:
    lines = slot_lines(slot_line(length=5, computed=4), slot_line(length=12, computed=2))
    check(_case(lines, [(1, 1, [42]), (2, 6, [])]))


def test_the_samples_after_proposals_that_stand_are_appended_and_the_first_after_one_that_falls(
    check: Callable[[Case], None],
) -> None:
    lines = [slot_line(length=5, computed=4) for _ in range(5)]
    rows = [([7, 8, 9], [7, 8, 9, 1]), ([7, 8, 9], [7, 6, 9, 1]), ([7, 8, 9], [6, 8, 9, 1]), ([7], [7, 2]), ([], [3])]
    case = _decode(lines, rows, num_drafts=3)
    check(case)
    after = _expected(case)
    assert [after.new_tokens(row) for row in range(5)] == [[7, 8, 9, 1], [7, 6], [6], [7, 2], [3]]
    assert [report[line.OUT_NUM_ACCEPTED] for report in after.reports] == [3, 1, 0, 1, 0]
    assert [after.line(slot) for slot in range(1, 6)] == [[5 + n, 4 + n, 1, 0] for n in (4, 2, 1, 2, 1)]


def test_a_bound_that_cuts_proposals_leaves_the_others_unverified(check: Callable[[Case], None]) -> None:
    case = _decode([slot_line(length=5, computed=4)], [([7, 8, 9], [7, 8])], num_drafts=3)
    cut = replace(case, query_start=_starts([2]), kv_len=torch.tensor([6], dtype=torch.int32))
    check(cut)
    assert _expected(cut).new_tokens(0) == [7, 8]
    assert _expected(cut).reports[0][line.OUT_NUM_VERIFIED : line.OUT_NUM_ACCEPTED + 1] == [1, 1]
    assert _expected(cut).line(1) == [7, 6, 1, 0]


def test_a_stop_token_within_a_run_that_stands_ends_it_there(check: Callable[[Case], None]) -> None:
    lines = [slot_line(length=5, stop_tokens=(3, 8)) for _ in range(3)]
    rows = [([7, 8, 9], [7, 8, 9, 1]), ([8, 7, 9], [8, 7, 9, 1]), ([7, 1, 9], [7, 1, 9, 8])]
    case = _decode(lines, rows, num_drafts=3)
    check(case)
    after = _expected(case)
    assert [after.new_tokens(row) for row in range(3)] == [[7, 8], [8], [7, 1, 9, 8]]
    assert {report[line.OUT_FINISH] for report in after.reports} == {line.FINISHED_STOP}


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5])
def test_the_request_ends_at_its_length_even_within_a_run_that_stands(check: Callable[[Case], None], room: int) -> None:
    """However many proposals the row verifies beyond it."""
    case = _decode([slot_line(length=5, max_length=5 + room)], [([7, 8, 9], [7, 8, 9, 1])], num_drafts=3)
    check(case)
    after = _expected(case)
    assert after.new_tokens(0) == [7, 8, 9, 1][:room]
    assert after.reports[0][line.OUT_FINISH] == (line.FINISHED_LENGTH if room < 5 else line.RUNNING)


def test_where_nothing_could_be_sampled_the_tokens_before_it_stand_and_the_request_ends(
    check: Callable[[Case], None],
) -> None:
    none = line.NO_TOKEN
    lines = [slot_line(length=5, max_length=20) for _ in range(4)]
    rows = [([7, 8, 9], [7, none, 9, 1]), ([7, 8, 9], [none, 8, 9, 1]), ([7], [7, none]), ([7, 8], [6, none, none])]
    case = _decode(lines, rows, num_drafts=3)
    check(case)
    after = _expected(case)
    assert [after.new_tokens(row) for row in range(4)] == [[7], [], [7], [6]]
    assert [report[line.OUT_FINISH] for report in after.reports] == [line.FINISHED_ERROR] * 3 + [line.RUNNING]
    assert [after.line(slot)[:3] for slot in range(1, 5)] == [[6, 6, 0], [5, 5, 0], [6, 6, 0], [6, 5, 1]]


def test_a_stop_token_finishes_even_in_the_last_column(check: Callable[[Case], None]) -> None:
    stops = tuple(range(100, 100 + line.MAX_STOP_TOKENS))
    lines = slot_lines(slot_line(stop_tokens=stops), slot_line(stop_tokens=stops), slot_line(stop_tokens=stops))
    check(_case(lines, [(1, 1, [stops[0]]), (2, 1, [stops[-1]]), (3, 1, [99])]))


def test_the_last_token_allowed_finishes_and_a_stop_token_there_counts_as_stop(check: Callable[[Case], None]) -> None:
    lines = slot_lines(slot_line(length=5, max_length=6), slot_line(length=5, max_length=6, stop_tokens=(9,)))
    check(_case(lines, [(1, 1, [9]), (2, 1, [9])]))


def test_a_row_without_a_sample_ends_with_an_error_at_its_old_length(check: Callable[[Case], None]) -> None:
    # Neither its unused stop tokens nor its length end it.
    case = _case(slot_lines(slot_line(length=5, max_length=5, stop_tokens=(3,))), [(1, 1, [line.NO_TOKEN]), (0, 0, [])])
    check(case)
    after = _expected(case)
    assert after.reports[0][line.OUT_FINISH : line.OUT_NUM_TOKENS + 1] == [line.FINISHED_ERROR, 0]
    assert after.line(1) == [5, 5, 0, 0]


def test_a_row_without_tokens_reports_itself_and_changes_nothing(check: Callable[[Case], None]) -> None:
    finished = slot_line(length=5, computed=5, active=False, generation=8, stop_tokens=(3,))
    check(_case(slot_lines(finished, slot_line()), [(1, 0, []), (2, 1, [3])]))


def test_padding_rows_leave_the_null_slot_zero_whatever_was_sampled(check: Callable[[Case], None]) -> None:
    check(_case(slot_lines(slot_line()), [(0, 0, []), (1, 1, [0]), (0, 0, [])], num_drafts=2))


def test_the_ring_wraps_around(check: Callable[[Case], None]) -> None:
    case = _case(slot_lines(slot_line()), [(1, 1, [2])])
    for step in (0, DEPTH - 1, DEPTH, 10 * DEPTH + 1):
        check(replace(case, counter=torch.tensor([step], dtype=torch.int32)))


def _mixed_case() -> Case:
    lines = slot_lines(slot_line(max_length=6), slot_line(length=9, computed=2), slot_line(num_drafts=2))
    return _case(lines, [(1, 1, [3]), (2, 4, []), (3, 3, [1005, 4, 4]), (0, 0, [])], num_drafts=2)


def _after_fault(commit: Commit, case: Case, device: str, fault: int) -> Outcome:
    actual = case.copy(device)
    commit(*actual.arguments(), torch.tensor([fault], dtype=torch.int32, device=device))
    return _outcome(actual.copy(), case)


@pytest.mark.parametrize("commit", [reference.commit, kernels.commit], ids=["reference", "triton"])
def test_after_a_fault_no_row_emits_or_advances(commit: Commit, device: str) -> None:
    case = replace(_mixed_case(), sampled=torch.tensor([3, 1005, 4, 4, 5, 5, 5], dtype=torch.int32))
    where = "cpu" if commit is reference.commit else device
    still = replace(case, query_start=torch.zeros_like(case.query_start), sample_start=case.sample_start * 0)
    after = _after_fault(commit, case, where, 1)
    assert after.lines == _expected(still).lines
    assert after.tokens == case.tokens.tolist()
    assert after.counter == _expected(case).counter
    assert [report[line.OUT_NUM_TOKENS] for report in after.reports] == [0] * 4
    assert [report[line.OUT_FINISH] for report in after.reports] == [line.RUNNING] * 4
    assert _after_fault(commit, case, where, 0) == _expected(case)


class Counter(NamedTuple):
    value: Tensor


def test_a_commit_captured_on_one_step_is_right_on_others() -> None:
    captured_on = _mixed_case()
    lines = slot_lines(slot_line(stop_tokens=(7,)), slot_line(num_drafts=1), slot_line(max_length=6))
    other = _case(lines, [(3, 1, [9]), (1, 1, [7]), (2, 2, [1005, 8]), (0, 0, [])], num_drafts=2, step=4)
    buffers = captured_on.copy()

    def program() -> Counter:
        ops.commit(*buffers.arguments())
        return Counter(buffers.counter)

    graph = CpuBackend().capture(program, warmups=1)
    assert torch.ops.stepgraph.commit.default not in graph.calls, "its Python would run in each step"
    for case in (other, captured_on):
        for buffer, value in zip(buffers.arguments()[:-1], case.arguments()[:-1], strict=True):
            buffer[: len(value)].copy_(value)
        graph.replay()
        assert _outcome(buffers, case) == _expected(case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_the_ring_may_be_pinned_host_memory() -> None:
    case = _mixed_case()
    on_gpu = replace(case.copy("cuda"), ring=case.ring.pin_memory())
    kernels.commit(*on_gpu.arguments())
    torch.cuda.synchronize()
    assert _outcome(on_gpu.copy(), case) == _expected(case)
