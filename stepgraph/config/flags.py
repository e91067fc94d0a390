"""Flags: from the dataclasses of settings to argparse, and from parsed flags to flat settings."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from typing import Any

from stepgraph.config.engine import ENGINE_PARTS, GROUPS, NOT_YET, flattened
from stepgraph.config.fields import homes_of, scalar_type
from stepgraph.config.file import read_settings
from stepgraph.config.server import SERVE_PARTS, ServerConfig
from stepgraph.errors import ConfigError


def add_flags(parser: ArgumentParser, *, positional_model: bool = True, server: bool = False) -> None:
    """Add every engine setting to `parser` as a flag, grouped by concern, and ``--config``. Unset flags are None.

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
                if several:
                    options["nargs"] = "+"
                if (kind, several) == (str, True):
                    options["action"] = "append"
                if not f.metadata["choices"]:
                    options["metavar"] = f.metadata["metavar"] or ("N" if kind in (int, float) else "TEXT")
            group.add_argument("--" + f.name.replace("_", "-"), **options)
        for name, of_several in GROUPS.items():
            if of_several.part == part:
                text = f"several of these at once as JSON, {of_several.help}"
                group.add_argument("--" + name.replace("_", "-"), metavar="JSON", help=text)
    foreign = parser.add_argument_group(
        "other engines", "Accepted from command lines of other engines where they change nothing, else refused."
    )
    for name, (off, reason) in NOT_YET.items():
        flag = "--" + name.replace("_", "-")
        if False in off:
            foreign.add_argument(flag, action=BooleanOptionalAction, default=None, help=reason)
        elif 1 in off:
            foreign.add_argument(flag, type=int, metavar="N", help=reason)
        else:
            foreign.add_argument(flag, metavar="JSON" if name.endswith("_config") else "TEXT", help=reason)


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
    names = {*homes_of(SERVE_PARTS if server else ENGINE_PARTS), *GROUPS, *NOT_YET}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    positional = getattr(arguments, "model_argument", None)
    if positional is not None and given.setdefault("model", positional) != positional:
        raise ConfigError(f"MODEL is {positional!r} and --model is {given['model']!r}; give one of them")
    for name, value in given.items():
        if not (isinstance(value, list) and isinstance(value[0], list)):
            continue
        if "model" not in given and any(len(texts) > 1 for texts in value):  # did it take what was meant as MODEL?
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} took several values and there is no MODEL; put MODEL before it, or repeat {flag} for each value"
            )
        given[name] = [text for texts in value for text in texts]
    return in_file | flattened(given)
