"""Where Triton keeps compiled kernels."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

from stepgraph.trusted_folder import why_untrusted

logger = logging.getLogger(__name__)


def guard_kernel_cache() -> Path:
    """Have Triton use a folder for this process alone if others can write to the one it would use: it executes what lies there.
    Without a home directory, that is one under the current folder. Returns the folder that Triton uses."""
    from triton import knobs

    folder = Path(knobs.cache.dir)
    if (reason := why_untrusted(folder)) is None:
        return folder
    fresh = tempfile.mkdtemp(prefix="stepgraph-triton-")
    atexit.register(shutil.rmtree, fresh, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = fresh  # what Triton reads, in processes that this one starts as well
    logger.warning(
        "Triton's kernels are compiled for this process alone, not kept in %s, as %s; set TRITON_CACHE_DIR to a folder of yours",
        folder,
        reason,
    )
    return Path(fresh)
