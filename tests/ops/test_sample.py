from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor
from transformers.generation import logits_process

from stepgraph.abi import slot_line as line
from stepgraph.ops.sample import cpu, reference
from stepgraph.ops.sample import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter, on infinities

Sampler = Callable[..., Tensor]

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 3.0, "top_k": 4, "top_p": 0.613},
    {"temperature": 1.2, "min_p": 0.083},
    {"temperature": 3.0, "min_p": 0.4, "top_k": 7, "top_p": 0.87},
    {"temperature": 4.0, "min_p": 1.0},
]

CHI_SQUARE_999 = {2: 13.82, 3: 16.27, 5: 20.52, 8: 26.12}
"""The 99.9 % quantiles by degrees of freedom. Draws are deterministic, so a test that passes keeps passing."""


@pytest.fixture(params=["cpu", "triton"])
def sampler(request: pytest.FixtureRequest, device: str) -> Sampler:
    """Either kernel, for the slots' next tokens unless offsets are given; takes and returns CPU tensors."""
    if request.param == "cpu":
        return _cpu_sample
    return lambda *inputs: _triton_sample(device, *inputs)


def _cpu_sample(logits: Tensor, row_slot: Tensor, lines: Tensor, offset: Tensor | None = None) -> Tensor:
    return cpu.sample(logits, row_slot, torch.zeros_like(row_slot) if offset is None else offset, lines)


def _triton_sample(
    device: str, logits: Tensor, row_slot: Tensor, lines: Tensor, offset: Tensor | None = None
) -> Tensor:
    offset = torch.zeros_like(row_slot) if offset is None else offset
    return kernels.sample(*(tensor.to(device) for tensor in (logits, row_slot, offset, lines))).cpu()


def _define(logits: Tensor, row_slot: Tensor, lines: Tensor, offset: Tensor | None = None) -> Tensor:
    return reference.sample(logits, row_slot, torch.zeros_like(row_slot) if offset is None else offset, lines)


def _rows(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int32)


