"""From C++ sources to a library for this machine, kept on disk under a name that says what it was made of."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stepgraph.native import ahead
from stepgraph.trusted_folder import make_private, why_untrusted

logger = logging.getLogger(__name__)

SWITCH = "STEPGRAPH_NATIVE"
"""Environment variable; one of `_OFF` leaves the kernels unused."""
_OFF = ("0", "false", "no", "off")

_FLAGS = {
    "AVX512": ("-march=native",),  # bfloat16 products, where the CPU has them
    "AVX2": ("-mavx2", "-mfma", "-mf16c", "-mtune=native"),
}
"""By torch's name for what the CPU can do, which the environment variable ATEN_CPU_CAPABILITY lowers."""
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Plan:
    """How the library is made, and where it is then."""

    capability: str
    command: tuple[str, ...]  # the compiler and all arguments but the output's; none if the library was compiled ahead
    library: Path
    absent_compiler: str | None  # the one wanted, if there is no such program and the command takes another


def plan(sources: Path = Path(__file__).parent) -> Plan | str:
    """How to make the library of the C++ files in `sources` here; or why that is impossible. Runs nothing."""
    if (given := os.environ.get(SWITCH, "")).lower() in _OFF:
        return f"{SWITCH}={given} is set"
    if reason := _other_machine():
        return reason
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _FLAGS:
        return f"they need AVX2, and torch's CPU capability is {capability}"
    if library := ahead.find(sources, capability):
        return Plan(capability, (), library, None)
    found = _compiler()
    if isinstance(found, str):
        return found
    compiler, absent = found
    command = _command(compiler, _FLAGS[capability], sources)
    folder = _cache_folder() / "stepgraph" / "native"
    return Plan(capability, command, folder / f"{_fingerprint(sources, command)}.so", absent)


def compile_ahead(sources: Path = Path(__file__).parent) -> list[Path] | str:
    """Make the libraries for all kinds of CPUs that are not there. Returns them; or why one cannot be made."""
    if reason := _other_machine():
        return reason
    found = _compiler()
    if isinstance(found, str):
        return found
    made = []
    for kind in ahead.KINDS:
        library = ahead.library_of(kind, sources)
        if not library.exists():
            planned = Plan(kind.capability, _command(found[0], kind.flags, sources), library, None)
            try:
                library.parent.mkdir(exist_ok=True)
                done = _compile(planned, library.parent)
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            if isinstance(done, str):
                return done
            library.chmod(0o644)  # for the users of this installation
        made.append(library)
    return made


def _other_machine() -> str | None:
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        return None
    return f"they are written for x86-64 on Linux, and this is {platform.machine()} on {sys.platform}"


def _compiler() -> tuple[str, str | None] | str:
    """The compiler, and the one that was wanted instead if there is none such; or why there is none."""
    wanted = os.environ.get("CXX") or _COMPILERS[0]
    candidates = list(dict.fromkeys((wanted, *_COMPILERS)))
    for name in candidates:
        if path := shutil.which(name):
            return path, None if name == wanted else wanted
    return f"no C++ compiler is installed ({', '.join(candidates)} were looked for); install one, such as g++"


def _command(compiler: str, flags: tuple[str, ...], sources: Path) -> tuple[str, ...]:
    torch_folder = Path(torch.__file__).parent
    return (
        *(compiler, "-std=c++17", "-O3", "-fPIC", "-shared", *flags),
        *map(str, sorted(sources.glob("*.cpp"))),
        *(f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"),
    )


def _cache_folder() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user id without an entry, as containers have
        return Path(tempfile.gettempdir()) / f"stepgraph-{os.geteuid()}"


def build(planned: Plan) -> str | Path:
    """Make the library if it is not there, with a line on stderr. Returns its path; or what went wrong, as a string.

    Of processes that build at the same time, one does, and the others wait for it. A file is put in place whole. Where others
    could have put it there, it is made in a new folder, which is the caller's to remove.
    """
    if not planned.command:
        return planned.library
    library, folder = planned.library, planned.library.parent
    instead = f" with {planned.command[0]}, as there is no {planned.absent_compiler}" if planned.absent_compiler else ""
    try:
        make_private(folder)
        reason = why_untrusted(library)
        if reason is None and library.exists():
            return library
        if reason is not None:
            logger.warning(
                "CPU kernels are compiled for this process alone, not kept in %s, as %s; set XDG_CACHE_HOME to a folder of yours",
                folder,
                reason,
            )
            folder = Path(tempfile.mkdtemp(prefix="stepgraph-native-"))
        with _in_turn(folder):
            if reason is None and library.exists():
                return library
            print(
                f"stepgraph: compiling CPU kernels for this machine, once{instead}; this takes some seconds",
                file=sys.stderr,
            )
            found = _compile(planned, folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        found = f"they could not be compiled: {error}"
    if isinstance(found, str) and folder != library.parent:
        shutil.rmtree(folder, ignore_errors=True)
    return found


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Inside, no other process builds in the folder, or each does where the file system knows no locks."""
    import fcntl  # which not every system has, and those have that build

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(planned: Plan, folder: Path) -> str | Path:
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside) / planned.library.name
        done = subprocess.run(
            (*planned.command, "-o", made), capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S
        )
        if done.returncode:
            return f"{planned.command[0]} failed: {done.stderr.strip()[-2000:]}"
        if not made.exists():
            return f"{planned.command[0]} wrote no library, though it reported success; set CXX to a C++17 compiler"
        made.chmod(0o600)
        os.replace(made, folder / made.name)
    return folder / planned.library.name


def _fingerprint(sources: Path, command: tuple[str, ...]) -> str:
    """Differs where the library would: in sources, command, compiler, torch or CPU."""
    compiler = Path(command[0]).resolve()
    status = compiler.stat()
    facts = (torch.__version__, *command, str(compiler), str(status.st_size), str(status.st_mtime_ns))
    return ahead.digest(sources, (*facts, *sorted(ahead.cpu_features())))
