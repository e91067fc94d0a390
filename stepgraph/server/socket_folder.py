"""Folders for sockets between processes. Those of servers that were killed are removed when the next one starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "stepgraph-"
_LOCK = "lock"


@contextmanager
def socket_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent`, by default that of temporary files. Only this user can reach it, and it goes with the block.

    A lock on a file in it, which the system lets go of however its holder ends, tells that somebody uses it. The file gets its
    name once it is locked: nobody finds it unlocked while its owner lives.
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with open(folder / "new", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(lock.name, folder / _LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path | None = None) -> None:
    """Remove what `socket_folder` made there for servers of this user that are gone."""
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and _is_abandoned(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(lock: Path) -> bool:
    """Whether nobody holds this lock. OSError if it is none."""
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
