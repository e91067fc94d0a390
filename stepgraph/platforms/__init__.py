"""Accelerator families."""

import torch

from stepgraph.errors import ConfigError
from stepgraph.platforms.base import CompiledKernels, Completion, DeviceMemory, Platform
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.platforms.cuda import CudaPlatform

__all__ = ["CompiledKernels", "Completion", "DeviceMemory", "Platform", "create_platform"]


def create_platform(device: str) -> Platform:
    """The platform of ``"cpu"``, ``"cuda"``, or ``"auto"`` (CUDA if there is one).

    Raises:
        ConfigError: CUDA was asked for and torch sees none, or torch is built for other GPUs.
    """
    if device != "cpu" and torch.version.hip is not None:
        raise ConfigError(
            f"device={device!r}, but torch {torch.__version__} is a build for AMD GPUs (ROCm), for which there is no platform "
            "yet; use device='cpu', or a build of torch for NVIDIA GPUs"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return CpuPlatform()
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r}, but torch {torch.__version__} sees no CUDA device; use device='cpu', or check the driver "
            "and that torch was installed with CUDA"
        )
    return CudaPlatform()
