from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from stepgraph.ops import slot_line as line
from stepgraph.ops.commit import reference
from stepgraph.ops.commit import triton as kernels

MAX_LEN, DEPTH = 24, 3

Commit = Callable[..., None]


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
    sampled: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def copy(self, device: str = "cpu") -> "Case":
        return Case(*(tensor.clone().to(device) for tensor in self.tensors()))


def _case(lines: Tensor, rows: list[tuple[int, int, int]], step: int = 0) -> Case:
    """Rows are (slot, query length, sampled token). The ring has room for one row more than the step."""
    slots, query_lens, sampled = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    tokens = torch.arange(lines.shape[0] * MAX_LEN, dtype=torch.int32).view(-1, MAX_LEN) + 1000
    tokens[line.NULL_SLOT] = 0
    return Case(
        lines=lines,
        tokens=tokens,
        counter=torch.tensor([step], dtype=torch.int32),
        ring=torch.full((DEPTH, len(rows) + 1, line.OUTPUT_WIDTH), -7, dtype=torch.int32),
        row_slot=slots,
        query_start=torch.nn.functional.pad(query_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        kv_len=lines[slots.long(), line.COMPUTED] + query_lens,
        sampled=sampled,
    )


def _expected(case: Case) -> Case:
    """What the documentation of `commit` says, one row at a time."""
    after = case.copy()
    step = int(case.counter)
    for row, slot in enumerate(case.row_slot.tolist()):
        before = case.lines[slot].tolist()
        kv_len, sampled = int(case.kv_len[row]), int(case.sampled[row])
        token, finish = line.NO_TOKEN, line.RUNNING
        if case.query_start[row + 1] > case.query_start[row]:
            after.lines[slot, line.COMPUTED] = kv_len
            if kv_len == before[line.LENGTH] and sampled == line.NO_TOKEN:
                finish = line.FINISHED_ERROR
            elif kv_len == before[line.LENGTH]:
                token, length = sampled, before[line.LENGTH] + 1
                after.tokens[slot, length - 1] = token
                after.lines[slot, line.LENGTH] = length
                if token in before[line.STOP_TOKENS :]:
                    finish = line.FINISHED_STOP
                elif length >= before[line.MAX_LENGTH]:
                    finish = line.FINISHED_LENGTH
            if finish != line.RUNNING:
                after.lines[slot, line.ACTIVE] = 0
        report = torch.tensor([slot, before[line.GENERATION], token, finish], dtype=torch.int32)
        after.ring[step % DEPTH, row] = report
    after.counter.add_(1).remainder_(after.ring.shape[0])
    return after


def _check(commit: Commit, case: Case, device: str) -> None:
    actual = case.copy(device)
    commit(*actual.tensors())
    for field, left, right in zip(fields(Case), actual.tensors(), _expected(case).tensors(), strict=True):
        assert left.tolist() == right.tolist(), field.name
    assert not actual.lines[line.NULL_SLOT].any()


@pytest.fixture(params=["reference", "triton"])
def check(request: pytest.FixtureRequest, device: str) -> Callable[[Case], None]:
    """Compare either kernel with the documentation."""
    if request.param == "reference":
        return lambda case: _check(reference.commit, case, "cpu")
    return lambda case: _check(kernels.commit, case, device)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    lines, rows = [], []
    token = st.integers(0, 5)
    for slot in range(1, 7):
        length = draw(st.integers(1, MAX_LEN - 1))
        computed = draw(st.integers(0, length))
        active = draw(st.booleans())
        lines.append(
            slot_line(
                length=length,
                computed=computed,
                active=active,
                generation=draw(st.integers(0, 9)),
                max_length=draw(st.integers(length + 1, MAX_LEN)),
                stop_tokens=tuple(draw(st.lists(token, max_size=line.MAX_STOP_TOKENS))),
            )
        )
        query_len = draw(st.integers(0, length - computed)) if active else 0
        rows.append((slot, query_len, draw(token | st.just(line.NO_TOKEN))))
    rows = draw(st.permutations(rows))[: draw(st.integers(0, len(rows)))]
    for _ in range(draw(st.integers(0 if rows else 1, 3))):  # padding, anywhere
        rows.insert(draw(st.integers(0, len(rows))), (0, 0, draw(token)))
    return _case(slot_lines(*lines), rows, step=draw(st.integers(0, 100)))


@given(_cases())
def test_reference_commits_every_state_as_documented(case: Case) -> None:
    _check(reference.commit, case, "cpu")


@settings(max_examples=30)
@given(case=_cases())
def test_triton_commits_every_state_as_documented(device: str, case: Case) -> None:
    _check(kernels.commit, case, device)


def test_a_decode_row_emits_and_a_chunk_row_does_not(check: Callable[[Case], None]) -> None:
    lines = slot_lines(slot_line(length=5, computed=4), slot_line(length=12, computed=2))
    check(_case(lines, [(1, 1, 42), (2, 6, 43)]))


def test_a_stop_token_finishes_even_in_the_last_column(check: Callable[[Case], None]) -> None:
    stops = tuple(range(100, 100 + line.MAX_STOP_TOKENS))
    lines = slot_lines(slot_line(stop_tokens=stops), slot_line(stop_tokens=stops), slot_line(stop_tokens=stops))
    check(_case(lines, [(1, 1, stops[0]), (2, 1, stops[-1]), (3, 1, 99)]))


def test_the_last_token_allowed_finishes_and_a_stop_token_there_counts_as_stop(check: Callable[[Case], None]) -> None:
    lines = slot_lines(slot_line(length=5, max_length=6), slot_line(length=5, max_length=6, stop_tokens=(9,)))
    check(_case(lines, [(1, 1, 9), (2, 1, 9)]))


def test_a_row_without_a_sample_ends_with_an_error_at_its_old_length(check: Callable[[Case], None]) -> None:
    lines = slot_lines(
        slot_line(length=5, max_length=5, stop_tokens=(3,)),  # neither its unused stop tokens nor its length end it
        slot_line(length=12, computed=2),  # a chunk, whose sample does not matter
    )
    case = _case(lines, [(1, 1, line.NO_TOKEN), (2, 6, line.NO_TOKEN), (0, 0, line.NO_TOKEN)])
    check(case)
    after = _expected(case)
    assert after.ring[0, :2, 2:].tolist() == [[line.NO_TOKEN, line.FINISHED_ERROR], [line.NO_TOKEN, line.RUNNING]]
    assert after.lines[1, [line.LENGTH, line.COMPUTED, line.ACTIVE]].tolist() == [5, 5, 0]


def test_a_row_without_tokens_reports_itself_and_changes_nothing(check: Callable[[Case], None]) -> None:
    finished = slot_line(length=5, computed=5, active=False, generation=8, stop_tokens=(3,))
    check(_case(slot_lines(finished, slot_line()), [(1, 0, 3), (2, 1, 3)]))


def test_padding_rows_leave_the_null_slot_zero_whatever_was_sampled(check: Callable[[Case], None]) -> None:
    check(_case(slot_lines(slot_line()), [(0, 0, 0), (1, 1, 0), (0, 0, 5)]))


def test_the_ring_wraps_around(check: Callable[[Case], None]) -> None:
    case = _case(slot_lines(slot_line()), [(1, 1, 2)])
    for step in (0, DEPTH - 1, DEPTH, 10 * DEPTH + 1):
        check(replace(case, counter=torch.tensor([step], dtype=torch.int32)))


def test_reference_traces_to_a_static_graph_without_side_effects() -> None:
    case = _case(
        slot_lines(slot_line(max_length=6), slot_line(length=9, computed=2)), [(1, 1, 3), (2, 4, 4), (0, 0, 1)]
    )
    buffers = case.copy()
    traced = make_fx(lambda: reference.commit(*buffers.tensors()), tracing_mode="fake", _allow_non_fake_inputs=True)()
    assert not any(free_unbacked_symbols(node.meta.get("val")) for node in traced.graph.nodes)
    for before, after in zip(case.tensors(), buffers.tensors(), strict=True):
        assert after.tolist() == before.tolist()
    traced()
    for expected, after in zip(_expected(case).tensors(), buffers.tensors(), strict=True):
        assert after.tolist() == expected.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_the_ring_may_be_pinned_host_memory() -> None:
    case = _case(slot_lines(slot_line(max_length=6)), [(1, 1, 3), (0, 0, 1)])
    on_gpu = case.copy("cuda")
    ring = case.ring.pin_memory()
    kernels.commit(*replace(on_gpu, ring=ring).tensors())
    torch.cuda.synchronize()
    assert ring.tolist() == _expected(case).ring.tolist()
