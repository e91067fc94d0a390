"""Where Triton keeps compiled kernels, and what of them a machine without a C compiler brings.

Triton compiles kernels by itself; it needs a compiler for one module, which talks with the driver, the same for all kernels.
``python -m stepgraph.platforms.kernel_cache`` makes it ahead, beside this file, where there may be no GPU and no driver.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from stepgraph.trusted_folder import why_untrusted

logger = logging.getLogger(__name__)

READY = Path(__file__).parent / "ready"
"""A folder in the form of Triton's cache."""
_DRIVER = "libcuda.so.1"


def guard_kernel_cache(ready: Path = READY) -> Path:
    """Have Triton use a folder for this process alone if others can write to the one it would use, since it executes what lies
    there, or if that cannot be made. Without a home directory, that is one under the current folder. Links what lies ready into
    it. Returns the folder that Triton uses."""
    from triton import knobs

    folder = Path(knobs.cache.dir)
    reason = why_untrusted(folder)
    if reason is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"it cannot be made: {error.strerror}"
    if reason is not None:
        folder = Path(tempfile.mkdtemp(prefix="stepgraph-triton-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        logger.warning(
            "Triton's kernels are compiled for this process alone, not kept in %s, as %s; set TRITON_CACHE_DIR to a folder "
            "of yours",
            knobs.cache.dir,
            reason,
        )
        os.environ["TRITON_CACHE_DIR"] = str(folder)  # what Triton reads, in processes that this one starts as well
    if ready.is_dir() and why_untrusted(ready) is None:
        for made in ready.iterdir():
            _link(folder / made.name, made)
    return folder


def _link(place: Path, made: Path) -> None:
    """Have a folder found at another place: what lies on a file system that executes nothing cannot be loaded from there."""
    if place.exists():
        return
    with suppress(OSError):  # the folder is read-only, and has what is needed or not
        aside = place.with_name(f".{place.name}-{os.getpid()}")
        aside.symlink_to(made)
        os.replace(aside, place)  # other processes may be doing the same, and there may be a link that leads nowhere


def make_ready(folder: Path = READY) -> Path:
    """Compile Triton's module for NVIDIA's driver into a folder, unless it is there. Returns the folder.

    It is found again where Python is the same, and where there is a program `file` if there is one here: Triton asks it.

    Raises:
        RuntimeError: there is no C compiler, or what was made is not right.
        subprocess.CalledProcessError: the compiler failed.
    """
    from triton import knobs
    from triton.backends.nvidia import driver

    called = set(re.findall(r"\bcu[A-Z]\w+", Path(driver.dirname, "driver.c").read_text()))
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as aside, knobs.cache.scope(), knobs.nvidia.scope():
        _make_stand_in(Path(aside, _DRIVER), called)
        knobs.cache.dir, knobs.nvidia.libcuda_path = str(folder), aside
        try:
            driver.CudaUtils()
        except ImportError as error:  # without a driver it cannot be loaded, but is there
            if f"{_DRIVER}: cannot open" not in str(error):
                raise RuntimeError(f"what was compiled for Triton is not right: {error}") from error
    return folder


def _make_stand_in(path: Path, names: Iterable[str]) -> None:
    """A library to link with in place of the driver's: functions of those names, which do nothing."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton chooses
    if compiler is None:
        raise RuntimeError("no C compiler is installed; install one, such as gcc")
    source = path.with_suffix(".c")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(names)))
    subprocess.run((compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{path.name}", "-o", path, source), check=True)


def main() -> int:
    """Print what lies ready; returns 0."""
    for path in sorted(make_ready().rglob("*.so")):
        path.chmod(0o644)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
