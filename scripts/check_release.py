"""Builds what is released, the archive of the source and from it the wheel, and checks both.

    python scripts/check_release.py [--output dist] [--draft]

What is built is what git has, and the commit is written into both. Each must hold all files that it should, and no others; twine
checks what an index shows; the wheel is installed into a new environment, which borrows this one's dependencies, and runs the
demo there. Nothing is fetched or uploaded. Needs `pip install '.[dev,release]'` and smollm2, as `make dist` installs them.
`--draft` allows files that changed since the commit, and a version that the changelog gives no date.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
ABOUT = runpy.run_path(str(ROOT / "stepgraph" / "version.py"))
VERSION, COMMIT_FILE = ABOUT["VERSION"], f"stepgraph/{ABOUT['COMMIT_FILE']}"
MADE = re.compile(r"PKG-INFO|setup\.cfg|stepgraph\.egg-info/.*")
"""What setuptools adds to an archive."""


def files_of(tree: Path) -> set[str]:
    """Those that belong to a checkout, or to an archive that was unpacked, relative to it."""
    if (tree / ".git").exists():
        command = ("git", "-C", tree, "ls-files", "--cached", "--others", "--exclude-standard")
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {name for name in listed if (tree / name).is_file()}
    found = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    kept = {
        name
        for name in found
        if not re.search(r"(^|/)(__pycache__|\.\w+_cache|\.venv|\.hypothesis|build|dist|ready)/", name)
    }
    return {name for name in kept if not MADE.fullmatch(name) and name != COMMIT_FILE}


def build(tree: Path, output: Path, environment: Mapping[str, str]) -> tuple[Path, Path]:
    """Build the archive of a tree in a copy of it, and the wheel from that archive. Returns both.

    Args:
        tree: a checkout, or an archive that was unpacked; stays as it is.
        output: folder, made if need be.
        environment: of the build of the archive; the wheel is built without it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stepgraph-release-") as scratch:
        copy = Path(scratch, "tree")
        for name in files_of(tree):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / name, copy / name)
        archive = output / _run_backend("build_sdist", copy, output, environment)
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")
        wheel = output / _run_backend("build_wheel", Path(scratch, f"stepgraph-{VERSION}"), output, {})
    return archive, wheel


def _run_backend(hook: str, tree: Path, output: Path, environment: Mapping[str, str]) -> str:
    """Call a hook of PEP 517 as an installer would, with what is installed here. Returns the name of what it made."""
    told = output.resolve() / f".{hook}"
    code = f"from setuptools import build_meta; open({str(told)!r}, 'w').write(build_meta.{hook}({str(output.resolve())!r}))"
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "STEPGRAPH_COMMIT")}
    done = subprocess.run(
        (sys.executable, "-c", code), cwd=tree, env=inherited | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"error: {hook} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    name = told.read_text()
    told.unlink()
    return name


def problems_of_archive(archive: Path, tree: Path) -> list[str]:
    """What the archive of a tree lacks or should not have."""
    with tarfile.open(archive) as opened:
        held = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    return _differences({name for name in held if not MADE.fullmatch(name)}, files_of(tree) | {COMMIT_FILE})


def problems_of_wheel(wheel: Path, tree: Path) -> list[str]:
    """Likewise of the wheel: all files of the package, and nothing beside it."""
    with zipfile.ZipFile(wheel) as opened:
        held = {
            name for name in opened.namelist() if not re.match(rf"stepgraph-{re.escape(VERSION)}\.dist-info/", name)
        }
    return _differences(held, {name for name in files_of(tree) if name.startswith("stepgraph/")} | {COMMIT_FILE})


def _differences(held: set[str], wanted: set[str]) -> list[str]:
    return [f"lacks {name}" for name in sorted(wanted - held)] + [f"has {name}" for name in sorted(held - wanted)]


def not_ready(commit: str | None) -> list[str]:
    """Why what git has is no release."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = []
    if not re.search(rf"^## \[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no section [{VERSION}] with a date")
    if commit is None:
        found.append("git does not say which commit this is")
    elif "changed" in commit:
        found.append(f"there are changes that are not committed: {commit}")
    return found


def try_out(wheel: Path, commit: str) -> None:
    """Install the wheel into a new environment and run it there.

    Raises:
        subprocess.CalledProcessError: a command failed.
        AssertionError: it is another version.
    """
    with tempfile.TemporaryDirectory(prefix="stepgraph-release-") as folder:
        venv.create(folder, with_pip=True)
        python, program = Path(folder, "bin", "python"), Path(folder, "bin", "stepgraph")
        paths = {"base": folder, "platbase": folder}
        borrowed = Path(sysconfig.get_path("purelib", vars=paths), "borrowed.pth")
        borrowed.write_text("\n".join(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))))
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": "/nowhere"}
        command = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel)
        subprocess.run(command, cwd=folder, env=clean, check=True)
        told = subprocess.run((program, "--version"), cwd=folder, env=clean, capture_output=True, text=True, check=True)
        print(told.stdout, end="", flush=True)
        assert told.stdout.startswith(f"stepgraph {VERSION} ({commit[:12]}"), told.stdout
        subprocess.run((program, "demo"), cwd=folder, env=os.environ | {"PYTHONPATH": ""}, check=True)


def main() -> int:
    """Returns 0, or 1 and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    parser.add_argument("--draft", action="store_true", help="allow changed files and a version without a date")
    arguments = parser.parse_args()
    commit = ABOUT["commit"]()
    problems = [] if arguments.draft else not_ready(commit)
    if not problems:
        archive, wheel = build(ROOT, arguments.output, {"STEPGRAPH_COMMIT": commit or "unknown"})
        problems += [f"{archive.name} {problem}" for problem in problems_of_archive(archive, ROOT)]
        problems += [f"{wheel.name} {problem}" for problem in problems_of_wheel(wheel, ROOT)]
        subprocess.run((sys.executable, "-m", "twine", "check", "--strict", archive, wheel), check=True)
        try_out(wheel, commit or "unknown")
        for made in (archive, wheel):
            print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
