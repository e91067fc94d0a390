"""Grammars in processes of their own: what one costs, and how it ends, is its own requests' affair."""

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stepgraph.engine import grammars as grammars_module
from stepgraph.engine.fork_server import ForkServer
from stepgraph.engine.grammar_process import _ControlChannel, _ForkServer
from stepgraph.engine.grammars import Grammars, RemoteGuide
from stepgraph.engine.guidance import Vocabulary
from stepgraph.engine.guide_messages import Channel, Kind
from stepgraph.errors import ConfigError, Fault

pytest.importorskip("xgrammar", reason="grammars need xgrammar")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")

SLOW_TO_FOLLOW = {"grammar": 'root ::= "x" (a | a a){1,400} "y"\na ::= "x" | [^z]'}
"""Compiles at once; then every token may be read in thousands of ways."""
SLOW_TO_COMPILE = 'root ::= "x" (a){0,%d} "y"\na ::= [^z]{0,30}'
"""Takes about a minute."""


def create_vocabulary() -> Vocabulary:
    """Letters and many long words, which is what makes a grammar slow."""
    rng = random.Random(0)
    words = {bytes(rng.choices(range(97, 123), k=30)) for _ in range(4000)}
    tokens = [b"", *(bytes([code]) for code in range(32, 127)), *sorted(words)]
    return Vocabulary(tokens, len(tokens), (0,))


VOCABULARY = create_vocabulary()


@pytest.fixture(scope="module")
def of_all_tests() -> Iterator[Grammars]:
    before = processes_below(os.getpid())
    made = Grammars(lambda: VOCABULARY, VOCABULARY.vocab_size)
    yield made
    made.shut_down()
    assert set(processes_below(os.getpid())) <= set(before)


@pytest.fixture
def grammars(of_all_tests) -> Iterator[Grammars]:
    """Followed by nobody when a test begins, whatever became of the test before it."""
    yield of_all_tests
    for grammar in list(of_all_tests._by_spec.values()):
        for guide in list(grammar.guides.values()):
            of_all_tests.drop(guide)


class Answer:
    """An answer that follows a grammar, written token by token."""

    def __init__(self, grammars: Grammars, **spec):
        self.tokens: list[int] = []
        self.grammars = grammars
        self.guide: RemoteGuide = grammars.follow(json.dumps(spec), self.tokens)

    def allowed(self) -> set[bytes]:
        """What may come next, once that is known."""
        wait_until(self.grammars, lambda: not self.guide.is_waiting)
        assert self.guide.error is None, self.guide.error
        bits = np.unpackbits(self.guide.masks[0].view(np.uint8), bitorder="little")
        return {VOCABULARY.tokens[i] or b"<end>" for i in np.flatnonzero(bits)}

    def write(self, text: bytes) -> None:
        self.tokens += [VOCABULARY.tokens.index(bytes([code])) for code in text]
        self.grammars.ask(self.guide, ())


