"""Folders from which code is loaded: nobody but their user and root may be able to put any there."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder, those above it included, that nobody else can enter; one of this user's that is there becomes so.

    Raises:
        OSError: it cannot be made.
    """
    for place in reversed((folder, *folder.parents)):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)


def why_untrusted(path: Path) -> str | None:
    """Why another user may have put a file or folder there, or may put another one in its place, for people to read; None if none
    can. What does not exist yet is trusted if what holds it is. Links are followed, and the folders that they lie in count too.
    """
    path = path.absolute()
    for place in dict.fromkeys((path, path.resolve(), *path.parents, *path.resolve().parents)):
        try:
            status = place.lstat()
        except OSError:
            continue
        if status.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to user {status.st_uid}"
        is_shared = (
            stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX and place not in (path, path.resolve())
        )
        if status.st_mode & stat.S_IWOTH and not (is_shared or stat.S_ISLNK(status.st_mode)):
            return f"everybody can write to {place}"
    return None
