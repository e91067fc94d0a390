from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.logprobs import cpu, reference
from stepgraph.ops.logprobs import triton as kernels

VOCAB_SIZE = kernels.CHUNK + 37
DEPTH, FIRST_LINE = 3, 2

Logprobs = Callable[..., None]
Report = Callable[[Tensor, list[int], list[int]], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, on an unused inf - inf


def _report(logprobs: Logprobs, logits: Tensor, target: list[int], count: list[int], device: str = "cpu") -> Tensor:
    """The lines of all rows, on the CPU. Lines around them, other steps' lines and rows without a count stay -7."""
    num_rows = logits.shape[0]
    ring = torch.full((DEPTH, FIRST_LINE + num_rows + 1, line.LOGPROB_WIDTH), -7, dtype=torch.int32, device=device)
    inputs = (logits, *(torch.tensor(values, dtype=torch.int32) for values in (target, count, [DEPTH + 1])))
    logprobs(*(tensor.to(device) for tensor in inputs), ring, FIRST_LINE)
    ring = ring.cpu()
    lines = ring[1, FIRST_LINE : FIRST_LINE + num_rows].clone()
    ring[1, FIRST_LINE : FIRST_LINE + num_rows][torch.tensor(count) > 0] = -7
    assert (ring == -7).all()
    return lines


@pytest.fixture(params=["cpu", "triton", "reference"])
def report(request: pytest.FixtureRequest, device: str) -> Report:
    """Any of the kernels."""
    if request.param == "triton":
        return lambda *inputs: _report(kernels.logprobs, *inputs, device)
    function = {"cpu": cpu.logprobs, "reference": reference.logprobs}[request.param]
    return lambda *inputs: _report(function, *inputs)


def _check(logprobs: Logprobs, batch: tuple[Tensor, list[int], list[int]], device: str) -> None:
    actual, expected = _report(logprobs, *batch, device), _report(reference.logprobs, *batch)
    asked = torch.tensor(batch[2]) > 0
    actual, expected = actual[asked], expected[asked]
    assert actual[:, 1].tolist() == expected[:, 1].tolist()  # ranks
    assert actual[:, 2::2].tolist() == expected[:, 2::2].tolist()  # most likely tokens
    values = [lines.view(torch.float32)[:, [0, *range(3, line.LOGPROB_WIDTH, 2)]] for lines in (actual, expected)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=2e-5)


@st.composite
def _batches(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    """Few rows of logits with many ties and special values; small vocabularies and some of more than one chunk."""
    num_rows, vocab_size = draw(st.integers(1, 4)), draw(st.sampled_from([1, 5, 70, VOCAB_SIZE]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * draw(st.sampled_from([0.5, 4.0]))
    special = st.sampled_from([torch.nan, -torch.inf, torch.inf, 0.0, -0.0, 3.0])
    for row in logits:
        if draw(st.booleans()):
            row.round_()
        match draw(st.sampled_from(["keep", "some", "all"])):
            case "some":
                for _ in range(draw(st.integers(1, 4))):
                    row[draw(st.integers(0, vocab_size - 1))] = draw(special)
            case "all":
                row.fill_(draw(special))
    target = st.integers(0, vocab_size - 1) | st.sampled_from([line.NO_TOKEN, vocab_size])
    count = st.sampled_from([0, 1, 2, 6, 1 + line.MAX_LOGPROBS])
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return (
        logits.to(dtype),
        draw(st.lists(target, min_size=num_rows, max_size=num_rows)),
        draw(st.lists(count, min_size=num_rows, max_size=num_rows)),
    )


@settings(max_examples=60)
@given(_batches())
def test_cpu_reports_every_batch_as_defined(batch) -> None:
    _check(cpu.logprobs, batch, "cpu")


@settings(max_examples=40)
@given(batch=_batches())
def test_triton_reports_every_batch_as_defined(device: str, batch) -> None:
    _check(kernels.logprobs, batch, device)


def test_values_are_those_of_log_softmax_in_float64_and_the_top_those_of_topk(report: Report) -> None:
    logits = 5 * torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    targets = [0, VOCAB_SIZE - 1, int(logits[2].argmax())]
    lines = report(logits, targets, [6, 1, 1 + line.MAX_LOGPROBS])
    expected = logits.double().log_softmax(1)
    for row, target in enumerate(targets):
        assert lines[row].view(torch.float32)[0].item() == pytest.approx(float(expected[row, target]), abs=1e-5)
        assert lines[row, 1] == (expected[row] >= expected[row, target]).sum()
    top = expected[2].topk(line.MAX_LOGPROBS)
    assert lines[2, 2::2].tolist() == top.indices.tolist()
    torch.testing.assert_close(lines[2].view(torch.float32)[3::2].double(), top.values, rtol=0, atol=1e-5)
    assert lines[0, 2:12:2].tolist() == expected[0].topk(5).indices.tolist()
    assert not lines[0, 12:].any()
    assert not lines[1, 2:].any()


def test_a_tie_is_listed_by_token_and_shares_its_rank(report: Report) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    high = [3, 40, kernels.CHUNK - 1, kernels.CHUNK, VOCAB_SIZE - 1]
    logits[0, high] = 2.0
    [found] = report(logits, [kernels.CHUNK], [9])
    assert found[2:18:2].tolist() == [*high, 0, 1, 2]
    assert found[1] == 1
    [found] = report(logits, [1], [1])
    assert found[1] == 6


def test_large_logits_neither_overflow_nor_lose_their_differences(report: Report) -> None:
    logits = torch.tensor([[1e38, 1e38, -1e38, 0.0], [-1000.0, -1001.0, -1002.0, -1e30]])
    lines = report(logits, [0, 1], [1, 1]).view(torch.float32)[:, 0]
    expected = logits.double().log_softmax(1)[[0, 1], [0, 1]]
    torch.testing.assert_close(lines.double(), expected, rtol=1e-5, atol=0)


def test_a_row_where_nothing_was_sampled_has_no_rank(report: Report) -> None:
    logits = torch.full((2, 9), torch.nan)
    logits[1] = torch.arange(9.0)
    lines = report(logits, [line.NO_TOKEN, line.NO_TOKEN], [3, 3])
    assert lines.view(torch.float32)[:, 0].tolist() == [-torch.inf] * 2
    assert lines[:, 1].tolist() == [0, 0]
    assert lines[:, [2, 4]].tolist() == [[0, 1], [8, 7]]
    assert lines.view(torch.float32)[0, [3, 5]].tolist() == [-torch.inf] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_the_ring_may_be_pinned_host_memory() -> None:
    logits = torch.randn(2, VOCAB_SIZE)
    ring = torch.zeros(1, 2, line.LOGPROB_WIDTH, dtype=torch.int32).pin_memory()
    expected = torch.zeros_like(ring)
    inputs = (logits, *(torch.tensor(values, dtype=torch.int32) for values in ([4, 5], [3, 1], [0])))
    kernels.logprobs(*(tensor.cuda() for tensor in inputs), ring, 0)
    torch.cuda.synchronize()
    reference.logprobs(*inputs, expected, 0)
    torch.testing.assert_close(ring.view(torch.float32), expected.view(torch.float32), rtol=1e-6, atol=2e-5)
