"""Counter-based random numbers in torch: Philox4x32-10 (Salmon et al., 2011) and the Gumbel noise made of it.

32-bit words are held in int64, whose products wrap exactly where Philox wants their low 64 bits.
"""

import torch
from torch import Tensor

LANES = 4
"""Words one counter yields: noise of vocabulary entries 4c … 4c + 3 comes from counter (c, position, 0, 0)."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10. Reads no values: may be recorded call by call.

    Args:
        counter, key: integer tensors that broadcast together; only their low 32 bits count.

    Returns:
        Four int64 tensors of the broadcast shape, each word in 0 … 2³² - 1.
    """
    c0, c1, c2, c3 = (word.long() & _WORD for word in counter)
    k0, k1 = (word.long() & _WORD for word in key)
    for _ in range(_ROUNDS):
        c3_next, c1_next = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((c1_next >> 32) ^ c1 ^ k0) & _WORD
        c2 = ((c3_next >> 32) ^ c3 ^ k1) & _WORD
        c1, c3 = c1_next, c3_next  # their high halves are cut off when next used
        k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
    return c0, c1 & _WORD, c2, c3 & _WORD


def word_to_gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel noise of a random 32-bit word: float32, finite for every word."""
    uniform = (word >> 9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def gumbel_lanes(seed_low: Tensor, seed_high: Tensor, position: Tensor, group: Tensor) -> Tensor:
    """Gumbel noise of the vocabulary entries 4·group … 4·group + 3.

    Args:
        seed_low, seed_high, position, group: integer tensors that broadcast together to [...].

    Returns:
        [..., 4] float32.
    """
    zero = torch.zeros((), dtype=torch.int64)
    return word_to_gumbel(torch.stack(philox((group, position, zero, zero), (seed_low, seed_high)), dim=-1))


def gumbel(seed_low: Tensor, seed_high: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of a whole vocabulary.

    Args:
        seed_low, seed_high, position: [...] integers.
        vocab_size: V.

    Returns:
        [..., V] float32, between -2.82 and 16.64.
    """
    group = torch.arange(-(-vocab_size // LANES))
    lanes = gumbel_lanes(seed_low.unsqueeze(-1), seed_high.unsqueeze(-1), position.unsqueeze(-1), group)
    return lanes.flatten(-2)[..., :vocab_size]
