"""Flags: from the dataclasses of settings to argparse, and from parsed flags to flat settings."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepgraph.command_parser import CommandParser
from stepgraph.config.engine import ENGINE_PARTS, GROUPS, flattened
from stepgraph.config.fields import flag_of, homes_of, scalar_type
from stepgraph.config.file import read_settings
from stepgraph.config.other_engines import tables, text_of, value_of
from stepgraph.config.server import SERVE_PARTS, ServerConfig
from stepgraph.config.spelling import respelled
from stepgraph.errors import ConfigError

_THEIRS = "of another engine: "
"""Before the names of other engines' flags among what is parsed: commands have flags of their own."""


def add_flags(parser: CommandParser, *, positional_model: bool = True, server: bool = False) -> None:
    """Add every engine setting to `parser` as a flag, grouped by concern, and ``--config``. Unset flags are None.

    The parser also understands command lines of other engines, see `with_other_engines`.

    Args:
        parser: receives the flags.
        positional_model: the model may also be the positional argument MODEL.
        server: add the settings of the server too.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags override it")
    for part, part_type in (SERVE_PARTS if server else ENGINE_PARTS).items():
        group = parser.add_argument_group(part, (part_type.__doc__ or "").strip().splitlines()[0])
        for f in dataclasses.fields(part_type):
            text = _help_text(f).replace("%", "%%")
            if f.name == "model" and positional_model:
                group.add_argument("model_argument", nargs="?", metavar="MODEL", help=text)
                text = "the same as a flag"
            options: dict[str, Any] = {"dest": f.name, "default": None, "help": text}
            kind, several = scalar_type(part_type, f.name)
            if kind is bool:
                options["action"] = BooleanOptionalAction
            else:
                options |= {"type": kind, "choices": f.metadata["choices"]}
                if kind in _READ:
                    options["type"] = _READ[kind]
                if several:
                    options["nargs"] = "+"
                if (kind, several) == (str, True):
                    options["action"] = "append"
                options["metavar"] = _metavar(f, kind)
                if (row := tables().flags.get(f.name)) is not None and (
                    theirs := [*row.map, *map(text_of, row.refused)]
                ):
                    options |= {"type": _taking(theirs, options["type"]), "choices": None}
            group.add_argument(flag_of(f.name), **options)
        for name, of_several in GROUPS.items():
            if of_several.part == part and of_several.help is not None:
                text = f"several of these at once as JSON, {of_several.help}"
                group.add_argument(flag_of(name), metavar="JSON", help=text)
    parser.prepare = with_other_engines
    parser.further_flags = [flag_of(name) for name, row in tables().flags.items() if not row.same]
    parser.epilog = "Flags of vLLM and FastDeploy are understood, or refused with the reason: docs/coming-from.md."


def with_other_engines(parser: CommandParser, arguments: Sequence[str]) -> list[str]:
    """Add the flags of other engines that `arguments` has to `parser`, which has those of `add_flags`.

    There are hundreds of them, of which a command line has few, so that no start waits for all.

    Returns:
        The arguments in the spelling that the parser reads.

    Raises:
        ConfigError: as `respelled`.
    """
    known = parser._option_string_actions
    words = respelled(arguments, known)
    names = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in words}
    for name, row in tables().flags.items():
        flag = flag_of(name)
        is_ours = row.same and name not in GROUPS  # so it has been added, unless this command does without
        if is_ours or name not in names or flag in known:
            continue
        options: dict[str, Any] = {"dest": _THEIRS + name, "default": None, "help": SUPPRESS}
        if row.takes == "switch":
            options["action"] = BooleanOptionalAction
        else:
            options["type"] = str if name in GROUPS else value_of
            options["nargs"] = {"values": "+", "optional": "?"}.get(row.takes)
            options["const"] = True if row.takes == "optional" else None
        parser.add_argument(flag, **options)
    return words


def _metavar(field: dataclasses.Field[Any], kind: type) -> str:
    """What stands for a value in help texts."""
    if field.metadata["choices"]:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    return str(field.metadata["metavar"] or {int: "N", float: "N", Mapping: "JSON"}.get(kind, "TEXT"))


def _taking(theirs: Sequence[str], read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads a flag that other engines have values of their own for, some of them refused with a reason. What is none of
    these is left to the setting's check: choices of argparse would offer what is refused."""

    def value(text: str) -> Any:
        return text if text in theirs else read(text)

    value.__name__ = read.__name__
    return value


def _whole_number(text: str) -> int:
    """A whole number, also as vLLM's users write large ones: 8k is 8000, 8K is 8192."""
    scale = _SCALES.get(text[-1:])
    try:
        return int(text) if scale is None else int(text[:-1]) * scale
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from error


_SCALES = {
    letter: base**power for base, letters in ((1000, "kmgt"), (1024, "KMGT")) for power, letter in enumerate(letters, 1)
}


def _json_object(text: str) -> dict[str, Any]:
    found = value_of(text)
    if not isinstance(found, dict):
        raise ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


_READ: dict[type, Callable[[str], Any]] = {int: _whole_number, Mapping: _json_object}
"""What reads values that their type does not read as people write them."""


def _help_text(field: dataclasses.Field[Any]) -> str:
    """What a setting does, and its default where it is a fixed value."""
    text: str = field.metadata["help"]
    if field.default is None:
        return text
    default = ("off", "on")[field.default] if isinstance(field.default, bool) else field.default
    return f"{text} (default: {default})"


def settings_from_flags(arguments: Namespace, *, server: bool = False) -> dict[str, Any]:
    """The settings among parsed flags, those that were given, over those of the file that ``--config`` names.

    Args:
        arguments: what a parser with `add_flags` gave.
        server: settings of the server are wanted too.

    Raises:
        ConfigError: the file is unusable or, without `server`, holds settings of the server; or it is not clear which
            model is meant.
    """
    in_file = {} if arguments.config is None else read_settings(arguments.config)
    for name in () if server else homes_of({"server": ServerConfig}):
        if name in in_file:
            raise ConfigError(
                f"{arguments.config}: {name} is a setting of the server, which only `stepgraph serve` starts"
            )
    names = {*homes_of(SERVE_PARTS if server else ENGINE_PARTS), *GROUPS}
    given = {
        name.removeprefix(_THEIRS): value
        for name, value in vars(arguments).items()
        if (name in names or name.startswith(_THEIRS)) and value is not None
    }
    positional = getattr(arguments, "model_argument", None)
    if positional is not None and given.setdefault("model", positional) != positional:
        raise ConfigError(f"MODEL is {positional!r} and --model is {given['model']!r}; give one of them")
    for name, value in given.items():
        if name not in names or not (isinstance(value, list) and isinstance(value[0], list)):
            continue
        if "model" not in given and any(len(texts) > 1 for texts in value):  # did it take what was meant as MODEL?
            flag = flag_of(name)
            raise ConfigError(
                f"{flag} took several values and there is no MODEL; put MODEL before it, or repeat {flag} for each value"
            )
        given[name] = [text for texts in value for text in texts]
    return in_file | flattened(given)
