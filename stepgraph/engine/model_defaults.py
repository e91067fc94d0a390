"""What a checkpoint says of sampling from it, checked when an engine or server starts: no request can mend it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from stepgraph.abi import slot_line
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError, ModelError, RequestError
from stepgraph.models.source import SAMPLING_DEFAULTS, ModelSource

logger = logging.getLogger(__name__)


def sampling_defaults_of(source: ModelSource) -> dict[str, Any]:
    """How the model's makers recommend to sample from it: fields of SamplingParams, those they name.

    Raises:
        ModelError: a value that no request could give, or of the wrong type.
    """
    try:
        return _checked(source.sampling_defaults())
    except RequestError as error:
        raise ModelError(
            f"generation_config.json of {source.name}, which requests take their defaults from, cannot be used: {error}. "
            "Correct the value there, or remove it."
        ) from error


def sampling_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the setting `override_generation_config` says of sampling: fields of SamplingParams.

    Raises:
        ConfigError: it holds another key, or a value that no request could give.
    """
    for name in given:
        if name not in SAMPLING_DEFAULTS:
            raise ConfigError(
                f"override_generation_config has no key {name!r}; known keys: {', '.join(SAMPLING_DEFAULTS)}",
                param="override_generation_config",
            )
    try:
        return _checked(given)
    except RequestError as error:
        raise ConfigError(f"override_generation_config: {error}", param="override_generation_config") from error


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same, whole numbers as such; RequestError for a value that no request could give, or of the wrong type."""
    whole = {f.name for f in fields(SamplingParams) if type(f.default) is int}
    checked = {}
    for name, value in values.items():
        if name in whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        SamplingParams(**{name: value})
        checked[name] = value
    return checked


def end_tokens_of(source: ModelSource) -> tuple[int, ...]:
    """Tokens that end an answer; a warning if there are none.

    Raises:
        ModelError: there are more than a request can have.
    """
    found = source.config.eos_token_ids
    if not found:
        logger.warning(
            "%s names no token that ends an answer: each runs to its max_tokens, unless a request gives stop_token_ids or stop",
            source.description,
        )
    if len(found) > slot_line.MAX_STOP_TOKENS:
        raise ModelError(
            f"{source.description} names {len(found)} tokens that end an answer, and at most {slot_line.MAX_STOP_TOKENS} fit; "
            "remove some of eos_token_id in generation_config.json or config.json."
        )
    return found