def wait_until(grammars: Grammars, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        grammars.wait(0.05)
        grammars.collect()


def processes_below(pid: int) -> list[int]:
    """Ids of the processes that a process has started, and they; those it started first come first."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:  # it has ended
                continue
            state, parent, *_ = rest.split()
            if state != "Z" and ("python" in name or "stepgraph" in name):
                parents[int(entry.name)] = int(parent)
    found, level = [], [pid]
    while level:
        level = sorted(child for child, parent in parents.items() if parent in level)
        found += level
    return found


def processes_before(grammars: Grammars) -> list[int]:
    """Processes that are there before one is started for another grammar."""
    answer = Answer(grammars, regex="before")
    answer.allowed()
    grammars.drop(answer.guide)
    return processes_below(os.getpid())


def process_of(answer: Answer, before: list[int]) -> int:
    """The process that an answer's grammar got: the one that was not there before."""
    answer.allowed()
    [process] = set(processes_below(os.getpid())) - set(before)
    return process


def test_a_guide_that_is_late_ends_alone(grammars) -> None:
    early = Answer(grammars, **SLOW_TO_FOLLOW)
    late = Answer(grammars, **SLOW_TO_FOLLOW)
    other = Answer(grammars, regex="(ab)*")
    assert b"x" in early.allowed() & late.allowed()
    assert other.allowed() == {b"a", b"<end>"}
    late.write(b"x")
    for i in range(10):  # while the other one is at it
        other.write(b"ab"[i % 2 : i % 2 + 1])
        assert other.allowed() == ({b"b"} if i % 2 == 0 else {b"a", b"<end>"})
    wait_until(grammars, lambda: not late.guide.is_waiting)
    assert "took more than 0.25 s of CPU time for one token" in late.guide.error.message
    assert (late.guide.error.param, late.guide.error.is_users) == ("structured_outputs", True)
    assert early.guide.error is None
    early.write(b"")  # its grammar has a new process, which is told everything again
    assert b"x" in early.allowed()
    for answer in (early, late, other):
        grammars.drop(answer.guide)


def test_proposals_get_masks_behind_them_and_are_taken_back(grammars) -> None:
    answer = Answer(grammars, regex="ab[cd]e")
    assert answer.allowed() == {b"a"}
    drafts = [VOCABULARY.tokens.index(text) for text in (b"b", b"d", b"x")]
    answer.tokens.append(VOCABULARY.tokens.index(b"a"))
    grammars.ask(answer.guide, drafts)
    assert answer.allowed() == {b"b"}
    counts = [int(np.unpackbits(mask.view(np.uint8)).sum()) for mask in answer.guide.masks]
    assert counts == [1, 2, 1, 0]
    answer.write(b"bc")
    assert answer.allowed() == {b"e"}
    grammars.drop(answer.guide)


def test_a_token_outside_the_grammar_ends_its_request(grammars) -> None:
    answer = Answer(grammars, regex="ab")
    answer.allowed()
    answer.write(b"b")
    wait_until(grammars, lambda: not answer.guide.is_waiting)
    assert "outside the request's grammar" in answer.guide.error.message
    grammars.drop(answer.guide)


def test_slow_compilations_hold_up_no_quick_one_and_end_with_their_requests(grammars) -> None:
    slow = [Answer(grammars, grammar=SLOW_TO_COMPILE % (20 + i)) for i in range(4)]
    wait_until(grammars, lambda: grammars.num_compiling == 4)
    time.sleep(0.3)
    for i in range(3):
        quick = Answer(grammars, regex=f"q{i}")
        assert quick.allowed() == {b"q"}
        grammars.drop(quick.guide)
    assert all(answer.guide.is_waiting for answer in slow)
    running = processes_below(os.getpid())
    for answer in slow:
        grammars.drop(answer.guide)
    assert grammars.num_compiling == 0
    wait_until(grammars, lambda: len(processes_below(os.getpid())) <= len(running) - 2)


def test_a_process_that_dies_is_replaced_and_told_everything_again(grammars) -> None:
    before = processes_before(grammars)
    answer = Answer(grammars, regex="abcdef")
    process = process_of(answer, before)
    answer.write(b"ab")
    assert answer.allowed() == {b"c"}
    os.kill(process, signal.SIGKILL)
    wait_until(grammars, lambda: process not in processes_below(os.getpid()))
    answer.write(b"c")
    assert answer.allowed() == {b"d"}
    fork_server = grammars._fork_server._start.process.pid  # other engines of this process may have some, too
    os.kill(fork_server, signal.SIGKILL)
    wait_until(grammars, lambda: fork_server not in processes_below(os.getpid()))
    answer.write(b"d")
    assert answer.allowed() == {b"e"}
    grammars.drop(answer.guide)


def test_a_process_that_dies_over_a_request_ends_that_one_only(grammars) -> None:
    before = processes_before(grammars)
    culprit, other = (Answer(grammars, regex="abcd") for _ in range(2))
    process = process_of(culprit, before)
    other.allowed()
    for place in range(2):  # the first time it may have been killed from outside, and is tried again
        os.kill(process, signal.SIGSTOP)
        culprit.write(b"ab"[place : place + 1])
        other.write(b"ab"[place : place + 1])
        os.kill(process, signal.SIGABRT)
        os.kill(process, signal.SIGCONT)
        assert other.allowed() == {b"bc"[place : place + 1]}
        wait_until(grammars, lambda: not culprit.guide.is_waiting)
        assert (culprit.guide.error is None) == (place == 0)
        [process] = set(processes_below(os.getpid())) - set(before)
    assert "SIGABRT" in culprit.guide.error.message
    for answer in (culprit, other):
        grammars.drop(answer.guide)


def test_grammars_that_nobody_follows_are_kept_up_to_a_limit(grammars, monkeypatch) -> None:
    monkeypatch.setattr(grammars_module, "MAX_IDLE", 3)
    counts = []
    for i in range(8):
        answer = Answer(grammars, regex=f"idle{i}")
        answer.allowed()
        grammars.drop(answer.guide)
        counts.append(grammars.num_processes)
    assert counts[-1] == counts[-4] <= 3
    before = processes_below(os.getpid())
    again = Answer(grammars, regex="idle7")
    assert again.allowed() == {b"i"}
    assert set(processes_below(os.getpid())) <= set(before)
    monkeypatch.setattr(grammars_module, "MAX_IDLE_BYTES", 0)
    grammars.drop(again.guide)
    assert grammars.num_processes == 0


def test_grammars_wait_while_there_are_as_many_processes_as_may_be(grammars, monkeypatch) -> None:
    first = Answer(grammars, regex="one")
    first.allowed()
    monkeypatch.setattr(grammars_module, "MAX_PROCESSES", 1)
    second = Answer(grammars, regex="two")
    for _ in range(5):
        grammars.wait(0.02)
    assert second.guide.is_waiting
    grammars.drop(first.guide)
    assert second.allowed() == {b"t"}
    grammars.drop(second.guide)


def test_what_is_larger_than_the_sockets_buffer_arrives(grammars) -> None:
    answer = Answer(grammars, json={"type": "object", "description": "x" * 2**20})
    wait_until(grammars, lambda: not answer.guide.is_waiting)
    assert "at most 65536 are allowed" in answer.guide.error.message
    assert answer.guide.error.param == "structured_outputs.json"


def refuse_to_start() -> tuple[int, socket.socket]:
    """As a fork server does that cannot fork."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        Channel(theirs).send(Kind.NOT_STARTED, 0, b"no room")
    return 2**31, ours


def lack_descriptors() -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("fail", [refuse_to_start, lack_descriptors])
def test_where_the_system_has_no_room_for_processes_those_that_nobody_follows_end(grammars, monkeypatch, fail) -> None:
    idle = Answer(grammars, regex=f"idle {fail.__name__}")
    idle.allowed()
    grammars.drop(idle.guide)
    assert grammars.num_processes > 0
    fork = ForkServer.fork
    monkeypatch.setattr(
        ForkServer, "fork", lambda fork_server: fork(fork_server) if grammars.num_processes == 0 else fail()
    )
    answer = Answer(grammars, regex=f"needed {fail.__name__}")
    assert answer.allowed() == {b"n"}
    assert grammars.num_processes == 1
    grammars.drop(answer.guide)


def test_a_request_is_told_that_there_is_no_room_for_its_process(grammars, monkeypatch) -> None:
    followed, idle = Answer(grammars, regex="followed"), Answer(grammars, regex="idle")
    for answer in (followed, idle):
        answer.allowed()
    monkeypatch.setattr(grammars_module, "MAX_IDLE", 0)
    grammars.drop(idle.guide)
    assert grammars.num_processes == 1
    monkeypatch.setattr(ForkServer, "fork", lambda fork_server: refuse_to_start())
    answer = Answer(grammars, regex="refused")
    wait_until(grammars, lambda: not answer.guide.is_waiting)
    assert answer.guide.error == Fault("no room", is_users=False)
    assert followed.guide.error is None
    grammars.drop(followed.guide)


def test_a_fork_server_that_cannot_fork_says_so_and_goes_on(monkeypatch) -> None:
    def fail() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fail)
    (engines, fork_servers), (ours, theirs) = socket.socketpair(), socket.socketpair()
    with engines, fork_servers, ours:
        Channel(engines).send_with(theirs, Kind.FORK, 1)
        theirs.close()
        control = _ControlChannel(fork_servers)
        fork_server = _ForkServer(control)
        for frame in control.receive():
            fork_server._obey(frame, None)
        [said] = Channel(ours).receive()
        fork_server.end_all()
    assert said.kind == Kind.NOT_STARTED
    assert b"Resource temporarily unavailable" in said.payload


def test_a_guide_that_is_dropped_while_it_waits_for_its_turn_is_forgotten_by_its_process(monkeypatch) -> None:
    monkeypatch.setattr(grammars_module, "MAX_ANSWERING", 1)
    grammars = Grammars(lambda: VOCABULARY, VOCABULARY.vocab_size)
    slow, dropped, left = Answer(grammars, **SLOW_TO_FOLLOW), *(Answer(grammars, regex="ab") for _ in range(2))
    for answer in (slow, dropped, left):
        answer.allowed()
    sent: list[tuple[int, int]] = []
    send = Channel.send
    monkeypatch.setattr(
        Channel, "send", lambda channel, kind, number=0, payload=b"": (
            sent.append((kind, number)), send(channel, kind, number, payload)
        )
    )  # fmt: skip
    slow.write(b"x")
    dropped.write(b"a")
    grammars.drop(dropped.guide)
    grammars.shut_down()
    assert (Kind.FOLLOW, dropped.guide.number) not in sent
    assert (Kind.DROP, dropped.guide.number) in sent


def test_what_keeps_the_processes_from_starting_is_told() -> None:
    def fail() -> Vocabulary:
        raise ConfigError("no tokenizer", param="prompt")

    grammars = Grammars(fail, VOCABULARY.vocab_size)
    answer = Answer(grammars, regex="a")
    wait_until(grammars, lambda: not answer.guide.is_waiting)
    assert answer.guide.error == Fault("no tokenizer", is_users=True, param="prompt")
    grammars.shut_down()


def test_no_process_outlives_an_engine_that_is_killed() -> None:
    code = f"""
import json, time
from stepgraph.engine.grammars import Grammars
from stepgraph.engine.guidance import Vocabulary
tokens = [b"", *(bytes([i]) * n for i in range(97, 123) for n in range(1, 60))]
grammars = Grammars(lambda: Vocabulary(tokens, len(tokens), (0,)), len(tokens))
guide = grammars.follow(json.dumps(dict(regex="a")), [])
while guide.is_waiting:
    grammars.wait(1)
    grammars.collect()
grammars.follow(json.dumps(dict(grammar={SLOW_TO_COMPILE % 30!r})), [])
grammars.collect()
print("ready", flush=True)
time.sleep(1000)
"""
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert engine.stdout is not None
    assert engine.stdout.readline() == b"ready\n"
    while len(started := processes_below(engine.pid)) < 3:
        time.sleep(0.01)
    engine.kill()
    engine.wait()
    engine.stdout.close()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and is_alive(pid) for pid in started):
        assert time.monotonic() < deadline, started
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
