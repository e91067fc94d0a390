"""Which tokens end an answer: all those of which any part of a checkpoint says so.

A fine-tune of a base model often has a new end token in its tokenizer only, or in generation_config.json only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.json_file import read_json

logger = logging.getLogger(__name__)


def end_tokens(token_ids: Iterable[int], vocab_size: int, description: str) -> tuple[int, ...]:
    """Each of some end tokens once. Those that a model of `vocab_size` tokens cannot give are left out, with a warning; -1,
    which stands for none, without."""
    found = tuple(dict.fromkeys(token_ids))
    if strange := [token_id for token_id in found if not -1 <= token_id < vocab_size]:
        logger.warning(
            "%s names end tokens outside the vocabulary of %d tokens, which are left out: %s",
            description,
            vocab_size,
            ", ".join(map(str, strange)),
        )
    return tuple(token_id for token_id in found if 0 <= token_id < vocab_size)


def tokenizer_end_token(folder: Path) -> int | None:
    """End token of the tokenizer in a checkpoint folder, found in its JSON files as transformers finds it, which takes seconds
    less than to load it. None if they name none, or cannot be read: that shows when the tokenizer is loaded."""
    config = _read(folder / "tokenizer_config.json")
    name = config.get("eos_token")
    if "added_tokens_decoder" not in config:  # as all had until 2023, whose special tokens are in a file of their own
        name = _read(folder / "special_tokens_map.json").get("eos_token", name)
    if isinstance(name, dict):
        name = name.get("content")
    if not isinstance(name, str):
        return None
    return next((token_id for token_id in _ids_of(name, folder, config) if type(token_id) is int), None)


def _ids_of(name: str, folder: Path, config: dict[str, Any]) -> Iterator[Any]:
    """What the files of a tokenizer say is the id of a token, the quickest to read first."""
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            if token["content"] == name:
                yield int(token_id)
    yield _read(folder / "added_tokens.json").get(name)
    tokenizer = _read(folder / "tokenizer.json")
    with suppress(AttributeError, TypeError, KeyError):
        yield from (token["id"] for token in tokenizer.get("added_tokens", []) if token["content"] == name)
        yield tokenizer["model"]["vocab"].get(name)
    yield _read(folder / "vocab.json").get(name)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none."""
    try:
        return read_json(path)
    except ModelError:
        return {}
