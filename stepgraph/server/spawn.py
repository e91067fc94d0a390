"""Starting the server's processes. Apart from the rest, so that it can come before the heavy imports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stepgraph.config.transfer import SECRET_VARIABLE


class Place(NamedTuple):
    """Where one of several engines runs."""

    devices: str | None = None
    """What CUDA_VISIBLE_DEVICES is for it; None: all that this process sees."""
    cores: tuple[int, ...] | None = None
    """The processor's cores that are its own; None: all."""
    is_one_of_many: bool = False
    secret: str | None = None
    """What it must know to have to do with the others; see `TransferConfig.secret`."""


ALONE = Place()
"""Where an engine runs that has the machine to itself."""


def spawn_engine(place: Place = ALONE) -> subprocess.Popen[bytes]:
    """Start an engine's process; it waits for a `Start` message on its standard input, and ends when that is closed."""
    own = {"CUDA_VISIBLE_DEVICES": place.devices, SECRET_VARIABLE: place.secret}
    environment = os.environ | {name: value for name, value in own.items() if value is not None}
    command = [sys.executable, "-m", "stepgraph.server.engine_process"]
    if place.cores is None:
        return _spawn(command, environment)
    all_cores = os.sched_getaffinity(0)  # of this thread, which the new process inherits
    os.sched_setaffinity(0, place.cores)
    try:
        return _spawn(command, environment)
    finally:
        os.sched_setaffinity(0, all_cores)


def spawn_front(descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a front's process, which inherits these; it waits for a `StartFront` message on its standard input, and ends when
    that is closed."""
    return _spawn([sys.executable, "-m", "stepgraph.server.front_process"], None, descriptors)


async def ended(process: subprocess.Popen[bytes]) -> int:
    """Wait until a process ends; returns its exit code. In a thread of its own: those of the loop are few, and for work."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()

    def tell(code: int) -> None:
        if not future.done():
            future.set_result(code)

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(tell, code)

    threading.Thread(target=wait, name="stepgraph-wait", daemon=True).start()
    return await future


def _spawn(
    command: list[str], environment: Mapping[str, str] | None, descriptors: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        env=environment,
        pass_fds=descriptors,
        start_new_session=True,  # Ctrl-C is its parent's to handle
    )
