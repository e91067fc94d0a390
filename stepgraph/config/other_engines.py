"""Settings as users of vLLM and FastDeploy know them: what each comes to here.

The tables are `tables/flags.json`, flags by topic, and `tables/keys.json`, keys of flags that hold JSON; the parser, files of
settings, keyword arguments and docs/coming-from.md go by them. A row may have:

- `of`: the engines that have it; "older" stands for older versions of either.
- `alias`: other spellings of the flag. `takes`: "switch", "values" or "optional" where it does not take one value.
- `same`: ours has its name and meaning. `to`: ours has another name. `map`: values that come to other settings, by their text.
  `like`: the group ("" is none) and name of the row whose values it has.
- `neutral`: values that change nothing here, or "any".
- `refused`: examples of values that are refused, as are all that no other entry covers; of a setting of ours, only these.
- `why`: the reason, after a value that was refused or has no effect. `secret`: the value is shown to nobody.
- `example`: a value that is taken, for tests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stepgraph.errors import ConfigError

logger = logging.getLogger(__name__)

_TABLES = Path(__file__).parent / "tables"
_ANY = "any"


@dataclass(frozen=True)
class Row:
    """What a flag or key of another engine comes to."""

    of: str
    alias: tuple[str, ...] = ()
    takes: str = "value"
    same: bool = False
    to: str | None = None
    map: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    like: tuple[str, str] | None = None
    neutral: str | list[Any] = field(default_factory=list)
    refused: tuple[Any, ...] = ()
    why: str = ""
    secret: bool = False
    example: Any = None

    def meaning(self, name: str, value: Any) -> dict[str, Any]:
        """The settings that `name=value` comes to; none, and a line in the log, if it has no effect.

        Raises:
            ConfigError: it asks for what does not exist.
        """
        shown = name if self.secret else f"{name}={value!r}"
        known = self.map.get(text_of(value))
        if known is not None:
            return dict(known)
        if self.is_neutral(value):
            logger.warning("%s has no effect here: %s", shown, self.why)
            return {}
        target = self.to or (name if self.same else None)
        if target is None or _among(value, self.refused):
            others = [] if self.neutral == _ANY or target else [*texts_of(self.neutral), *self.map]
            advice = f"leave it out{', or give ' if others else ''}{' or '.join(others)}"
            raise ConfigError(f"{shown} is not supported: {self.why}; {advice}", param=name)
        return {target: value}

    def is_neutral(self, value: Any) -> bool:
        """Whether it changes nothing here."""
        return self.neutral == _ANY or _among(value, self.neutral)


def _among(value: Any, values: Iterable[Any]) -> bool:
    """Whether it is one of them, where True is not 1 and a tuple is a list."""
    value = list(value) if isinstance(value, tuple) else value
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def text_of(value: Any) -> str:
    """A value as one writes it on a command line, and as `Row.map` knows it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def texts_of(values: Iterable[Any]) -> list[str]:
    """Values as people read them: of many numbers in a row the first and the last, and "" where there is nothing."""
    values = list(values)
    if len(values) > 3 and values == list(range(len(values))):
        return [f"0 to {len(values) - 1}"]
    return [text_of(value) or '""' for value in values]


def value_of(text: str) -> Any:
    """What a text on a command line says: JSON if it is some, True and False in any case, else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class Tables(NamedTuple):
    """Both tables."""

    topics: Mapping[str, Mapping[str, Row]]
    """Rows of flags by topic, in the order of the documentation, and by the setting's name, with underscores."""
    flags: Mapping[str, Row]
    """The same of all topics."""
    keys: Mapping[str, Mapping[str, Row]]
    """Rows of keys by the setting that holds them, and by their name."""


@cache
def tables() -> Tables:
    """Both tables, read once."""
    topics, keys = _read("flags.json"), _read("keys.json")
    groups = {"": {name: row for rows in topics.values() for name, row in rows.items()}, **keys}
    for rows in (*topics.values(), *groups.values()):
        for name, row in rows.items():
            if row.like is not None:
                group, model = row.like
                other = groups[group][model]
                rows[name] = replace(row, map=other.map, refused=other.refused, why=other.why)
    return Tables(topics, groups[""], keys)


def _read(file: str) -> dict[str, dict[str, Row]]:
    """The rows of a table."""
    lists = ("alias", "like", "refused")
    groups: dict[str, dict[str, dict[str, Any]]] = json.loads((_TABLES / file).read_text(encoding="utf-8"))
    return {
        group: {name: Row(**row | {key: tuple(row[key]) for key in lists if key in row}) for name, row in rows.items()}
        for group, rows in groups.items()
    }


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under our names: those of other engines come to ours, or have no effect, which is logged.

    Those that nobody has stay as they are. One that is None and not ours is not set.

    Raises:
        ConfigError: one asks for what does not exist, or two contradict each other.
    """
    rows = tables().flags
    ours: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, value in settings.items():
        row = rows.get(name)
        if row is not None and value is None and not row.same:
            continue
        for setting, meant in (row.meaning(name, value) if row is not None else {name: value}).items():
            if setting in ours and ours[setting] != meant:
                raise ConfigError(
                    f"{name} asks for {setting}={meant!r}, and {sources[setting]} for {ours[setting]!r}; give one of them",
                    param=name,
                )
            ours[setting], sources[setting] = meant, name
    return ours


def translated_keys(group: str, given: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """The settings that keys of a setting come to which holds several; as `translated`.

    Args:
        group: the setting that holds them.
        given: the keys and their values.
        own: further keys, and the settings they are.

    Raises:
        ConfigError: as `translated`, or a key is not known; says which are.
    """
    rows = tables().keys[group]
    settings: dict[str, Any] = {}
    for key, value in given.items():
        row = rows.get(key) or Row("", to=own.get(key))
        if key not in rows and key not in own:
            raise ConfigError(
                f"{group} has no key {key!r}; known keys: {', '.join(sorted({*rows, *own}))}", param=group
            )
        if value is None and not (row.same or row.to):
            continue
        for name, meant in row.meaning(key, tuple(value) if isinstance(value, list) else value).items():
            if settings.setdefault(name, meant) != meant:
                raise ConfigError(
                    f"{key}={value!r} contradicts {name}={settings[name]!r} given beside it in {group}", param=key
                )
    return settings
