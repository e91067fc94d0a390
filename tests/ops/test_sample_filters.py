"""The Triton kernel of `sample` where `min_p`, `top_k` and `top_p` keep less than all, on rows of every shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.sample import philox, reference
from stepgraph.ops.sample import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on logits and keys without use

FILTERS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 20, "top_p": 0.953},
    {"top_k": 300, "min_p": 0.021},
    {"top_k": 1000, "top_p": 0.517},
    {"top_k": kernels.CANDIDATES + 900},
    {"top_k": kernels.CANDIDATES + 901, "top_p": 0.901, "min_p": 1e-4},
    {"top_p": 1e-4},
    {"top_p": 0.0517},
    {"top_p": 0.503},
    {"top_p": 0.9031},
    {"top_p": 0.9993},
    {"min_p": 0.0503},
    {"min_p": 0.307, "top_p": 0.611},
]
VOCAB_SIZE = kernels.CANDIDATES + 1007


def _sample(device: str, logits: Tensor, lines: Tensor) -> list[int]:
    rows = torch.arange(1, len(logits) + 1, dtype=torch.int32)
    return kernels.sample(*(x.to(device) for x in (logits, rows, torch.zeros_like(rows), lines))).tolist()


def _expected(logits: Tensor, lines: Tensor) -> list[int]:
    rows = torch.arange(1, len(logits) + 1, dtype=torch.int32)
    return reference.sample(logits, rows, torch.zeros_like(rows), lines).tolist()


def _row(shape: str, vocab_size: int, generator: torch.Generator) -> Tensor:
    """[vocab_size] float32."""
    rank_V = torch.arange(1, vocab_size + 1, dtype=torch.float32)
    order_V = torch.randperm(vocab_size, generator=generator)
    return {
        "flat": lambda: torch.randn(vocab_size, generator=generator),
        "peaked": lambda: -1.2 * rank_V.log()[order_V],
        "sorted": lambda: -1.2 * rank_V.log(),
        "rising": lambda: rank_V / vocab_size,
        "constant": lambda: torch.full((vocab_size,), -3.0),
        "few values": lambda: torch.randint(-3, 3, (vocab_size,), generator=generator).float(),
        "mostly excluded": lambda: torch.randn(vocab_size, generator=generator).where(order_V < 40, -torch.inf),
        "with NaN": lambda: torch.randn(vocab_size, generator=generator).where(order_V % 3 > 0, torch.nan),
    }[shape]()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("flat", torch.float32),
        ("peaked", torch.bfloat16),
        ("sorted", torch.float32),
        ("rising", torch.bfloat16),
        ("constant", torch.float16),
        ("few values", torch.float32),
        ("mostly excluded", torch.float32),
        ("with NaN", torch.float16),
    ],
)
def test_filters_choose_the_tokens_of_the_definition(device: str, shape: str, dtype: torch.dtype) -> None:
    row_V = _row(shape, VOCAB_SIZE, torch.Generator().manual_seed(7)).to(dtype)
    logits = row_V.repeat(len(FILTERS), 1)
    lines = slot_lines(*(slot_line(temperature=0.9, seed=11 + i, **s) for i, s in enumerate(FILTERS)))
    assert _sample(device, logits, lines) == _expected(logits, lines)


@pytest.mark.parametrize("shape", ["flat", "peaked"])
def test_filters_choose_the_tokens_of_the_definition_where_segments_are_long(device: str, shape: str) -> None:
    vocab_size = 17 * kernels.MAX_SEGMENTS + 4
    some = [{"top_k": 20, "top_p": 0.953}, {"top_k": 1000}, {"top_p": 0.9031}, {"min_p": 0.0503}]
    logits = _row(shape, vocab_size, torch.Generator().manual_seed(8)).bfloat16().repeat(len(some), 1)
    lines = slot_lines(*(slot_line(temperature=1.1, seed=5 + i, **s) for i, s in enumerate(some)))
    assert _sample(device, logits, lines) == _expected(logits, lines)


@pytest.mark.parametrize(
    ("num_kept", "filters"),
    [
        (1, {"top_k": 1}),
        (20, {"top_k": 20}),
        (700, {"top_k": 700}),
        (1000, {"top_k": 1000}),
        (kernels.CANDIDATES + 900, {"top_k": kernels.CANDIDATES + 900}),
        (1, {"top_p": 0.8 / (3 * kernels.CHUNK + 7)}),
        (2, {"top_p": 1.2 / (3 * kernels.CHUNK + 7)}),
        (7001, {"top_p": 7000.2 / (3 * kernels.CHUNK + 7)}),
        (16, {"top_k": 20, "top_p": 15.2 / 20}),
    ],
)
def test_the_last_entry_to_keep_is_kept_and_the_next_is_not(
    device: str, num_kept: int, filters: dict[str, float]
) -> None:
    """Of nearly equal logits the one with the highest noise is drawn if it is kept, and it is made the one in question."""
    vocab_size = 3 * kernels.CHUNK + 7
    noise_V = philox.gumbel(torch.tensor(12), torch.tensor(0), torch.tensor(5), vocab_size)
    noisiest = int(noise_V.argmax())
    order_V = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(13))
    logits = []
    for rank in (num_kept - 1, num_kept):
        order_V[order_V == rank], order_V[noisiest] = order_V[noisiest].item(), rank
        logits.append(-1e-8 * order_V.float())
    lines = slot_lines(*[slot_line(temperature=1.0, seed=12, **filters)] * 2)
    tokens = _sample(device, torch.stack(logits), lines)
    assert tokens == _expected(torch.stack(logits), lines)
    assert tokens[0] == noisiest != tokens[1]


def test_more_entries_can_be_kept_than_there_are_segments(device: str) -> None:
    high = -0.1 - 0.001 * torch.arange(kernels.CHUNK).float()
    high[:: kernels.MIN_SEGMENT] = 0.0
    logits = high.repeat(12, 1)
    top_k = 3 * kernels.CHUNK // kernels.MIN_SEGMENT // 2
    lines = slot_lines(*(slot_line(temperature=9.0, length=i, top_k=top_k) for i in range(1, 13)))
    tokens = _sample(device, logits, lines)
    assert tokens == _expected(logits, lines)
    assert any(token % kernels.MIN_SEGMENT for token in tokens)


@pytest.mark.parametrize("filters", [{"top_p": 0.05}, {"top_p": 0.5}, {"top_k": 30, "top_p": 0.4}, {"min_p": 0.6}])
def test_tokens_that_are_not_kept_are_drawn_again(device: str, filters: dict[str, float]) -> None:
    """Of a flat row most draws must be rejected first."""
    logits = (0.3 * torch.randn(500, generator=torch.Generator().manual_seed(9))).repeat(12, 1)
    lines = slot_lines(*(slot_line(temperature=1.0, length=i, seed=3, **filters) for i in range(1, 13)))
    assert _sample(device, logits, lines) == _expected(logits, lines)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"top_k": 3, "top_p": 0.55}])
def test_logits_that_become_equal_when_divided_tie(device: str, filters: dict[str, float]) -> None:
    temperature = 1.5
    high = torch.tensor(1.9)
    while torch.nextafter(high, -high) / temperature != high / temperature:
        high = torch.nextafter(high, -high)
    low = torch.nextafter(high, -high)
    logits = torch.stack([low, high, low - 9, low, low - 8]).repeat(12, 1)
    lines = slot_lines(*(slot_line(temperature=temperature, length=i, seed=4, **filters) for i in range(1, 13)))
    tokens = _sample(device, logits, lines)
    assert tokens == _expected(logits, lines)
    assert set(tokens) == {0, 1, 3}


def test_what_ties_with_entries_below_the_last_kept_is_not_kept(device: str) -> None:
    """Logits two floats apart differ when divided, but one in between would tie with either neighbour."""
    logit = torch.tensor(1.9)
    values = [logit := torch.nextafter(torch.nextafter(logit, -logit), -logit) for _ in range(8)]
    lines = slot_lines(
        *(slot_line(temperature=1.5, length=i, top_k=top_k) for top_k in (2, 3, 5, 7) for i in range(1, 9))
    )
    logits = torch.stack(values).repeat(32, 1)
    assert _sample(device, logits, lines) == _expected(logits, lines)


def test_logits_that_overflow_when_divided_tie(device: str) -> None:
    logits = torch.tensor([[1.0, 7.0, 9.0, 8.0, 2.0]])
    lines = slot_lines(slot_line(temperature=2e-38, top_k=1))
    assert _sample(device, logits, lines) == _expected(logits, lines) == [1]
    lines = slot_lines(slot_line(temperature=0.5, top_k=1), slot_line(temperature=0.5, min_p=0.5))
    lowest = torch.tensor([[-3e38, -3.1e38]] * 2)
    assert _sample(device, lowest, lines) == _expected(lowest, lines) == [line.NO_TOKEN] * 2


def test_a_row_draws_the_same_token_whatever_was_sampled_before(device: str) -> None:
    """Scratch memory that earlier calls left is not read."""
    generator = torch.Generator().manual_seed(10)
    lines = slot_lines(*(slot_line(temperature=1.0, seed=i, **s) for i, s in enumerate(FILTERS[1:11:3])))
    logits = torch.randn(4, 300, generator=generator)
    tokens = _sample(device, logits, lines)
    _sample(device, 30 * torch.randn(4, 300, generator=generator), lines)
    assert _sample(device, logits, lines) == tokens


@settings(max_examples=30)
@given(
    logits=st.lists(
        st.integers(-9000, 9000).map(lambda x: x / 300)
        | st.integers(-3, 3).map(float)
        | st.sampled_from([-torch.inf, torch.nan]),
        min_size=1,
        max_size=24,
    ),
    repeats=st.sampled_from([1, 1, 40]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.0517, 0.5013, 1.0]),
    top_k=st.integers(0, 26),
    top_p=st.sampled_from([0.0, 0.1234, 0.4567, 0.8901, 0.9876, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    length=st.integers(1, 2**20),
)
def test_kernel_chooses_the_token_of_the_definition_for_all_settings(
    device: str,
    logits: list[float],
    repeats: int,
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
    seed: int,
    length: int,
) -> None:
    lines = slot_lines(
        slot_line(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=seed, length=length)
    )
    logits_1V = torch.tensor([logits * repeats])
    assert _sample(device, logits_1V, lines) == _expected(logits_1V, lines)
