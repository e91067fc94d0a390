"""Accelerator families."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import torch

from stepgraph.devices import AUTO, BUILT_IN, check_device, package_of, plugins
from stepgraph.errors import ConfigError, StepgraphError
from stepgraph.platforms.base import PROTOCOL_VERSION, CompiledKernels, Completion, DeviceMemory, Platform
from stepgraph.platforms.kernels import use_kernels

__all__ = [
    "PROTOCOL_VERSION",
    "CompiledKernels",
    "Completion",
    "DeviceMemory",
    "Platform",
    "create_platform",
]


def create_platform(device: str, index: int | None = None) -> Platform:
    """The platform that the setting `device` names, whose kernels run from now on.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"auto"`` (CUDA if there is one), or the name of a platform that an installed package
            brings.
        index: of the device, where the machine has several of which each is to be used by one process; default: that which is
            torch's current one.

    Raises:
        ConfigError: there is no such platform, its device is not there, its package cannot be used, or this process uses another
            platform on the same type of device.
    """
    if device in (AUTO, "cuda") and (gpus := _other_gpus()) is not None:
        raise ConfigError(
            f"device={device!r}, but torch {torch.__version__} is a build for {gpus}, for which there is no platform yet; "
            "use device='cpu', or a build of torch for NVIDIA GPUs"
            + "".join(f", or device={name!r}, which a package here brings" for name in sorted(plugins()))
        )
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        platform: Platform = BUILT_IN[device].load()(index)
    else:
        platform = BUILT_IN[device].load()() if device in BUILT_IN else _from_package(device)
    use_kernels(platform.name, platform.device, platform.tuning)
    return platform


def _other_gpus() -> str | None:
    """GPUs of another vendor that torch is built for; its build for AMD's calls them CUDA devices."""
    if torch.version.hip is not None:
        return "AMD GPUs (ROCm)"
    return None if torch.version.xpu is None else "Intel GPUs (XPU)"


def _from_package(device: str) -> Platform:
    check_device(device)
    entries = plugins()[device]
    if len(entries) > 1:
        raise ConfigError(
            f"device={device!r} is brought by {len(entries)} packages: {', '.join(map(package_of, entries))}; uninstall all but "
            "one of them"
        )
    [entry] = entries
    brought = f"device={device!r} is brought by {package_of(entry)}"
    factory = _load(entry, brought)
    try:
        made: Platform = factory()
    except StepgraphError:
        raise
    except Exception as error:  # of code that is not ours
        raise ConfigError(
            f"{brought}, whose platform cannot be made ({type(error).__name__}: {error}); check its device and driver"
        ) from error
    if getattr(made, "name", device) != device:
        raise ConfigError(
            f"{brought}, whose platform calls itself {made.name!r}; its entry point must have the platform's name"
        )
    asked = {*Platform.__annotations__, *(name for name in vars(Platform) if not name.startswith("_"))}
    if lacking := sorted(name for name in asked if not hasattr(made, name)):
        raise ConfigError(
            f"{brought}, whose platform lacks {', '.join(lacking)}; it must have all that stepgraph.platforms.Platform asks for"
        )
    return made


def _load(entry: EntryPoint, brought: str) -> Any:
    """The class that makes a package's platform; `brought` begins what is said if there is none."""
    try:
        factory = entry.load()
    except Exception as error:  # of code that is not ours
        raise ConfigError(
            f"{brought}, which cannot be imported ({type(error).__name__}: {error}); mend or uninstall it"
        ) from error
    version = getattr(factory, "protocol_version", None)
    if version != PROTOCOL_VERSION:
        raise ConfigError(
            f"{brought}, which is made for version {version} of the platform protocol where this stepgraph has version "
            f"{PROTOCOL_VERSION}; install releases of the two that fit"
        )
    return factory
