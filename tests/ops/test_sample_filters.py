"""The Triton kernel of `sample` where `min_p`, `top_k` and `top_p` keep less than all, on rows of every shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor

from stepgraph.ops.sample import reference
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
VOCAB_SIZE = 2 * kernels.CHUNK + 7


def _sample(device: str, logits: Tensor, lines: Tensor) -> list[int]:
    rows = torch.arange(1, len(logits) + 1, dtype=torch.int32)
    return kernels.sample(logits.to(device), rows.to(device), lines.to(device)).tolist()


def _expected(logits: Tensor, lines: Tensor) -> list[int]:
    return reference.sample(logits, torch.arange(1, len(logits) + 1, dtype=torch.int32), lines).tolist()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", ["flat", "peaked", "sorted", "rising", "constant", "few values", "mostly excluded", "with NaN"]
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


@pytest.mark.parametrize("filters", [{"top_p": 0.05}, {"top_p": 0.5}, {"top_k": 30, "top_p": 0.4}, {"min_p": 0.6}])
def test_tokens_that_are_not_kept_are_drawn_again(device: str, filters: dict[str, float]) -> None:
    """Of a flat row most draws must be rejected first."""
    logits = (0.3 * torch.randn(500, generator=torch.Generator().manual_seed(9))).repeat(40, 1)
    lines = slot_lines(*(slot_line(temperature=1.0, length=i, seed=3, **filters) for i in range(1, 41)))
    assert _sample(device, logits, lines) == _expected(logits, lines)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"top_k": 3, "top_p": 0.55}])
def test_logits_that_become_equal_when_divided_tie(device: str, filters: dict[str, float]) -> None:
    temperature = 1.5
    high = torch.tensor(1.9)
    while torch.nextafter(high, -high) / temperature != high / temperature:
        high = torch.nextafter(high, -high)
    low = torch.nextafter(high, -high)
    logits = torch.stack([low, high, low - 9, low, low - 8]).repeat(30, 1)
    lines = slot_lines(*(slot_line(temperature=temperature, length=i, seed=4, **filters) for i in range(1, 31)))
    tokens = _sample(device, logits, lines)
    assert tokens == _expected(logits, lines)
    assert set(tokens) == {0, 1, 3}


def test_a_row_draws_the_same_token_whatever_was_sampled_before(device: str) -> None:
    """Scratch memory that earlier calls left is not read."""
    generator = torch.Generator().manual_seed(10)
    lines = slot_lines(*(slot_line(temperature=1.0, seed=i, **s) for i, s in enumerate(FILTERS)))
    logits = torch.randn(len(FILTERS), 300, generator=generator)
    tokens = _sample(device, logits, lines)
    for _ in range(3):
        _sample(device, 30 * torch.randn(len(FILTERS), 300, generator=generator), lines)
        assert _sample(device, logits, lines) == tokens


@settings(max_examples=60)
@given(
    logits=st.lists(
        st.floats(-30, 30, width=32) | st.integers(-3, 3).map(float) | st.sampled_from([-torch.inf, torch.nan]),
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
