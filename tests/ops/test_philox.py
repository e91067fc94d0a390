import math

import pytest
import torch

from stepgraph.ops.sample.philox import gumbel, philox, word_to_gumbel


def _words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    assert philox(_words(counter), _words(key)) == _words(expected)


def test_philox_takes_int32_for_the_unsigned_words_of_the_same_bits() -> None:
    minus_one = torch.tensor(-1, dtype=torch.int32)
    assert philox((minus_one,) * 4, (minus_one,) * 2) == _words("408f276d 41c83b0e a20bc7c6 6d5451fd")


def test_noise_of_an_entry_is_the_lane_of_its_counter() -> None:
    seed_low, seed_high, position, vocab_size = -5, 77, 1234, 11
    noise_V = gumbel(torch.tensor(seed_low), torch.tensor(seed_high), torch.tensor(position), vocab_size)
    assert noise_V.shape == (vocab_size,)
    for entry in range(vocab_size):
        counter = tuple(torch.tensor(word) for word in (entry // 4, position, 0, 0))
        word = int(philox(counter, (torch.tensor(seed_low), torch.tensor(seed_high)))[entry % 4])
        uniform = ((word >> 9) + 0.5) / 2**23
        assert noise_V[entry].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-5, abs=1e-6)


def test_noise_is_finite_for_the_extreme_words() -> None:
    smallest, largest = word_to_gumbel(torch.tensor([0, 0xFFFFFFFF])).tolist()
    assert smallest == pytest.approx(-math.log(24 * math.log(2)), rel=1e-5)
    assert largest == pytest.approx(24 * math.log(2), rel=1e-5)


def test_noise_of_a_batch_is_the_noise_of_each() -> None:
    low, high, position = torch.tensor([1, 2, 1]), torch.tensor([0, 0, 9]), torch.tensor([7, 7, 8])
    noise_RV = gumbel(low, high, position, 9)
    for row in range(3):
        torch.testing.assert_close(noise_RV[row], gumbel(low[row], high[row], position[row], 9), rtol=0, atol=0)