def _mixed_lines() -> Tensor:
    return slot_lines(*(slot_line(length=3 + i, seed=(i << 40) + 97 * i, **s) for i, s in enumerate(SETTINGS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 6, 33, 2 * kernels.CHUNK + 7])
def test_kernels_choose_the_tokens_of_the_definition(sampler: Sampler, vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    lines = _mixed_lines()
    logits = (3 * torch.randn(len(SETTINGS), vocab_size, generator=generator)).to(dtype)
    tokens = sampler(logits, _rows(len(SETTINGS)), lines)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == _define(logits, _rows(len(SETTINGS)), lines).tolist()


def test_kernels_keep_what_ties_with_the_last(sampler: Sampler) -> None:
    generator = torch.Generator().manual_seed(0)
    lines = _mixed_lines()
    for _ in range(2):
        logits = torch.randint(-2, 3, (len(SETTINGS), 40), generator=generator).float()
        expected = _define(logits, _rows(len(SETTINGS)), lines).tolist()
        assert sampler(logits, _rows(len(SETTINGS)), lines).tolist() == expected


@given(
    logits=st.lists(
        st.floats(-30, 30, width=32) | st.integers(-3, 3).map(float) | st.sampled_from([-torch.inf, torch.nan]),
        min_size=1,
        max_size=24,
    ),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
    top_k=st.integers(0, 26),
    top_p=st.sampled_from([0.0, 0.1234, 0.4567, 0.8901, 0.9876, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    length=st.integers(1, 2**20),
)
def test_cpu_kernel_chooses_the_token_of_the_definition_for_all_settings(
    logits: list[float], temperature: float, min_p: float, top_k: int, top_p: float, seed: int, length: int
) -> None:
    lines = slot_lines(
        slot_line(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=seed, length=length)
    )
    logits_1V = torch.tensor([logits])
    expected = _define(logits_1V, _rows(1), lines).tolist()
    assert _cpu_sample(logits_1V, _rows(1), lines).tolist() == expected


@pytest.mark.parametrize(("min_p", "top_k", "top_p"), [(0.2, 0, 1.0), (0, 7, 1.0), (0, 0, 0.7), (0.05, 9, 0.8)])
def test_what_is_kept_is_what_the_warpers_of_transformers_keep(min_p: float, top_k: int, top_p: float) -> None:
    x_RV = 2 * torch.randn(20, 40, generator=torch.Generator().manual_seed(6))
    warped_RV = x_RV
    if min_p:
        warped_RV = logits_process.MinPLogitsWarper(min_p)(None, warped_RV)
    if top_k:
        warped_RV = logits_process.TopKLogitsWarper(top_k)(None, warped_RV)
    if top_p < 1:
        warped_RV = logits_process.TopPLogitsWarper(top_p)(None, warped_RV)
    for x_V, warped_V in zip(x_RV, warped_RV, strict=True):
        assert torch.equal(reference.keep_mask(x_V, min_p, top_k, top_p), warped_V > -torch.inf)


def test_greedy_takes_the_lowest_index_of_a_tie(sampler: Sampler) -> None:
    vocab_size = 2 * kernels.CHUNK + 7
    logits = torch.full((2, vocab_size), -1.0)
    logits[0, [kernels.CHUNK - 1, kernels.CHUNK, vocab_size - 1]] = 2.0
    logits[1, [vocab_size - 2, vocab_size - 1]] = 2.0
    tokens = sampler(logits, _rows(2), slot_lines(slot_line(), slot_line()))
    assert tokens.tolist() == [kernels.CHUNK - 1, vocab_size - 2]


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # numpy's, on an unused -inf - -inf
def test_nan_never_wins_and_a_row_where_nothing_can_yields_no_token(sampler: Sampler) -> None:
    lines = _mixed_lines()
    rows = _rows(len(SETTINGS))
    one_number = torch.full((len(SETTINGS), 9), torch.nan)
    one_number[:, 6] = -40.0
    assert sampler(one_number, rows, lines).tolist() == [6] * len(SETTINGS)
    nothing = torch.full((len(SETTINGS), 9), torch.nan)
    assert sampler(nothing, rows, lines).tolist() == [line.NO_TOKEN] * len(SETTINGS)
    nothing[:, 3:] = -torch.inf
    assert sampler(nothing, rows, lines).tolist() == [line.NO_TOKEN] * len(SETTINGS)
    assert _define(nothing, rows, lines).tolist() == [line.NO_TOKEN] * len(SETTINGS)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # numpy's, on an unused inf - inf
def test_infinite_logits_win_and_excluded_ones_never_do(sampler: Sampler) -> None:
    lines = _mixed_lines()
    rows = _rows(len(SETTINGS))
    logits = torch.zeros(len(SETTINGS), 9)
    logits[:, 3] = torch.inf
    assert sampler(logits, rows, lines).tolist() == [3] * len(SETTINGS)
    logits = torch.full((len(SETTINGS), 9), -torch.inf)
    logits[:, 7] = -5.0
    assert sampler(logits, rows, lines).tolist() == [7] * len(SETTINGS)


def test_null_rows_get_a_token_or_none_whatever_their_logits(sampler: Sampler) -> None:
    logits = torch.stack([torch.full((9,), torch.nan), torch.arange(9.0), torch.full((9,), torch.inf)])
    tokens = sampler(logits, torch.tensor([0, 1, 0], dtype=torch.int32), slot_lines(slot_line()))
    assert tokens[1] == 8
    assert ((tokens >= line.NO_TOKEN) & (tokens < 9)).all()


def test_keeping_one_entry_is_greedy(sampler: Sampler) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    lines = slot_lines(
        slot_line(temperature=5.0, top_k=1),
        slot_line(temperature=5.0, top_p=0.0),
        slot_line(temperature=5.0, top_p=1e-6),
        slot_line(temperature=5.0, min_p=1.0),
    )
    assert sampler(logits, _rows(4), lines).tolist() == logits.argmax(1).tolist()


def test_a_request_draws_the_same_token_alone_and_in_any_batch(sampler: Sampler) -> None:
    generator = torch.Generator().manual_seed(2)
    lines = _mixed_lines()
    logits = 3 * torch.randn(len(SETTINGS), 37, generator=generator)
    rows = _rows(len(SETTINGS))
    alone = [sampler(logits[i : i + 1], rows[i : i + 1], lines).item() for i in range(len(rows))]
    order = torch.randperm(len(rows), generator=generator)
    others = torch.zeros(2, 37).index_fill_(0, torch.tensor([0]), torch.nan)
    batch = torch.cat((others[:1], logits[order], others[1:]))
    slots = torch.cat((torch.zeros(1, dtype=torch.int32), rows[order], torch.zeros(1, dtype=torch.int32)))
    assert sampler(batch, slots, lines)[1:-1].tolist() == [alone[i] for i in order.tolist()]


def test_the_token_after_proposals_is_that_of_a_history_which_holds_them(sampler: Sampler) -> None:
    """Also where several samples of one slot are in a batch."""
    generator = torch.Generator().manual_seed(8)
    slots = torch.repeat_interleave(_rows(len(SETTINGS)), 3)
    offset = torch.tensor([0, 1, 8], dtype=torch.int32).repeat(len(SETTINGS))
    logits = torch.randn(len(slots), 37, generator=generator)
    lines = _mixed_lines()
    longer = slot_lines(*lines[slots.long()])
    longer[1:, line.LENGTH] += offset
    tokens = sampler(logits, slots, lines, offset).tolist()
    assert (
        tokens == _define(logits, _rows(len(slots)), longer).tolist() == _define(logits, slots, lines, offset).tolist()
    )
    assert tokens != _define(logits, slots, lines).tolist()


def _chi_square(observed: Tensor, probability: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; entries of probability 0 must not have been drawn."""
    possible = probability > 0
    assert observed[~possible].sum() == 0
    expected = probability[possible] * observed.sum()
    return float(((observed[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


LOGITS = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 1.3])


def _draws(sampler: Sampler, count: int, **settings: float) -> Tensor:
    """Tokens drawn at `count` successive positions of one request."""
    lines = slot_lines(*[slot_line(seed=2024, **settings)] * count)
    lines[1:, line.LENGTH] = _rows(count)
    return sampler(LOGITS.expand(count, -1).contiguous(), _rows(count), lines)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.6}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 1.5, "top_k": 3}, [0, 3, 5]),
        ({"temperature": 1.0, "top_p": 0.9}, [0, 2, 3, 5]),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.87}, [0, 3, 5]),  # 0.856 of all, 0.911 of the four
    ],
)
def test_cpu_draws_follow_the_distribution(settings: dict[str, float], kept: list[int]) -> None:
    probability = torch.zeros(6)
    probability[kept] = (LOGITS[kept] / settings["temperature"]).softmax(0)
    observed = torch.bincount(_draws(_cpu_sample, 6000, **settings), minlength=6)
    statistic, freedom = _chi_square(observed, probability)
    assert statistic < CHI_SQUARE_999[freedom]


def test_triton_draws_are_those_that_follow_the_distribution(device: str) -> None:
    settings = {"temperature": 1.0, "top_k": 4}
    drawn = _draws(partial(_triton_sample, device), 30, **settings).tolist()
    assert drawn == _draws(_cpu_sample, 30, **settings).tolist()
    assert set(drawn) == {0, 2, 3, 5}


@pytest.mark.parametrize("varied", ["position", "seed"])
def test_draws_at_neighbouring_positions_and_seeds_are_independent(varied: str) -> None:
    count, logits = 6000, torch.tensor([0.5, 0.0, -0.3])
    lines = slot_lines(*[slot_line(temperature=1.0)] * count)
    lines[1:, line.LENGTH if varied == "position" else line.SEED_LOW] = _rows(count)
    tokens = _cpu_sample(logits.expand(count, -1).contiguous(), _rows(count), lines).view(-1, 2)
    observed = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9)
    probability = torch.outer(logits.softmax(0), logits.softmax(0)).flatten()
    statistic, freedom = _chi_square(observed, probability)
    assert statistic < CHI_SQUARE_999[freedom]
