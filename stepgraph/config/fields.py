"""A setting is declared once, as a dataclass field; its flag, JSON key, help text and check come from there."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from stepgraph.errors import ConfigError


def setting(default: Any, help: str, *, choices: Sequence[str] | None = None, minimum: float | None = None) -> Any:
    """A dataclass field with a help text and, where it has them, its allowed values or its smallest value."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


def check(config: Any) -> None:
    """Raise ConfigError for a field outside its declared choices or below its minimum. Called at birth."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        choices, minimum = field.metadata.get("choices"), field.metadata.get("minimum")
        if choices is not None and value not in choices:
            raise ConfigError(f"{field.name}={value!r} is not known; choose one of: {', '.join(choices)}")
        if minimum is None or value is None:
            continue
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, bool) or not isinstance(entry, int | float):
                raise ConfigError(f"{field.name}={value!r} must be a number ≥ {minimum}")
            if entry < minimum:
                raise ConfigError(f"{field.name}={value!r} is too small; the smallest value is {minimum}")


def scalar_type(config_type: type, name: str) -> tuple[type, bool]:
    """The element type of a field and whether it takes several: ``tuple[int, ...] | None`` gives ``(int, True)``."""
    hint = typing.get_type_hints(config_type)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
