"""CPU graphs refuse what a CUDA graph could not hold, and bake in what a CUDA graph would bake in."""

import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.errors import CaptureError
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.registry import INLINED


class Output(NamedTuple):
    value: Tensor


def capture(function, warmups: int = 0):
    return CpuBackend().capture(lambda: Output(function()), warmups)


VALUES = torch.arange(6.0)
LENGTHS = torch.tensor([2, 1])
LENGTH = torch.tensor(3)

HOST_READS = {
    "item of a buffer": (lambda: VALUES * LENGTH.item(), r"aten\._local_scalar_dense"),
    "item of a result": (lambda: VALUES * LENGTHS.sum().item(), r"aten\._local_scalar_dense"),
    "tolist": (lambda: VALUES * LENGTHS.tolist()[0], r"Tensor\.tolist"),
    "numpy": (lambda: VALUES * float(LENGTHS.numpy()[0]), r"Tensor\.numpy"),
    "if on a buffer": (lambda: VALUES * 2 if LENGTH else VALUES, r"aten\._local_scalar_dense"),
    "if on a result": (lambda: VALUES * 2 if LENGTH > 2 else VALUES, r"aten\._local_scalar_dense"),
    "equal": (lambda: VALUES * torch.equal(LENGTHS, LENGTHS), r"aten\.equal"),
    "a slice to a tensor": (lambda: VALUES[: LENGTHS[0]], r"aten\._local_scalar_dense"),
    "zeros as many as a tensor says": (lambda: torch.zeros(int(LENGTHS.sum())), r"aten\._local_scalar_dense"),
    "a loop over a tensor's value": (lambda: sum(VALUES * i for i in range(int(LENGTH))), r"aten\._local_scalar_dense"),
}
SHAPES_FROM_DATA = {
    "nonzero": (lambda: VALUES.nonzero(), r"aten\.nonzero"),
    "the number of nonzero entries": (lambda: VALUES * len(VALUES.nonzero()), r"aten\.nonzero"),
    "where with one argument": (lambda: torch.where(VALUES > 2)[0], r"aten\.nonzero"),
    "boolean indexing": (lambda: VALUES[VALUES > 2], r"aten\.index\.Tensor"),
    "masked_select": (lambda: VALUES.masked_select(VALUES > 2), r"aten\.masked_select"),
    "repeat_interleave by a tensor": (lambda: VALUES[:2].repeat_interleave(LENGTHS), r"aten\.repeat_interleave"),
    "unique": (lambda: VALUES.unique(), r"aten\._unique2"),
}


@pytest.mark.parametrize("case", HOST_READS)
def test_a_value_read_on_the_host_is_refused_by_name(case) -> None:
    function, name = HOST_READS[case]
    with pytest.raises(
        CaptureError, match=rf"reads a tensor's value on the host \(.*{name}.*Keep the value on the device"
    ):
        capture(function)


@pytest.mark.parametrize("case", SHAPES_FROM_DATA)
def test_a_shape_that_depends_on_data_is_refused_by_name(case) -> None:
    function, name = SHAPES_FROM_DATA[case]
    with pytest.raises(CaptureError, match=rf"^{name}.*depends on the batch.*Use a fixed size and mask"):
        capture(function)


def test_an_operator_may_read_lengths_that_the_program_may_not() -> None:
    """`sample` looks at its rows' settings; the trace holds it as one call."""
    logits, slots, offset = (
        torch.randn(2, 9),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    )
    lines = torch.zeros(3, slot_line.LINE_WIDTH, dtype=torch.int32)
    graph = capture(lambda: ops.sample(logits, slots, offset, lines))
    assert graph.calls == (torch.ops.stepgraph.sample.default,)
    logits.copy_(torch.randn(2, 9))
    assert torch.equal(graph.replay().value, logits.argmax(1).int())


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x * x.sum().item(), r"aten\.item"),
        (lambda x: x * 2 if x.sum() else x, r"aten\.is_nonzero"),
        (lambda x: x * x.tolist()[0], r"Tensor\.tolist"),
    ],
)
def test_a_kernel_that_is_recorded_call_by_call_may_not_read_values_either(monkeypatch, read, name) -> None:
    monkeypatch.setitem(INLINED, torch.ops.stepgraph.swiglu.default, read)
    with pytest.raises(CaptureError, match=rf"reads a tensor's value on the host \({name}"):
        capture(lambda: ops.swiglu(VALUES.view(1, 6)))


def test_capture_runs_the_program_once_and_each_replay_once_more() -> None:
    counter, history, ones = torch.zeros(1), torch.zeros(4), torch.ones(4)

    def program() -> Tensor:
        counter.add_(1)
        history.add_(ones).mul_(2)
        history[0].fill_(7)
        return history + counter

    graph = capture(program)
    assert (counter.tolist(), history.tolist()) == ([1], [7, 2, 2, 2])
    assert graph.replay().value.tolist() == [9, 8, 8, 8]
    assert (counter.tolist(), history.tolist()) == ([2], [7, 6, 6, 6])


