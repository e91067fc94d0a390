"""Workers of ranks that are forked from one process which has imported everything, instead of importing for seconds each.

Such a worker is its leader's child, with the descriptors, environment and paths that it would have been started with, and runs
`stepgraph.executor.worker` as `python -m` does. Only what was imported before is not imported again.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import gc
import importlib
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import BinaryIO

_PR_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl: whether grandchildren become this process's children when their parents end."""
_MOST_BYTES = 1 << 20
_IMPORTED = (
    "stepgraph.executor.follower",
    "transformers.dynamic_module_utils",
    "transformers.modeling_rope_utils",
    "transformers.models.auto.configuration_auto",
)


class Forked:
    """Of a process that was forked, what its leader uses of `subprocess.Popen`."""

    def __init__(self, pid: int, stdin: BinaryIO) -> None:
        self.pid, self.stdin = pid, stdin
        self._has_ended = False

    def wait(self) -> int:
        """See `subprocess.Popen.wait`."""
        status = os.waitpid(self.pid, 0)[1]
        self._has_ended = True
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """See `subprocess.Popen.kill`."""
        if not self._has_ended:
            os.kill(self.pid, signal.SIGKILL)


class ForkedWorkers:
    """Stands for the module `subprocess` where workers are started."""

    PIPE = subprocess.PIPE

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._template: subprocess.Popen[bytes] | None = None

    def Popen(  # noqa: N802  (as there)
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        pass_fds: Sequence[int],
        process_group: int,
        env: dict[str, str],
    ) -> Forked:
        """See `subprocess.Popen`; of the command ``python -m MODULE ARGUMENTS``."""
        assert (command[:2], stdin, stdout, process_group) == ([sys.executable, "-m"], self.PIPE, 2, 0)
        theirs, ours = os.pipe()
        with self._lock:
            if self._template is None:
                self._start(env)
            _adopt_orphans(True)
            try:
                request = pickle.dumps((os.getpid(), command[2:], tuple(pass_fds), env))
                descriptors = array.array("i", (theirs, stdout, *pass_fds))
                self._socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
                pid = int(self._socket.recv(64))
            finally:
                _adopt_orphans(False)
        os.close(theirs)
        return Forked(pid, os.fdopen(ours, "wb"))

    def _start(self, env: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._template = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=env,
        )
        theirs.close()

    def close(self) -> None:
        """End the process that workers are forked from."""
        if self._template is not None:
            self._socket.close()
            self._template.wait()


def _adopt_orphans(does: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(does))


def _serve(channel: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Fork what is asked for; returns in those, with what to run and the environment."""
    while True:
        request, ancillary, _, _ = channel.recvmsg(_MOST_BYTES, 4096)
        if not request:
            sys.exit()
        leader, command, targets, env = pickle.loads(request)
        given = array.array("i")
        given.frombytes(ancillary[0][2])
        from_between, to_template = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if pid:
                os.write(to_template, str(pid).encode())
                os._exit(0)
            channel.close()
            _become(leader, list(given), (0, 2, *targets))
            return command, env
        os.waitpid(between, 0)
        channel.send(os.read(from_between, 64))
        for descriptor in (*given, from_between, to_template):
            os.close(descriptor)


def _become(leader: int, given: Sequence[int], targets: Sequence[int]) -> None:
    """Be a child of the leader's that has the given descriptors at the numbers where it expects them."""
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, max(targets) + 1) for descriptor in given]
    os.closerange(3, min(moved))
    for descriptor, target in zip(moved, targets, strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.dup2(2, 1)
    os.setpgid(0, 0)
    while os.getppid() != leader:
        time.sleep(0.0005)


def main() -> None:
    """Of the process that workers are forked from."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    command, env = _serve(channel)
    os.environ.clear()
    os.environ.update(env)
    added = env["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = list(dict.fromkeys([*added, *sys.path]))
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
