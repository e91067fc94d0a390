"""Random batches to check graphs on: which rows a step has, how long they are, and what they ask for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from stepgraph.abi import slot_line
from stepgraph.step.shape import StepShape, Variant
from stepgraph.step.slot_sampling import SlotSampling

Value = TypeVar("Value")


@dataclass(frozen=True)
class Row:
    """One row of a composition: `query_len` tokens after `computed` cached ones, of `length` known and `num_drafts` proposed."""

    computed: int
    query_len: int
    length: int
    active: bool = True
    num_drafts: int = 0

    @property
    def end(self) -> int:
        """Tokens that are cached after the step, those of proposals that fall included."""
        return self.computed + self.query_len

    @property
    def num_samples(self) -> int:
        """Tokens the step samples for it: one, and one more for each proposal it runs; none for a chunk of a prompt."""
        return max(0, self.end - self.length + 1) if self.active else 0

    @property
    def emits(self) -> bool:
        return self.num_samples > 0


@dataclass(frozen=True)
class Composition:
    """A batch for one step; `seed` decides its tokens, blocks and cached values."""

    rows: tuple[Row, ...]
    seed: int

    def __str__(self) -> str:
        return " ".join(
            f"{row.query_len}@{row.computed}{f'+{row.num_drafts}' if row.num_drafts else ''}{'' if row.active else '!'}"
            for row in self.rows
        )


def random_compositions(
    shape: StepShape, count: int, rng: random.Random, *, max_len: int, num_blocks: int, block_size: int
) -> Iterator[Composition]:
    """Compositions of up to `shape.num_rows` rows and up to `shape.num_tokens` tokens, of sequences that an engine can hold.

    The first are adversarial: one row of everything; all rows one token and the last the rest; all rows one token; and where
    the shape verifies proposals, as many rows as fit with all they can have. The others mix decodes, proposals, whole prompts
    and chunks at random, now and then with a row that the device has already ended.

    Args:
        shape: to fill.
        count: how many.
        rng: decides everything.
        max_len: tokens of the longest sequence, its proposals included.
        num_blocks: KV blocks for all rows together.
        block_size: tokens per KV block.
    """
    T, R, K = shape.num_tokens, shape.num_rows, shape.num_drafts
    max_len = min(max_len, num_blocks * block_size)
    families = [[T], [1] * (R - 1) + [T - R + 1], [1] * R]
    if K:
        verifying, rest = divmod(T, 1 + K)
        families.append(([1 + K] * verifying + [rest] * (rest > 0))[:R])
    beyond = max(0, K - 1)  # entries that a draft model may write after a row's
    for index in range(count):
        if index < len(families):
            lengths = families[index]
        else:
            rows = rng.randint(1, R)
            cuts = sorted(rng.sample(range(1, rng.randint(rows, T) + 1), rows))
            lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
            if K and rng.random() < 0.5:  # mostly rows that verify proposals
                lengths = [min(n, rng.randint(1, 1 + K)) for n in lengths]
            rng.shuffle(lengths)
        lengths = [min(n, max_len) for n in lengths]
        while (spare := num_blocks - sum(-(-(n + beyond) // block_size) for n in lengths)) < 0 and len(lengths) > 1:
            lengths = lengths[1:]
        max_computed = min(max_len // 2 // len(lengths), max(0, spare) // len(lengths) * block_size)
        yield Composition(
            tuple(_random_row(n, max_computed, max_len, K, rng, may_end=index >= len(families)) for n in lengths),
            seed=rng.getrandbits(32),
        )


def _random_row(
    query_len: int, max_computed: int, max_len: int, max_drafts: int, rng: random.Random, *, may_end: bool
) -> Row:
    active = not may_end or rng.random() > 0.1
    if query_len <= max_drafts + 1 and max_drafts and rng.random() < 0.8:
        num_drafts = min(rng.choice((query_len - 1, rng.randint(query_len - 1, max_drafts))), max_len - 1)
        computed = rng.choice((0, rng.randint(0, min(max_computed, max_len - 1 - num_drafts))))
        return Row(computed, query_len, computed + 1, active, num_drafts)
    computed = rng.choice((0, rng.randint(0, min(max_computed, max_len - query_len))))
    end = computed + query_len
    unread = rng.choice((0, 0, rng.randint(0, min(64, max_len - end))))  # prompt left for later steps
    return Row(computed, query_len, end + unread, active)


def random_sampling(rng: random.Random, variant: Variant, vocab_size: int) -> SlotSampling:
    """What a row may ask of a graph of `variant`, each feature with some chance."""

    def maybe(value: Value, nothing: Value) -> Value:
        return value if rng.random() < 0.4 else nothing

    seed = rng.getrandbits(64)
    plain = SlotSampling(
        seed=seed,
        temperature=maybe(rng.uniform(0.2, 2.0), 0.0),
        top_k=maybe(rng.randint(1, vocab_size), 0),
        top_p=maybe(rng.uniform(0.1, 1.0), 1.0),
        min_p=maybe(rng.uniform(0.0, 0.2), 0.0),
        memory_key=seed % 3,
        max_num_drafts=maybe(rng.randint(0, slot_line.MAX_DRAFTS), slot_line.MAX_DRAFTS),
    )
    if variant is Variant.PLAIN:
        return plain
    token = partial(rng.randrange, vocab_size)
    return replace(
        plain,
        repetition_penalty=maybe(rng.uniform(0.5, 2.0), 1.0),
        presence_penalty=maybe(rng.uniform(-2.0, 2.0), 0.0),
        frequency_penalty=maybe(rng.uniform(-2.0, 2.0), 0.0),
        min_tokens=maybe(rng.randint(0, 40), 0),
        logit_bias=maybe(tuple((token(), rng.uniform(-5, 5)) for _ in range(rng.randint(1, 9))), ()),
        bad_words=maybe(tuple((token(),) for _ in range(rng.randint(1, 9))), ()),
        masked=maybe(True, False),
        num_logprobs=maybe(rng.randint(1, 1 + slot_line.MAX_LOGPROBS), 0),
        num_prompt_logprobs=maybe(rng.randint(1, 1 + slot_line.MAX_LOGPROBS), 0),
    )
