"""Command lines as users of other engines write them, put into the spelling that argparse reads."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from typing import Any

from stepgraph.config.fields import flag_of
from stepgraph.config.other_engines import tables, value_of
from stepgraph.errors import ConfigError


def respelled(arguments: Sequence[str], known: Container[str]) -> list[str]:
    """The same arguments with long names and dashes: ``-tp 2``, ``--max_model_len 8192``, ``-O3``, ``--disable-lora``,
    ``--compilation-config.cudagraph_mode FULL``.

    Args:
        arguments: of a command line, without the command.
        known: flags that the parser has, which stay as they are, beside those of other engines.

    Raises:
        ConfigError: a flag that holds JSON is given whole and by its keys, or a key twice.
    """
    words: list[str] = []
    by_key: dict[str, dict[str, Any]] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += [word, *rest]
            break
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag in known:
            words.append(word)
        elif flag.startswith("-O"):
            words += _optimization(word, rest)
        else:
            said, dot, path = flag.partition(".")
            flag = _long(said, known)
            if path and (flag in known or _name(flag) in tables().flags) and (equals or rest):
                _put(by_key.setdefault(flag, {}), flag, path, value if equals else rest.pop(0))
            else:
                words.append(flag + dot + path + equals + value)
    for flag, keys in by_key.items():
        if any(word.partition("=")[0] == flag for word in words):
            raise ConfigError(f"{flag} is given whole and by its keys; give it in one way")
        words += [flag, json.dumps(keys)]
    return words


def _long(flag: str, known: Container[str]) -> str:
    """A flag's long name; itself if nobody knows it."""
    if not flag.startswith("--"):
        return next((flag_of(name) for name, row in tables().flags.items() if flag in row.alias), flag)
    given, flag = flag, flag.replace("_", "-")
    if flag in known or _name(flag) in tables().flags or _name(flag).removeprefix("no_") in tables().flags:
        return flag
    for name, row in tables().flags.items():
        if flag in row.alias:
            return flag_of(name)
    for said, opposite in (("--disable-", "--enable-"), ("--enable-", "--disable-")):
        other = opposite + flag.removeprefix(said)
        if flag.startswith(said) and _name(other) in tables().flags:
            return "--no-" + other.removeprefix("--")
    return given


def _optimization(word: str, rest: list[str]) -> list[str]:
    """-O with a level, or, as in older versions of vLLM, with the JSON of --compilation-config or one of its keys."""
    given = word.removeprefix("-O").removeprefix("=")
    if given.startswith("."):
        rest.insert(0, "--compilation-config" + given)
        return []
    if not given and rest:
        given = rest.pop(0)
    return ["--compilation-config" if given.startswith("{") else "--optimization-level", *([given] if given else [])]


def _put(keys: dict[str, Any], flag: str, path: str, text: str) -> None:
    """Put a value where a path of keys with dots leads; one that ends with + adds to a list."""
    *outer, last = path.removesuffix("+").split(".")
    for key in outer:
        keys = keys.setdefault(key, {})
    if path.endswith("+"):
        keys.setdefault(last, []).extend(map(value_of, text.split(",")))
    elif last in keys:
        raise ConfigError(f"{flag}.{path} is given twice")
    else:
        keys[last] = value_of(text)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
