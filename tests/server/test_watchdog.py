"""What counts as a hang of the engine."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

import msgspec
import pytest
from observed import READY

from stepgraph.server import watchdog as module
from stepgraph.server.engine_process import EngineProcess
from stepgraph.server.messages import Beat, Stop, decode_from_engine, encode
from stepgraph.server.watchdog import Watchdog, cpu_ticks


def looks_until_hanging(watchdog: Watchdog, most: int = 10_000) -> int:
    return next(number for number in range(1, most) if watchdog.look())


def serving(limit_s: float | None, **ready) -> Watchdog:
    watchdog = Watchdog(0, limit_s)
    watchdog.hear(msgspec.structs.replace(READY, **ready))
    watchdog.look()
    return watchdog


def test_a_loop_that_says_nothing_for_the_limit_hangs_and_any_message_starts_the_count_anew():
    watchdog = serving(4.0)
    assert watchdog.tick_s == 0.5
    assert looks_until_hanging(watchdog) == 8
    watchdog.hear(Beat())
    assert not watchdog.look()
    assert (watchdog.silent_s, looks_until_hanging(watchdog)) == (0, 8)


def test_the_limit_follows_the_models_largest_step_unless_it_is_given():
    assert serving(None).limit_s == 120
    assert serving(None, longest_step_s=500.0).limit_s == 500
    assert serving(7.0, longest_step_s=500.0).limit_s == 7


def test_a_capture_that_was_announced_may_take_minutes_and_the_next_message_ends_that():
    watchdog = serving(3.0)
    watchdog.hear(Beat(captures=True))
    assert not watchdog.look()
    assert watchdog.limit_s == 600
    watchdog.hear(Beat())
    assert watchdog.limit_s == 3


def test_weights_that_are_moved_or_read_take_as_long_as_a_start_while_the_process_computes(monkeypatch):
    watchdog, used = serving(3.0), iter([5, 6, 6])
    monkeypatch.setattr(module, "cpu_ticks", lambda session: next(used))
    watchdog.hear(Beat(reads=True))
    watchdog.look()
    assert looks_until_hanging(watchdog) == 3 * 600, "it computed twice"
    watchdog.hear(Beat())
    assert watchdog.limit_s == 3


def test_a_process_that_starts_hangs_only_if_it_does_not_compute_either(monkeypatch):
    watchdog, used = Watchdog(0, 3.0), iter([5, 6, 6])
    monkeypatch.setattr(module, "cpu_ticks", lambda session: next(used))
    assert looks_until_hanging(watchdog) == 3 * 600, "it computed twice"


def test_a_start_is_not_watched_where_the_system_tells_no_processor_times(monkeypatch):
    monkeypatch.setattr(module, "cpu_ticks", lambda session: None)
    watchdog = Watchdog(0, 3.0)
    assert not any(watchdog.look() for _ in range(2000))


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")
def test_processor_time_is_that_of_a_session_with_its_children():
    child = "import time\nwhile time.process_time() < 0.3: pass"
    leader = f"import subprocess, sys; print(flush=True); subprocess.run([sys.executable, '-c', {child!r}]); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", leader], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.readline()
        before, deadline = cpu_ticks(process.pid), time.monotonic() + 60
        while cpu_ticks(process.pid) < before + os.sysconf("SC_CLK_TCK") // 5:
            assert time.monotonic() < deadline, "what the child does is not counted"
        process.stdin.close()


@dataclass
class Socket:
    """The engine's end: records what is sent, and says stop after some waits."""

    waits: list[float] = field(default_factory=list)
    sent: list[object] = field(default_factory=list)

    def poll(self, timeout_ms: int, flags: int) -> int:
        self.waits.append(timeout_ms)
        time.sleep(0.002)
        return len(self.waits) > 2

    def recv(self, flags: int) -> bytes:
        return encode(Stop())

    def send(self, content: bytes, flags: int) -> None:
        self.sent.append(decode_from_engine(content))


def test_a_loop_that_is_idle_or_asleep_beats_and_a_capture_is_announced(create_engine, monkeypatch):
    engine, socket = create_engine(enable_sleep_mode=True), Socket()
    process = EngineProcess(engine, socket)
    monkeypatch.setattr("stepgraph.server.engine_process._BEAT_S", 0.001)
    process.run()
    assert socket.sent[1:] == [Beat()] * (len(socket.waits) - 1)
    engine.sleep()
    asleep = Socket()
    EngineProcess(engine, asleep).run()
    assert asleep.sent[1:] == [Beat()] * (len(asleep.waits) - 1)
    engine.wake_up()
    process = EngineProcess(engine, socket)
    engine.executor.runner.graphs.store.graph(engine.executor.runner.policy.shapes()[-1])
    assert socket.sent[-1] == Beat(captures=True)
