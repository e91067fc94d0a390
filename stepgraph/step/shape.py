"""The static sizes of a step: the only key of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from stepgraph.abi import slot_line

_ONE_ROW_TOKENS = 16
"""Up to so many tokens, steps of one row have graphs of their own."""


class Variant(IntEnum):
    """What a step's graph carries beside the plain step. Each level holds the ones before it, so that requests with
    different settings share a step: it runs at the highest level any of them needs, and the others' tokens are the same."""

    PLAIN = 0  # temperature, top-k, top-p, min-p, stop tokens
    EXTENDED = 1  # + penalties, biases, bad words, min_tokens, token masks, log-probabilities of sampled tokens
    PROMPT_LOGPROBS = 2  # + logits and log-probabilities of every token


@dataclass(frozen=True, order=True)
class StepShape:
    """Sizes that a captured graph bakes in. Which requests fill them, and how, is data."""

    num_tokens: int
    num_rows: int
    variant: Variant = Variant.PLAIN
    num_drafts: int = 0
    """Most proposals that a row verifies in this step, and most that are made for it in the next."""

    @property
    def num_samples(self) -> int:
        """Most tokens the step can sample."""
        return min(self.num_tokens, self.num_rows * (1 + self.num_drafts))

    def num_deltas(self, block_size: int, per_place: int = 1) -> int:
        """Most KV blocks a step of this shape can newly need, of which there are `per_place` for every `block_size` tokens.

        A row of n tokens crosses at most ``n // block_size + 1`` borders of them, summed over the rows. While drafting it may
        write as many tokens more as it makes proposals, less one.
        """
        num_drafted = self.num_rows * max(0, self.num_drafts - 1)
        return per_place * ((self.num_tokens + num_drafted) // block_size + self.num_rows)

    @property
    def deltas_start(self) -> int:
        """Where the deltas begin in the packed plan, behind the rows; in int32."""
        return slot_line.ROW_WIDTH * self.num_rows

    def plan_length(self, block_size: int, per_place: int = 1) -> int:
        """Length of the packed plan, in int32; arguments as of `num_deltas`."""
        return self.deltas_start + slot_line.DELTA_WIDTH * self.num_deltas(block_size, per_place)

    def holds(self, other: StepShape) -> bool:
        """Whether a graph of this shape can run whatever one of `other` can. How many proposals it makes is part of the graph."""
        return (
            self.num_tokens >= other.num_tokens
            and self.num_rows >= other.num_rows
            and self.variant >= other.variant
            and self.num_drafts == other.num_drafts
        )

    def __str__(self) -> str:
        drafts = f"+{self.num_drafts}" if self.num_drafts else ""
        suffix = f" {self.variant.name.lower()}" if self.variant else ""
        return f"{self.num_tokens}x{self.num_rows}{drafts}{suffix}"


def token_sizes(max_tokens: int) -> Iterator[int]:
    """Token counts to capture: four per doubling from 32 up, where padding stays below a fifth, and two below; `max_tokens`
    last.

    Small steps cost about the same whatever their size, but at light load most steps are small: with powers of two alone,
    15 % of all tokens computed on ShareGPT's lengths were padding.
    """
    size = 1
    while size < max_tokens:
        yield size
        doubling = 1 << (size.bit_length() - 1)
        size += max(1, doubling // (2 if size < 32 else 4))
    yield max_tokens


def row_sizes(num_tokens: int, max_rows: int) -> Iterator[int]:
    """Row counts to capture beside `num_tokens` tokens: factors of 8, so that the few rows of a prompt do not pay for the
    logits of many, and the most rows these tokens can have, so that a pure decode step has no padding rows. Few tokens are often
    one request's: a short prompt, or a token and its proposals."""
    most = min(num_tokens, max_rows)
    if 1 < num_tokens <= _ONE_ROW_TOKENS and most > 1:
        yield 1
    size = 8
    while size < most:
        yield size
        size *= 8
    yield most
