"""The processes that compile and follow grammars: a fork server, which knows the vocabulary, and a fork of it for each grammar.

What a grammar costs is bounded by its process: CPU time by a timer of the kernel, which ends it wherever it is, and memory by a
limit. The engine's side is `stepgraph.engine.grammars`. No process outlives the engine: the fork server reads the end of its
socket when the engine is gone, ends all others, and itself.

Starting a fork server takes half a second, a fork of it 5 ms and 2 MB. It has one thread, so that forking it is safe, and neither
torch nor transformers, which would take seconds and hundreds of MB.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from stepgraph.engine.guide_messages import Channel, Frame, Kind

MAX_TOKEN_SECONDS = 0.25
"""CPU time for the masks of one token of one request, and of the proposals behind it."""
MAX_COMPILE_SECONDS = 60.0
"""CPU time for a compilation."""
MAX_MEMORY_BYTES = 4 * 2**30
"""Address space that a grammar's process may take beyond what it starts with; an idle thread counts 64 MiB."""
_YIELDING_NICE = 15
"""How far a grammar's process gives way to the engine once it has shown to be slow."""
_OUT_OF_MEMORY_SCORE = "500"
"""Where memory runs out, the kernel is to end a grammar rather than the engine."""


class _ForkServer:
    """Starts grammars' processes, and ends them, as the engine says."""

    def __init__(self, control: _ControlChannel):
        self._control = control
        self._pids: dict[int, int] = {}  # by the engine's numbers
        self._ears, self._mouth = socket.socketpair()
        for sock in (self._ears, self._mouth):
            sock.setblocking(False)

    def run(self) -> None:
        """Until the engine is gone."""
        vocabulary = pickle.loads(self._first().payload)
        _import_xgrammar()
        import numpy  # noqa: F401, before the forks

        from stepgraph.engine.guidance import GuidanceCompiler

        compiler = GuidanceCompiler(vocabulary)
        del vocabulary
        signal.set_wakeup_fd(self._mouth.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        gc.collect()
        gc.freeze()  # collections in the forks need not touch, and so copy, what they share
        self._control.send(Kind.READY)
        while not self._control.closed:
            heard: list[Any] = [self._control, self._ears]
            heard, _, _ = select.select(heard, [], [])
            if self._ears in heard:
                self._ears.recv(4096)
                self._reap()
            if self._control in heard:
                for frame in self._control.receive():
                    self._obey(frame, compiler)

    def end_all(self) -> None:
        signal.set_wakeup_fd(-1)
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)

    def _first(self) -> Frame:
        while not self._control.closed:
            for frame in self._control.receive():
                return frame
        sys.exit()  # the engine is gone already

    def _obey(self, frame: Frame, compiler: Any) -> None:
        pid = self._pids.get(frame.number)
        if frame.kind == Kind.FORK:
            self._fork(frame.number, socket.socket(fileno=self._control.descriptors.popleft()), compiler)
        elif pid is None:  # it has ended by itself meanwhile
            return
        elif frame.kind == Kind.YIELD:
            os.setpriority(os.PRIO_PROCESS, pid, _YIELDING_NICE)
        else:
            signals = {Kind.END: signal.SIGKILL, Kind.PAUSE: signal.SIGSTOP, Kind.RESUME: signal.SIGCONT}
            os.kill(pid, signals[Kind(frame.kind)])

    def _fork(self, number: int, sock: socket.socket, compiler: Any) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # of too many processes, or too little memory
            refusal = f"the system starts no process for the grammar ({error}); try again later"
            Channel(sock).send(Kind.NOT_STARTED, 0, refusal.encode())
            sock.close()
            return
        if pid:
            self._pids[number] = pid
            sock.close()
            return
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (self._control.socket, self._ears, self._mouth):
                other.close()
            _limit_this_process()
            _GrammarProcess(Channel(sock), compiler).run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)

    def _reap(self) -> None:
        numbers = {pid: number for number, pid in self._pids.items()}
        while self._pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            number = numbers[pid]
            del self._pids[number]
            self._control.send(Kind.ENDED, number, struct.pack("<i", os.waitstatus_to_exitcode(status)))


