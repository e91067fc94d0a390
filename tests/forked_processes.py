"""Processes that are forked from one which has imported everything, instead of importing for seconds each.

Such a process is its starter's child, with the descriptors, environment and paths that it would have been started with, and runs
a module as `python -m` does. Only what was imported before is not imported again. What it starts itself (a server its engines,
an engine its ranks) is forked too, from a process that is forked from it before it runs.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import gc
import importlib
import os
import pickle
import resource
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl: whether grandchildren become this process's children when their parents end."""
_MOST_BYTES = 1 << 20
_OF_ENGINES = (
    "transformers.dynamic_module_utils",
    "transformers.modeling_rope_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.models.llama.configuration_llama",  # with all that the first configuration of any model imports
)
_OF_SERVERS = (
    *_OF_ENGINES,
    "stepgraph.engine.adapter_reader",
    "stepgraph.engine.build",
    "stepgraph.server.engine_control",
    "stepgraph.server.engine_report",
    "stepgraph.server.front_processes",
    "stepgraph.server.serve",
    "stepgraph.server.transfer_report",
)
_IMPORTED = {
    "stepgraph.executor.worker": ("stepgraph.executor.follower", *_OF_ENGINES),
    "stepgraph.server": _OF_SERVERS,
    "stepgraph.server.engine_process": _OF_SERVERS,
    "stepgraph.server.front_process": _OF_SERVERS,
}
"""By what is run, what it imports; not what is run itself. Anything else may be a user's, with whatever it needs."""


class _Request(NamedTuple):
    """What a process is to be."""

    starter: int
    """Its parent's number."""
    command: list[str]
    """A module and what it is given."""
    descriptors: tuple[int, ...]
    """Numbers at which it expects those that are sent along."""
    environment: dict[str, str]
    folder: str
    cores: set[int]
    file_limits: tuple[int, int]
    new_session: bool
    process_group: int
    """-1: its parent's."""


class ForkedProcesses:
    """Stands for the module `subprocess` where processes are started."""

    PIPE = subprocess.PIPE

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._template: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def Popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: N802  (as there)
        """See `subprocess.Popen`; of the command ``python -m MODULE ARGUMENTS``."""
        return _Popen(command, **options, forked=self)

    def fork(self, request: _Request, descriptors: Sequence[int]) -> int:
        """Have a process forked that becomes this one's child; returns its number."""
        with self._lock:
            if self._socket is None:
                self._start()
            assert self._socket is not None
            _adopt_orphans(True)
            try:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                self._socket.sendmsg([pickle.dumps(tuple(request))], rights)
                return int(self._socket.recv(64))
            finally:
                _adopt_orphans(False)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._template = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
        )
        theirs.close()

    def fork_template(self) -> _Request | None:
        """Fork the process that others are forked from. Returns None in the caller, and in those others what they are to be."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            theirs.close()
            return None
        self._socket.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.closerange(3, theirs.fileno())
        os.closerange(theirs.fileno() + 1, 1 << 16)
        return _serve(theirs)

    def close(self) -> None:
        """End the process that others are forked from."""
        if self._template is not None:
            assert self._socket is not None
            self._socket.close()
            self._template.wait()


FORKED = ForkedProcesses() if sys.platform == "linux" else None  # which lets processes adopt others
"""Those of the process of tests."""


class _Popen(subprocess.Popen[Any]):
    def __init__(self, command: Sequence[str], *, forked: ForkedProcesses, **options: Any) -> None:
        self._forked = forked
        super().__init__(command, **options)

    def _execute_child(self, command, _executable, _preexec, _close, pass_fds, cwd, env, *others) -> None:
        _startup, _flags, _shell, stdin, to_stdin, from_stdout, stdout, from_stderr, stderr, *_ids = others
        *_, new_session, process_group = _ids
        assert command[:2] == [sys.executable, "-m"]
        request = _Request(
            os.getpid(),
            command[2:],
            (0, 1, 2, *pass_fds),
            dict(os.environ if env is None else env),
            cwd or os.getcwd(),
            os.sched_getaffinity(0),
            resource.getrlimit(resource.RLIMIT_NOFILE),
            new_session,
            process_group,
        )
        standard = [own if given == -1 else given for own, given in enumerate((stdin, stdout, stderr))]
        self.pid = self._forked.fork(request, (*standard, *pass_fds))
        self._child_created = True
        self._close_pipe_fds(stdin, to_stdin, from_stdout, stdout, from_stderr, stderr)


def _adopt_orphans(does: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(does))


def _serve(channel: socket.socket) -> _Request:
    """Fork what is asked for; returns in those."""
    while True:
        message, ancillary, _, _ = channel.recvmsg(_MOST_BYTES, 4096)
        if not message:
            os._exit(0)
        request = _Request(*pickle.loads(message))
        missing = [module for module in _IMPORTED.get(request.command[0], _OF_SERVERS) if module not in sys.modules]
        for module in missing:
            importlib.import_module(module)
        if missing:
            gc.collect()
            gc.freeze()
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
            _become(request, list(given))
            return request
        os.waitpid(between, 0)
        channel.send(os.read(from_between, 64))
        for descriptor in (*given, from_between, to_template):
            os.close(descriptor)


def _become(request: _Request, given: Sequence[int]) -> None:
    """Be the starter's child that has the given descriptors at the numbers where it expects them."""
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, max(request.descriptors) + 1) for descriptor in given]
    os.closerange(3, min(moved))
    for descriptor, target in zip(moved, request.descriptors, strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    if request.new_session:
        os.setsid()
    elif request.process_group >= 0:
        os.setpgid(0, request.process_group)
    os.sched_setaffinity(0, request.cores)
    resource.setrlimit(resource.RLIMIT_NOFILE, request.file_limits)
    while os.getppid() != request.starter:
        time.sleep(0.0005)


def main() -> None:
    """Of the process that others are forked from, and of all of those."""
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    while True:
        forked = ForkedProcesses()
        its_own = forked.fork_template()
        if its_own is None:
            break
        request = its_own
    for starter in ("stepgraph.executor.workers", "stepgraph.server.spawn"):
        if starter in sys.modules:
            sys.modules[starter].subprocess = forked  # type: ignore[attr-defined]
    module = request.command[0]
    ctypes.CDLL(None).prctl(_PR_SET_NAME, module.rpartition(".")[2].encode())  # what `ps` calls it
    os.environ.clear()
    os.environ.update(request.environment)
    if "PYTHONUNBUFFERED" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    os.chdir(request.folder)
    added = [path for path in request.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = list(dict.fromkeys([*added, *sys.path]))
    sys.argv = list(request.command)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
