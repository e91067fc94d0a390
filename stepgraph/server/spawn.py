"""Starting the engine's process. Apart from the rest, so that it can come before the heavy imports."""

from __future__ import annotations

import subprocess
import sys


def spawn_engine() -> subprocess.Popen[bytes]:
    """Start an engine's process; it waits for a `Start` message on its standard input, and ends when that is closed."""
    return subprocess.Popen(
        [sys.executable, "-m", "stepgraph.server.engine_process"],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the front's to handle
    )
