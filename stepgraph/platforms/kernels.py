"""Which kernel computes each operator, platform by platform.

torch finds a kernel by the type of device that an operator's tensors are on, which says less than a platform's name: a build of
torch for AMD GPUs has the type of NVIDIA's, and a platform whose memory is the host's has the CPU's. So kernels are kept by the
platform's name, and `use_kernels` puts those of one platform in torch's table, for the life of the process. Until it is called,
the built-in platforms' are there.

As torch's table is the process's, so are the tables here: all engines of a process share them. Operators and kernels are added
where modules are imported; what runs on a type of device is settled by the first platform of that type, and stays so.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch

from stepgraph.errors import ConfigError
from stepgraph.platforms.tuning import DEFAULT, KernelTuning, of_capability


@dataclass(frozen=True)
class Inlined:
    """A kernel for tensors in host memory that is a handful of torch's operators and reads no values of tensors. A recorded graph
    can hold these, not one opaque call that puts Python into every replay."""

    kernel: Callable[..., Any]
    recorded: Callable[..., Any] | None = None
    """What is recorded in the kernel's place; the operator stays one call if it returns NotImplemented. None: the kernel."""


Kernel: TypeAlias = Callable[..., Any] | str | Inlined
"""A function with the operator's arguments, or ``"module:function"``, imported at its first call, so that a machine without a GPU
never imports Triton."""

INLINED: dict[Any, Callable[..., Any]] = {}
"""Of operators whose kernel for tensors in host memory is `Inlined`, what is recorded; read by `graph.cpu`."""

_BUILT_IN = ("cpu", "cuda", "meta")
"""Platforms that have the name of their type of device. Kernels of ``"meta"``, whose tensors have no memory, only say what shapes
come out."""
_KERNELS: dict[str, dict[str, Kernel]] = {}  # by operator and platform
_IN_USE: dict[str, str] = {}  # by type of device, the platform that `use_kernels` was called for
_TUNING: dict[str, KernelTuning] = {}  # by type of device, of the platform in use
_BROUGHT: set[tuple[str, str]] = set()
"""Operators and types of device for which the platform in use has a kernel, not a substitute."""
_LIBRARY = torch.library.Library("stepgraph", "IMPL")


def add_operator(name: str, kernels: Mapping[str, Kernel]) -> None:
    """Give ``stepgraph::<name>``, which torch knows, its kernels, by the names of platforms."""
    _KERNELS[name] = dict(kernels)
    for device_type, platform in (dict(zip(_BUILT_IN, _BUILT_IN, strict=True)) | _IN_USE).items():
        _install(name, device_type, platform)


def register_kernels(platform: str, kernels: Mapping[str, Kernel]) -> None:
    """Add a platform's kernels; call it before the platform is made, as a rule where its module is imported.

    Args:
        platform: `Platform.name` of a platform that is not built in.
        kernels: by the names of operators, as in `torch.ops.stepgraph`.

    Raises:
        ConfigError: an operator is unknown, the platform is built in, or its kernels run already.
    """
    if platform in _BUILT_IN:
        raise ConfigError(
            f"kernels of platform {platform!r} are built in; register yours under another platform's name"
        )
    if platform in _IN_USE.values():
        raise ConfigError(
            f"kernels of platform {platform!r} come too late: this process runs those that it had when it was made; register "
            "them where its package is imported"
        )
    if unknown := sorted(kernels.keys() - _KERNELS.keys()):
        raise ConfigError(
            f"platform {platform!r} brings kernels for unknown operators: {', '.join(unknown)}; there are "
            f"{', '.join(sorted(_KERNELS))}"
        )
    for name, kernel in kernels.items():
        _KERNELS[name][platform] = kernel


def use_kernels(platform: str, device: torch.device, tuning: KernelTuning = DEFAULT) -> None:
    """Have operators on tensors of the device's type run the kernels of `platform`, from now on. An operator that it has no
    kernel for runs that of the CPU where the memory is the host's, and refuses to run elsewhere. Triton kernels follow `tuning`.

    Raises:
        ConfigError: this process uses another platform on such tensors.
    """
    other = _IN_USE.get(device.type)
    if other == platform:
        return
    if other is not None:
        raise ConfigError(
            f"device={platform!r} cannot be used in a process that uses device={other!r}: both are torch's device type "
            f"{device.type!r}, which has one set of kernels; use one process for each"
        )
    _IN_USE[device.type] = platform
    _TUNING[device.type] = tuning
    if platform not in _BUILT_IN:  # whose kernels are there
        for name in _KERNELS:
            _install(name, device.type, platform)


def kernel_tuning() -> KernelTuning:
    """What this process's Triton kernels follow: the tuning of the accelerator whose platform is in use, or else of the NVIDIA
    GPU that there is. Read once, by modules that are imported when they are first called."""
    in_use = [tuning for device_type, tuning in _TUNING.items() if device_type != "cpu"]
    if in_use:
        return in_use[0]
    return of_capability(torch.cuda.get_device_capability()) if torch.cuda.is_available() else DEFAULT


def brings_kernel(operator: str, device: torch.device) -> bool:
    """Whether the platform whose kernels run on tensors of `device` has one for `operator`, not a substitute."""
    return (operator, device.type) in _BROUGHT


def _install(name: str, device_type: str, platform: str) -> None:
    kernels, operator = _KERNELS[name], getattr(torch.ops.stepgraph, name).default
    if platform in kernels:
        kernel = kernels[platform]
        _BROUGHT.add((name, device_type))
    elif platform == "meta":
        return
    else:
        kernel = kernels["cpu"] if device_type == "cpu" else _missing(name, platform)
        _BROUGHT.discard((name, device_type))
    if device_type == "cpu":
        INLINED.pop(operator, None)
        if isinstance(kernel, Inlined):
            INLINED[operator] = kernel.recorded or kernel.kernel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that a kernel is overridden, which is the purpose
        _LIBRARY.impl(name, _function(kernel), torch._C._dispatch_key_for_device(device_type), allow_override=True)


def _function(kernel: Kernel) -> Callable[..., Any]:
    if isinstance(kernel, str):
        return _lazy(kernel)
    return kernel.kernel if isinstance(kernel, Inlined) else kernel


def _lazy(target: str) -> Callable[..., Any]:
    module_name, function_name = target.split(":")
    loaded: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(module_name), function_name))
        return loaded[0](*args)

    return call


def _missing(name: str, platform: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise ConfigError(
            f"device={platform!r} has no kernel for the operator {name}, which these settings need; the package that "
            f"brings the platform must register one"
        )

    return refuse
