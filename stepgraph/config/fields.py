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


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check(config: Any) -> None:
    """Raise ConfigError for a field of the wrong type, outside its choices or below its minimum. Called at birth."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and field.default is None:
            continue
        kind, several = scalar_type(type(config), field.name)
        if several and not isinstance(value, tuple):
            raise ConfigError(f"{field.name}={value!r} must be a list")
        if several and not value:
            raise ConfigError(f"{field.name} is empty; give at least one value, or leave it unset")
        choices, minimum = field.metadata["choices"], field.metadata["minimum"]
        for entry in value if several else (value,):
            if not isinstance(entry, int | float if kind is float else kind) or isinstance(entry, bool) != (
                kind is bool
            ):
                subject = "each entry of " if several else ""
                raise ConfigError(f"{subject}{field.name}={value!r} must be {_EXPECTED[kind]}")
            if choices is not None and entry not in choices:
                raise ConfigError(f"{field.name}={value!r} is not known; choose one of: {', '.join(choices)}")
            if minimum is not None and entry < minimum:
                raise ConfigError(f"{field.name}={value!r} is too small; the smallest value is {minimum}")


def scalar_type(config_type: type, name: str) -> tuple[type, bool]:
    """The element type of a field and whether it takes several: ``tuple[int, ...] | None`` gives ``(int, True)``."""
    hint = typing.get_type_hints(config_type)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
