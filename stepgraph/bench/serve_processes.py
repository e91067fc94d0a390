"""The load of ``bench serve`` from several processes, which begin at one time. Run as a module, it is one of them.

A process gets its part of the load on its standard input, says ``r`` when it is ready, and is told the time to begin. Then it
writes a dot for each request that ended, and in the end, after a line break, a pickled `PartRun`. That its input says more, or
ends, is its Ctrl-C: so none outlives the command.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from stepgraph.bench.serve_client import Load, PartRun, Run, run_part
from stepgraph.errors import StepgraphError

_SIZE, _TIME = struct.Struct("Q"), struct.Struct("d")
_BEGIN_IN_S = 0.05
"""All processes hear of the time to begin before it comes."""
_READ_BYTES = 2**16


def run_in_processes(load: Load, num_processes: int, *, on_end: Callable[[], object]) -> Run:
    """The same as `run_load`, with the requests shared among processes. Must be called in the main thread.

    Args:
        load: of at least so many requests, and places if there is a limit.
        num_processes: how many.
        on_end: called after each request.

    Raises:
        StepgraphError: a process died.
    """
    command = [sys.executable, "-m", "stepgraph.bench.serve_processes"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)  # no Ctrl-C
        for _ in range(num_processes)
    ]
    try:
        for rank, process in enumerate(processes):
            content = pickle.dumps(load.part(rank, num_processes))
            _tell(process, _SIZE.pack(len(content)) + content)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.read(1) != b"r":
                raise _died(process)
        begin_s = time.perf_counter() + _BEGIN_IN_S  # the clock is the machine's
        for process in processes:
            _tell(process, _TIME.pack(begin_s))

        def stop() -> None:
            for process in processes:
                _close(process)

        with _on_interrupt(stop):
            return Run.of(load, _read_all(processes, on_end))
    finally:
        for process in processes:
            process.kill()
            process.wait()
            _close(process)
            assert process.stdout is not None
            process.stdout.close()


def _tell(process: subprocess.Popen[bytes], content: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(content)
        process.stdin.flush()
    except BrokenPipeError as error:
        raise _died(process) from error


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # what it was told last did not reach it
        process.stdin.close()


def _died(process: subprocess.Popen[bytes]) -> StepgraphError:
    return StepgraphError(
        f"a process of the load generator died (exit code {process.wait()}); its last words are above. Fewer --client-processes "
        "may go"
    )


def _read_all(processes: Sequence[subprocess.Popen[bytes]], on_end: Callable[[], object]) -> list[PartRun]:
    """What became of each process's part, once all have ended."""
    contents = [bytearray() for _ in processes]
    with selectors.DefaultSelector() as selector:
        for process, content in zip(processes, contents, strict=True):
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, (process, content))
        while selector.get_map():
            for key, _ in selector.select():
                process, content = key.data
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    selector.unregister(key.fileobj)
                    if process.wait() or b"\n" not in content:
                        raise _died(process)
                dots = b"" if b"\n" in content else data.partition(b"\n")[0]
                content += data
                for _ in dots:
                    on_end()
    return [pickle.loads(content.partition(b"\n")[2]) for content in contents]


@contextmanager
def _on_interrupt(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at Ctrl-C. A second one does what it did before."""
    previous = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        stop()

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def main() -> None:
    """See the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but while requests are under way
    (size,) = _SIZE.unpack(sys.stdin.buffer.read(_SIZE.size))
    load = pickle.loads(sys.stdin.buffer.read(size))

    def begin() -> float:
        os.write(1, b"r")
        (begin_s,) = _TIME.unpack(sys.stdin.buffer.read(_TIME.size))
        threading.Thread(target=interrupt, daemon=True).start()
        time.sleep(max(0.0, begin_s - time.perf_counter()))
        return float(begin_s)

    def interrupt() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock a thread must not hold when Python ends
        os.kill(os.getpid(), signal.SIGINT)

    run = run_part(load, on_end=lambda: os.write(1, b"."), begin=begin)
    sys.stdout.buffer.write(b"\n" + pickle.dumps(run))


if __name__ == "__main__":
    main()
