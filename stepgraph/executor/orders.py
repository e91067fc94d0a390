"""What goes through the ring of orders, as words: whatever is large lies there as it is, the rest is pickled."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepgraph.executor.ring import Words
from stepgraph.step.admission import Admission
from stepgraph.step.shape import StepShape, Variant


def words_of_admission(admission: Admission) -> Words:
    """An admission: nine lengths and numbers, tokens, blocks, lines, and how to sample."""
    slot, tokens, prompt_len, generation, max_length, sampling, blocks, computed, lines = admission
    how = pickle.dumps(sampling)
    numbers = (slot, prompt_len, generation, max_length, computed, len(tokens), len(blocks), len(lines), len(how))
    padded = np.frombuffer(how + bytes(-len(how) % 4), dtype=np.int32)
    return np.concatenate((_words(numbers), _words(tokens), _words(blocks), _words(lines), padded))


def admission_of(words: Words) -> Admission:
    """What `words_of_admission` wrote."""
    slot, prompt_len, generation, max_length, computed, *sizes, length = words[:9].tolist()
    tokens, blocks, lines, how = np.split(words[9:], np.cumsum(sizes))
    sampling = pickle.loads(how.tobytes()[:length])
    values = slot, _array(tokens), prompt_len, generation, max_length, sampling, _array(blocks), computed
    return Admission(*values, tuple(lines.tolist()))


def words_of_shape(shape: StepShape) -> Words:
    """The sizes of a step."""
    return _words((shape.num_tokens, shape.num_rows, shape.variant, shape.num_drafts))


def shape_of(words: Words) -> StepShape:
    """What `words_of_shape` wrote."""
    num_tokens, num_rows, variant, num_drafts = words.tolist()
    return StepShape(num_tokens, num_rows, Variant(variant), num_drafts)


def words_of_call(function: Any, args: Sequence[Any]) -> Words:
    """A function that both processes can import, and what it is called with."""
    call = pickle.dumps((function, tuple(args)), protocol=5)
    return np.frombuffer(call + bytes(-len(call) % 4), dtype=np.int32)


def call_of(words: Words) -> tuple[Any, tuple[Any, ...]]:
    """What `words_of_call` wrote. A pickle says itself where it ends."""
    function, args = pickle.loads(memoryview(words))  # type: ignore[arg-type]  # any buffer will do
    return function, args


def words_of_parts(parts: Sequence[Words]) -> Words:
    """Words for each rank: how many each has, and all of them."""
    return np.concatenate((_words([len(part) for part in parts]), *parts))


def part_of(words: Words, rank: int, size: int) -> Words:
    """Those for one of `size` ranks, of what `words_of_parts` wrote; none of none."""
    if not len(words):
        return words
    lengths = words[:size].tolist()
    start = size + sum(lengths[:rank])
    return words[start : start + lengths[rank]]


def _words(values: Sequence[int]) -> Words:
    return np.asarray(values, dtype=np.int32)


def _array(words: Words) -> array[int]:
    values = array("i")
    values.frombytes(words.tobytes())
    return values
