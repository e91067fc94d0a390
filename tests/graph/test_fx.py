"""The fx backend refuses what a CUDA graph could not hold, and bakes in what a CUDA graph would bake in."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.errors import CaptureError
from stepgraph.graph.fx import FxBackend


class Output(NamedTuple):
    value: Tensor


def capture(function, warmups: int = 0):
    return FxBackend().capture(lambda: Output(function()), warmups)


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
    "the number of nonzero entries": (lambda: VALUES * len(VALUES.nonzero()), "data-dependent"),
}
SHAPES_FROM_DATA = {
    "nonzero": (lambda: VALUES.nonzero(), r"aten\.nonzero"),
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
    lines = torch.zeros(3, ops.slot_line.LINE_WIDTH, dtype=torch.int32)
    graph = capture(lambda: ops.sample(logits, slots, offset, lines))
    assert [node.target for node in graph.calls.nodes if node.op == "call_function"] == [
        torch.ops.stepgraph.sample.default
    ]
    logits.copy_(torch.randn(2, 9))
    assert torch.equal(graph.replay().value, logits.argmax(1).int())


def test_tracing_runs_nothing() -> None:
    """In-place calls, on buffers of one entry or many, happen neither to the buffers nor to what replay starts from."""
    from stepgraph.graph.fx import trace

    counter, history, ones = torch.zeros(1), torch.zeros(4), torch.ones(4)

    def program() -> tuple[Tensor]:
        counter.add_(1)
        history.add_(ones).mul_(2)
        history[0].fill_(7)
        return (history + counter,)

    module, buffers = trace(program)
    assert (counter.tolist(), history.tolist()) == ([0], [0, 0, 0, 0])
    [result] = module(*buffers)
    assert (counter.tolist(), history.tolist()) == ([1], [7, 2, 2, 2])
    assert result.tolist() == [8, 3, 3, 3]


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


def test_a_literal_is_no_buffer() -> None:
    graph = capture(lambda: VALUES + torch.tensor(3.0))
    assert torch.equal(graph.replay().value, VALUES + 3)


def test_a_program_that_fails_in_itself_is_not_blamed_on_capture() -> None:
    with pytest.raises(RuntimeError, match="broadcast"):
        capture(lambda: VALUES + torch.zeros(5))