OPERATORS = {
    "numbers for tensors": lambda x: (x + 1) * 2.5 - (1 - x),
    "flags for numbers": lambda x: torch.full((2,), True).sum() + (x > 0).eq(True),
    "lists of tensors": lambda x: torch.cat([x, *(x * 2).split(2)]),
    "a list made in between": lambda x: torch.stack((x * 2).unbind(0)[::-1]),
    "several results": lambda x: sum((x * 2).view(2, 3).max(dim=1)),
    "an index among gaps": lambda x: (x * 1).view(1, 2, 3)[:, None, torch.tensor([1, 0])],
    "empty lists": lambda x: torch.zeros(()) + x.sum(dim=()) + x.new_zeros([]),
    "one layout": lambda x: (x * 1).view(2, 3).t().contiguous(),
    "another layout": lambda x: (x * 1).view(2, 3).t().clone(memory_format=torch.preserve_format),
    "types": lambda x: x.to(torch.int32).double() + torch.arange(6, dtype=torch.bfloat16),
    "writes to parts": lambda x: (x * 1).index_fill_(0, torch.tensor([1]), 9).view(2, 3)[0].mul_(2).sum() + x,
    "a target for results": lambda x: torch.mul(x, 3, out=torch.empty(6)),
    "many short-lived tensors": lambda x: sum(((x * i).view(3, 2) + i).sum() for i in range(200)),
    "views where a tensor was before": lambda x: sum((x * i)[0].add(1) * x.view(3, 2)[i % 3][0] for i in range(20)),
    "the buffer itself": lambda x: x,
}


@pytest.mark.parametrize("case", OPERATORS)
def test_a_replay_gives_what_the_program_gives(case) -> None:
    buffer = torch.arange(6.0)
    graph = capture(lambda: OPERATORS[case](buffer))
    for values in (torch.arange(6.0), torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])):
        buffer.copy_(values)
        expected, found = OPERATORS[case](buffer), graph.replay().value
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(found, expected)


def test_a_literal_is_new_in_each_replay() -> None:
    graph = capture(lambda: torch.tensor([1.0, 2.0]).add_(VALUES[:2]))
    assert [graph.replay().value.tolist() for _ in range(2)] == [[1, 3], [1, 3]]


def test_views_of_buffers_are_made_once() -> None:
    cache, index = torch.zeros(3, 2, 2), torch.tensor([4])
    graph = capture(lambda: cache.view(6, 2).index_copy_(0, index, torch.ones(1, 2)).t()[0])
    assert graph.calls == (torch.ops.aten.ones.default, torch.ops.aten.index_copy_.default)
    cache.zero_()
    index.fill_(1)
    assert graph.replay().value.tolist() == [0, 1, 0, 0, 0, 0]
    assert cache[0, 1].tolist() == [1, 1]


def test_a_buffer_in_another_type_is_made_in_each_replay(monkeypatch) -> None:
    """Of a kernel that is recorded call by call, `x.long()` is one call, which would be a view for another type."""
    monkeypatch.setitem(INLINED, torch.ops.stepgraph.swiglu.default, lambda x: VALUES[x.long()])
    buffer = torch.zeros(3, dtype=torch.int32)
    graph = capture(lambda: ops.swiglu(buffer))
    buffer.copy_(torch.tensor([4, 0, 2]))
    assert graph.replay().value.tolist() == [4, 0, 2]


def test_what_is_made_on_the_way_is_not_kept() -> None:
    """Neither at capture nor in the graph: it may be most of the memory of a step."""
    made = []

    def program() -> Tensor:
        value = VALUES + 1
        made.append(weakref.ref(value))
        value = value * 2
        assert made[0]() is None
        return value

    graph = capture(program)
    assert [buffer is VALUES for buffer in graph.buffers] == [True]


def test_replay_follows_the_buffers_and_not_what_they_held_at_capture() -> None:
    source, index, target = torch.zeros(4), torch.tensor([0, 1]), torch.zeros(2)
    graph = capture(lambda: target.copy_(source[index] * 2))
    source.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    index.copy_(torch.tensor([3, 1]))
    assert graph.replay().value.tolist() == [8, 4]
    assert target.tolist() == [8, 4]


def test_a_host_value_is_baked_in_as_a_cuda_graph_bakes_it() -> None:
    rows = [1, 1]
    graph = capture(lambda: VALUES[: len(rows)] + len(rows))
    rows.append(1)
    assert graph.replay().value.tolist() == [2, 3]


@pytest.mark.parametrize("warmups", [0, 1, 3])
def test_replay_never_calls_the_program_again(warmups) -> None:
    calls = []
    graph = capture(lambda: (calls.append(1), VALUES * 2)[1], warmups)
    assert len(calls) == 1
    for _ in range(5):
        assert torch.equal(graph.replay().value, VALUES * 2)
    assert len(calls) == 1


def test_a_program_that_fails_in_itself_is_not_blamed_on_capture() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        capture(lambda: VALUES + torch.zeros(5))
