"""A setting is declared once, as a dataclass field; its flag, YAML and JSON key, help text and check come from there."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepgraph.errors import ConfigError


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    metavar: str | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field with a help text and, where it has them, its allowed values or its smallest value.

    Args:
        default: the value where none is given; None where the default is chosen later or there is none.
        help: what the setting does, in one line.
        choices: the only values.
        minimum: the smallest value.
        metavar: what stands for the value in help texts; default: N for numbers, TEXT for others.
        secret: the value is in no `repr` and no error message.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "metavar": metavar}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Mapping: "a JSON object"}


_type_hints = functools.cache(typing.get_type_hints)  # which evaluates text anew at each call


def check(config: Any) -> None:
    """Raise ConfigError for a field of the wrong type, outside its choices or below its minimum. Called at birth."""
    for field in dataclasses.fields(config):
        check_value(type(config), field.name, getattr(config, field.name))


def check_value(config_type: type, name: str, value: Any) -> None:
    """Check what one field of `config_type` would hold, as far as that can be told from the field alone.

    Raises:
        ConfigError: it has the wrong type, is outside its choices or below its minimum.
    """
    field = next(field for field in dataclasses.fields(config_type) if field.name == name)
    if value is None and type(None) in typing.get_args(_type_hints(config_type)[name]):
        return
    kind, several = scalar_type(config_type, name)
    shown = f"{name}={value!r}" if field.repr else name
    if several and not isinstance(value, tuple):
        raise ConfigError(f"{shown} must be a list")
    if several and not value:
        raise ConfigError(f"{name} is empty; give at least one value, or leave it unset")
    choices, minimum = field.metadata["choices"], field.metadata["minimum"]
    for entry in value if several else (value,):
        if not isinstance(entry, int | float if kind is float else kind) or isinstance(entry, bool) != (kind is bool):
            subject = "each entry of " if several else ""
            raise ConfigError(f"{subject}{shown} must be {_EXPECTED[kind]}")
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ConfigError(f"{shown} must be a finite number")
        if choices is not None and entry not in choices:
            raise ConfigError(f"{shown} is not known; choose one of: {', '.join(choices)}")
        if minimum is not None and entry < minimum:
            raise ConfigError(f"{shown} is too small; the smallest value is {minimum}")


def scalar_type(config_type: type, name: str) -> tuple[type, bool]:
    """The element type of a field and whether it takes several: ``tuple[int, ...] | None`` gives ``(int, True)``."""
    hint = _type_hints(config_type)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return typing.get_origin(hint) or hint, False


def read_object(name: str, given: str | dict[str, Any], example: str) -> dict[str, Any]:
    """A setting that holds several others, given as JSON text or as a dict.

    Args:
        name: of the setting.
        given: its value.
        example: JSON text that would do.

    Raises:
        ConfigError: it is not JSON, or no object.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name} is not JSON ({error}); write e.g. '{example}'") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{name} must be a JSON object, not {type(given).__name__}")
    return given


def text_of_file(path: str, name: str) -> str:
    """What is in the file that a setting of this name gives. ConfigError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name}={path!r} cannot be read: {reason}") from error


def flag_of(name: str) -> str:
    """The flag of a setting: `max_num_seqs` is ``--max-num-seqs``."""
    return "--" + name.replace("_", "-")


def homes_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """Of every setting of these dataclasses, by its name: the key of the dataclass that holds it."""
    return {field.name: part for part, part_type in parts.items() for field in dataclasses.fields(part_type)}


def refuse_unknown(names: Iterable[str], known: Iterable[str], further: Iterable[str] = ()) -> None:
    """Raise ConfigError if a name is not `known`, with the one meant, where it looks like a slip, and all known ones.

    `further` ones are known too, and may be meant; they are too many to be listed.
    """
    known = sorted(known)
    every = {*known, *further}
    for name in sorted(set(names) - every):
        close = difflib.get_close_matches(name, sorted(every), n=1)
        hint = f"did you mean {close[0]!r}? Known" if close else "known"
        raise ConfigError(f"unknown setting {name!r}; {hint} settings: {', '.join(known)}")
