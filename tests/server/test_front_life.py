"""The supervisor's side of a front process."""

import asyncio
import errno
import subprocess
import sys
from types import SimpleNamespace

from stepgraph.server import front_life
from stepgraph.server.front_life import FrontLife
from stepgraph.server.front_messages import Loaded, StartFront, encode

START = StartFront("", "", {}, {}, [], None, [], max_connections=1, num_engines=1)


def test_a_front_that_cannot_be_started_again_is_tried_once_more(monkeypatch) -> None:
    tries, gone = [], []

    def spawn(descriptors):
        tries.append(descriptors)
        if len(tries) == 1:
            raise OSError(errno.EAGAIN, "no process is to be had")
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    async def live() -> None:
        owner = SimpleNamespace(on_front_gone=lambda name, counts: gone.append(name))
        front = FrontLife(3, START, [], owner)
        front._take(encode(Loaded()))  # by the process before
        front.start()
        try:
            async with asyncio.timeout(10):
                while len(gone) < 2:
                    await asyncio.sleep(0.01)
        finally:
            sockets = len(front._context._sockets)
            front._context.destroy(linger=0)  # or its end would wait for a socket that was left open
        assert not sockets  # each process had one
        await front.stop()

    monkeypatch.setattr(front_life, "spawn_front", spawn)
    asyncio.run(live())
    assert gone == ["front-3-0", "front-3-1"]
