"""What the setting `device` may name: platforms, those that stepgraph brings and those of installed packages.

A package brings a platform by an entry point of the group `GROUP`, whose name is the platform's and whose value is the class
that makes it, see `stepgraph.platforms.Platform`. Here are only names: nothing is imported.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from stepgraph.errors import ConfigError

GROUP = "stepgraph.platforms"

BUILT_IN = {
    "cpu": EntryPoint("cpu", "stepgraph.platforms.cpu:CpuPlatform", GROUP),
    "cuda": EntryPoint("cuda", "stepgraph.platforms.cuda:CudaPlatform", GROUP),
}
"""Platforms that stepgraph brings, by name; a package cannot replace them."""
AUTO = "auto"
"""CUDA if there is one, else the CPU."""


def check_device(device: str) -> None:
    """Raise ConfigError unless the setting may have this value."""
    if device in (AUTO, *BUILT_IN):
        return  # without reading what is known of every installed package, which takes some ten milliseconds
    if device not in (there := plugins()):
        raise ConfigError(
            f"device={device!r} is not known; choose one of: {', '.join((AUTO, *BUILT_IN, *sorted(there)))}. Others come with "
            f"packages that bring a platform (entry points of the group {GROUP})",
            param="device",
        )


def plugins() -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of installed packages by the platform they bring; several, where packages bring one of the same name."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in (AUTO, *BUILT_IN):
            found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def package_of(entry: EntryPoint) -> str:
    """For people: the package that an entry point comes from, with its version."""
    return "stepgraph" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