class _GrammarProcess:
    """One grammar, and the requests that follow it."""

    def __init__(self, channel: Channel, compiler: Any):
        self._channel = channel
        self._frames = self._read()
        self._compiler = compiler

    def run(self) -> None:
        """Until the engine closes the socket, or a limit ends the process."""
        import numpy as np

        from stepgraph.engine.guidance import CompiledGuide, Guide, GuideError

        compiled = self._compile(next(self._frames))
        if compiled is None:
            return
        assert isinstance(compiled, CompiledGuide)
        guides: dict[int, Guide] = {}
        num_words = -(-compiled.vocab_size // 32)
        for kind, number, payload in self._frames:
            if kind == Kind.DROP:
                guides.pop(number, None)
                continue
            assert kind == Kind.FOLLOW, kind
            num_tokens, *tokens = struct.unpack(f"<{len(payload) // 4}i", payload)
            drafts = tokens[num_tokens:]
            masks = np.zeros((1 + len(drafts), num_words), np.int32)
            with _cpu_limit(MAX_TOKEN_SECONDS):
                guide = guides.get(number) or guides.setdefault(number, Guide(compiled))
                try:
                    for token in tokens[:num_tokens]:
                        guide.accept(token)
                    guide.fill_along(masks, drafts)
                except GuideError as error:
                    self._channel.send(Kind.LEFT, number, str(error).encode())
                    continue
            self._channel.send(Kind.MASKS, number, masks.tobytes())

    def _read(self) -> Iterator[Frame]:
        while not self._channel.closed:
            yield from self._channel.receive()

    def _compile(self, frame: Frame) -> Any:
        from stepgraph.engine.sampling_params import StructuredOutputs
        from stepgraph.errors import Fault, StepgraphError

        try:
            with _cpu_limit(MAX_COMPILE_SECONDS):
                compiled = self._compiler.compile(StructuredOutputs(**json.loads(frame.payload)))
        except MemoryError:
            refusal = Fault(
                "the grammar needs too much memory; make it smaller", is_users=True, param="structured_outputs"
            )
        except StepgraphError as error:
            refusal = Fault.of(error)
        except Exception as error:
            sys.excepthook(*sys.exc_info())
            refusal = Fault.of(error)
        else:
            self._channel.send(Kind.COMPILED, min(compiled.grammar.memory_size_bytes, 2**32 - 1))
            return compiled
        self._channel.send(Kind.REFUSED, 0, json.dumps(refusal).encode())
        return None


class _ControlChannel(Channel):
    """Frames with which descriptors may come, in their order."""

    def __init__(self, sock: socket.socket):
        super().__init__(sock)
        self.descriptors: deque[int] = deque()

    def _read(self, size: int) -> bytes:
        data, descriptors, _, _ = socket.recv_fds(self.socket, size, 64)
        self.descriptors += descriptors
        return data


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """The kernel ends this process, wherever it is, if what runs inside takes more CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_this_process() -> None:
    with contextlib.suppress(OSError, ValueError):  # not on Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_SCORE)
    with contextlib.suppress(OSError, ValueError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = taken + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _import_xgrammar() -> None:
    """Import xgrammar with stand-ins for torch and transformers, whose names it only mentions in what is used of it here; as it
    is, where another version of it does not come to terms with them."""
    names = ("torch", "transformers")
    try:
        sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi, which xgrammar builds on, does without
        import tvm_ffi  # noqa: F401

        for name in names:
            sys.modules[name] = _StandIn(name)
        import xgrammar
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] in (*names, "tvm_ffi", "xgrammar")]:
            del sys.modules[name]
        import xgrammar  # noqa: F401
    else:
        for name in names:
            del sys.modules[name]


class _StandIn(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def main() -> NoReturn:
    """Entry point of the fork server; its one argument is the descriptor of its socket to the engine."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    fork_server = _ForkServer(_ControlChannel(socket.socket(fileno=int(sys.argv[1]))))
    try:
        fork_server.run()
    finally:
        fork_server.end_all()
    sys.exit()


if __name__ == "__main__":
    main()
