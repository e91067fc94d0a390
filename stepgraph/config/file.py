"""Settings from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepgraph.config.engine import GROUPS, flattened
from stepgraph.config.fields import check_value, homes_of, refuse_unknown, scalar_type
from stepgraph.config.other_engines import tables, translated
from stepgraph.config.server import SERVE_PARTS
from stepgraph.errors import ConfigError


def read_settings(path: str) -> dict[str, Any]:
    """The settings in a YAML file: a mapping of their names, with dashes or underscores, to values.

    Below the name of a section (``server``, ``model``, ``cache``, ...) there may be a mapping of that section's settings
    instead. Where a list of texts is expected, one text does. An empty file holds no settings.

    Returns:
        Flat settings, as `serve_config` takes them; each is good in itself, but two may contradict each other.

    Raises:
        ConfigError: PyYAML is missing, the file cannot be read, or a key or value is not one; names the file and the key.
    """
    try:
        return settings_in(_loaded(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def settings_in(loaded: Any) -> dict[str, Any]:
    """The settings in what a YAML file holds; see `read_settings`."""
    return flattened(_flat(loaded))


def _loaded(path: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError("reading a file of settings needs PyYAML; run: pip install 'stepgraph[server]'") from error
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the file cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"this is not YAML: {' '.join(str(error).split())}") from error


def _flat(loaded: Any) -> dict[str, Any]:
    """The settings of all sections and of none side by side."""
    flat: dict[str, Any] = {}
    homes = homes_of(SERVE_PARTS) | {name: group.part for name, group in GROUPS.items()}
    for name, value in _named(loaded, "the file").items():
        if name in SERVE_PARTS and (value is None or isinstance(value, dict)):
            for inner, inner_value in _named(value, name).items():
                if homes.get(inner, name) != name:
                    raise ConfigError(f"{name}: {inner} is a setting of {homes[inner]}; move it there")
                refuse_unknown([inner], [known for known, home in homes.items() if home == name])
                _put(flat, inner, inner_value)
        elif name in SERVE_PARTS and name not in homes:
            raise ConfigError(f"{name}={value!r} must be a mapping of settings")
        else:
            refuse_unknown([name], homes, further=tables().flags)
            _put(flat, name, value)
    flat = translated(flat)
    for name, value in flat.items():
        if name in homes and name not in GROUPS:
            part = SERVE_PARTS[homes[name]]
            if isinstance(value, str) and scalar_type(part, name) == (str, True):
                flat[name] = value = (value,)
            if isinstance(value, bool) and "on" in (part.__dataclass_fields__[name].metadata["choices"] or ()):
                flat[name] = value = "on" if value else "off"  # as which YAML reads these words
            check_value(part, name, tuple(value) if isinstance(value, list) else value)
    return flat


def _named(mapping: Any, place: str) -> dict[str, Any]:
    """`mapping` with underscores in its keys, {} for None."""
    named: dict[str, Any] = {}
    if mapping is not None and not isinstance(mapping, dict):
        raise ConfigError(f"{place} must hold a mapping, as in `max-num-seqs: 8`, not {type(mapping).__name__}")
    for key, value in (mapping or {}).items():
        if not isinstance(key, str):
            raise ConfigError(f"{place}: the key {key!r} is not text")
        _put(named, key.replace("-", "_"), value)
    return named


def _put(settings: dict[str, Any], name: str, value: Any) -> None:
    if name in settings:
        raise ConfigError(f"{name} is given twice")
    settings[name] = value
