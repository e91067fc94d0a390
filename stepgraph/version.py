"""Which stepgraph this is: the version, written here and nowhere else, and the commit that it was made of."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

VERSION = "0.1.0"

COMMIT_FILE = "_commit.txt"
"""Beside this file in archives and wheels, written as they are built; never in a checkout, which asks git."""


@functools.cache
def commit() -> str | None:
    """The commit in full, with what was changed since; None where neither git nor the build knew it.

    Reads what the build wrote, and runs git in a checkout: a `.git` beside what was built is of somebody else's repository, into
    which it was installed.
    """
    package = Path(__file__).parent
    try:
        return (package / COMMIT_FILE).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return commit_of(package.parent) if (package.parent / ".git").exists() else None


def commit_of(checkout: Path) -> str | None:
    """The same of a folder that holds a `.git`; None if git is not installed or refuses to look."""
    found = _git(checkout, "rev-parse", "HEAD")
    changed = len((_git(checkout, "status", "--porcelain") or "").splitlines())
    return f"{found}, {changed} files changed" if found and changed else found


def described() -> str:
    """For people: the version, and in brackets the commit, shortened, if it is known."""
    found, _, changes = (commit() or "").partition(", ")
    return VERSION + (f" ({', '.join(filter(None, (found[:12], changes)))})" if found else "")


def _git(checkout: Path, *arguments: str) -> str | None:
    # In a hook of git's, these name the repository that it runs in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ("git", "-C", str(checkout), *arguments),
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
