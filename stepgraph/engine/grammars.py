"""The grammars that requests follow, each in a process of its own, and how these share the machine.

A request's guide is told tokens and answers with masks, some time later: the engine never waits for one longer than it chooses.
Whatever a grammar does in its process, the others go on; if the process ends over a request, that request ends, and others that
follow the same grammar get a new process, which is told their tokens again.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import signal
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stepgraph.abi.slot_line import MASK_BITS
from stepgraph.engine.fork_server import ForkServer
from stepgraph.engine.grammar_process import MAX_COMPILE_SECONDS, MAX_TOKEN_SECONDS
from stepgraph.engine.guidance import Vocabulary
from stepgraph.engine.guide_messages import Channel, Frame, Kind
from stepgraph.engine.time_slices import TimeSlices
from stepgraph.errors import Fault

MAX_COMPILING = 2
"""Grammars that compile at once."""
MAX_ANSWERING = max(2, (os.cpu_count() or 1) // 2)
"""Grammars that make masks at once."""
MAX_PROCESSES = 300
"""Grammars that have a process at once; others wait until one of these is not followed any more."""
MAX_IDLE = 16
MAX_IDLE_BYTES = 128 * 2**20
"""Grammars that nobody follows, and their size by xgrammar's count, kept for the next request that asks the same. A process takes
some 10 MB beside that."""
GRACE_SECONDS = 0.02
"""How long a step waits for masks that were asked for after the last one; rows without theirs wait for the next. A grammar that
was late is not waited for until it is in time again."""
STUCK_SECONDS = 60.0
"""A process that has not made one guide's masks by then is ended, though it may not have used its CPU time."""


@dataclass(eq=False)
class Grammar:
    """What some requests asked for."""

    spec: str
    guides: dict[int, RemoteGuide] = field(default_factory=dict)
    process: int | None = None
    """Number of its process, once it has one; `channel` leads to it."""
    channel: Channel | None = None
    is_compiled: bool = False
    num_bytes: int = 0
    is_paused: bool = False
    gives_way: bool = False
    is_prompt: bool = True
    """Its last masks came while a step would have waited for them."""
    asked: deque[int] = field(default_factory=deque)
    """Guides whose masks it is to make, in this order."""
    num_sent: int = 0
    """Of these, those that its process knows of."""


class RemoteGuide:
    """Where one request stands in its grammar, as the engine knows it.

    Args:
        tokens: of the answer, which grows.
    """

    def __init__(self, number: int, grammar: Grammar, tokens: Sequence[int]):
        self.number = number
        self.grammar = grammar
        self.masks: npt.NDArray[np.int32] | None = None
        """What may be sampled behind the tokens told last, and behind each proposal told with them: [n, W]."""
        self.is_waiting = True
        """There will be other masks: it waits for its grammar, or for an answer."""
        self.error: Fault | None = None
        """Why its request cannot go on."""
        self.was_suspected = False
        """A process has ended when it was to make masks for it."""
        self._tokens = tokens
        self._drafts: Sequence[int] = ()
        self._num_sent = 0

    def expect(self, drafts: Sequence[int]) -> None:
        """The answer has grown, and these proposals follow it."""
        self.is_waiting, self._drafts = True, drafts

    def start_over(self) -> None:
        """Its process is gone: another is to be told everything."""
        self._num_sent = 0

    def news(self) -> bytes:
        """What its process is to be told, as `Kind.FOLLOW` has it. Counts as told from then on."""
        tokens = self._tokens[self._num_sent :]
        self._num_sent += len(tokens)
        return struct.pack(f"<{1 + len(tokens) + len(self._drafts)}i", len(tokens), *tokens, *self._drafts)

    def fail(self, error: Fault) -> None:
        """Its request cannot go on."""
        self.is_waiting, self.error = False, error


class Grammars:
    """Belongs to the engine's thread, which never waits for longer than it says.

    Args:
        read_vocabulary: of the model; called in another thread, when the first request needs it.
        vocab_size: V.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary], vocab_size: int):
        self._read_vocabulary = read_vocabulary
        self._num_words = -(-vocab_size // MASK_BITS)
        self._fork_server: ForkServer | None = None
        self._selector = selectors.DefaultSelector()
        self._by_spec: dict[str, Grammar] = {}
        self._by_process: dict[int, Grammar] = {}
        self.num_bytes = 0
        """What compiled grammars take, by xgrammar's count."""
        self._compiling = TimeSlices[Grammar](
            MAX_COMPILING, start=self._compile, pause=self._pause, slow=self._let_give_way
        )
        self._answering = TimeSlices[Grammar](
            MAX_ANSWERING, start=self._answer, pause=self._pause, slow=self._let_give_way
        )
        self._idle: dict[Grammar, None] = {}  # compiled and followed by nobody; the one used last comes last
        self._num_guides = itertools.count()
        self._urgent: set[int] = set()  # guides of running requests that were asked just now
        self._urgent_until = 0.0
        self._done: list[RemoteGuide] = []

    @property
    def num_processes(self) -> int:
        """Grammars that have a process."""
        return len(self._by_process)

    @property
    def num_compiling(self) -> int:
        """Grammars that compile, or wait to."""
        return len(self._compiling)

    @property
    def is_busy(self) -> bool:
        """Whether a guide waits for something."""
        return bool(self._compiling or self._answering or self._done)

    def follow(self, spec: str, tokens: Sequence[int]) -> RemoteGuide:
        """A guide for an answer, which waits for its first mask.

        Args:
            spec: fields of `StructuredOutputs`, as JSON.
            tokens: of the answer. They are looked at whenever its process is told of it.
        """
        grammar = self._by_spec.get(spec)
        if grammar is None:
            grammar = self._by_spec[spec] = Grammar(spec)
            self._compiling.enter(grammar)
        self._idle.pop(grammar, None)
        guide = RemoteGuide(next(self._num_guides), grammar, tokens)
        grammar.guides[guide.number] = guide
        if grammar.is_compiled:
            self._ask(guide)
        return guide

    def ask(self, guide: RemoteGuide, drafts: Sequence[int]) -> None:
        """Ask for masks behind the answer's tokens by now, and behind each of these proposals. `collect` will wait a little."""
        guide.expect(drafts)
        if guide.grammar.is_compiled:
            self._ask(guide)
            self._answering.turn(time.monotonic())
            if guide.grammar.is_prompt:
                self._urgent.add(guide.number)
            self._urgent_until = time.monotonic() + GRACE_SECONDS

    def collect(self) -> list[RemoteGuide]:
        """Guides that have stopped waiting since the last call: they have masks, or an error."""
        if self.is_busy:
            self._turn(0.0)
            while self._urgent and (left := self._urgent_until - time.monotonic()) > 0:
                self._turn(left)
            self._urgent.clear()
        done, self._done = self._done, []
        return done

    def wait(self, seconds: float) -> None:
        """Wait until a guide may have stopped waiting, or so long."""
        if self.is_busy and not self._done:
            self._turn(seconds)

    def drop(self, guide: RemoteGuide) -> None:
        """Its request has ended. A grammar that nobody follows any more is kept, unless its process is at work."""
        grammar = guide.grammar
        if grammar.guides.pop(guide.number, None) is None:
            return
        self._urgent.discard(guide.number)
        if guide.number in itertools.islice(grammar.asked, grammar.num_sent, None):
            grammar.asked.remove(guide.number)
            if not grammar.asked:
                self._answering.leave(grammar)
        if grammar.channel is not None and grammar.is_compiled:
            grammar.channel.send(Kind.DROP, guide.number)
        if grammar.guides:
            return
        if grammar.is_compiled and not grammar.asked:
            self._idle[grammar] = None
            while len(self._idle) > MAX_IDLE or sum(idle.num_bytes for idle in self._idle) > MAX_IDLE_BYTES:
                self._forget(next(iter(self._idle)))
        else:
            self._forget(grammar)

    def shut_down(self) -> None:
        """End all processes."""
        for grammar in [*self._by_process.values()]:
            self._detach(grammar)
        if self._fork_server is not None:
            self._selector.unregister(self._fork_server)
            self._fork_server.shut_down()
            self._fork_server = None
        self._selector.close()

    # What processes say

    def _ask(self, guide: RemoteGuide) -> None:
        guide.grammar.asked.append(guide.number)
        if self._answering.is_working(guide.grammar):
            self._send_asked(guide.grammar)
        elif guide.grammar not in self._answering:
            self._answering.enter(guide.grammar)

    def _send_asked(self, grammar: Grammar) -> None:
        assert grammar.channel is not None
        for number in itertools.islice(grammar.asked, grammar.num_sent, None):
            grammar.channel.send(Kind.FOLLOW, number, grammar.guides[number].news())
        grammar.num_sent = len(grammar.asked)

    def _turn(self, seconds: float) -> None:
        """Take in what processes say, waiting up to `seconds` for one that says something."""
        if self._fork_server is None:
            self._fork_server = ForkServer(self._read_vocabulary)
            self._selector.register(self._fork_server, selectors.EVENT_READ)
        for grammar in self._by_process.values():
            if grammar.channel is not None:
                grammar.channel.flush()  # what had no room, and what its process waits for the rest of
        ended: list[tuple[int, int]] = []
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                ended = self._fork_server.receive()
            else:
                self._read(key.data)
        for number, status in ended:
            if number in self._by_process:
                self._bury(self._by_process[number], status)
        if self._fork_server.is_gone:
            self._replace_fork_server()
        now = time.monotonic()
        for grammar in [*self._by_process.values()] if self._answering else ():
            if grammar.num_sent and self._answering.seconds(grammar, now) > STUCK_SECONDS:
                self._tell(Kind.END, grammar)
        self._compiling.turn(now)
        self._answering.turn(now)

    def _read(self, grammar: Grammar) -> None:
        channel = grammar.channel
        assert channel is not None
        channel.flush()
        for frame in channel.receive():
            self._take(grammar, frame)
        if channel.closed:  # the fork server will say why
            self._unwatch(channel)

    def _take(self, grammar: Grammar, frame: Frame) -> None:
        if frame.kind == Kind.COMPILED:
            self._compiling.leave(grammar)
            grammar.is_compiled, grammar.num_bytes = True, frame.number
            self.num_bytes += frame.number
            for guide in grammar.guides.values():
                if guide.is_waiting:
                    self._ask(guide)
        elif frame.kind == Kind.NOT_STARTED and self._idle:
            self._forget_idle()
            self._detach(grammar)
            self._compiling.enter(grammar)
        elif frame.kind == Kind.NOT_STARTED:
            self._fail_all(grammar, Fault(frame.payload.decode(errors="replace"), is_users=False))
        elif frame.kind == Kind.REFUSED:
            self._fail_all(grammar, Fault(*json.loads(frame.payload)))
        elif grammar.num_sent and grammar.asked[0] == frame.number:
            now = time.monotonic()
            grammar.is_prompt = self._answering.seconds(grammar, now) < GRACE_SECONDS
            grammar.asked.popleft()
            grammar.num_sent -= 1
            if grammar.asked:
                self._answering.begin_anew(grammar, now)
            else:
                self._answering.leave(grammar)
            self._urgent.discard(frame.number)
            asker = grammar.guides.get(frame.number)
            if asker is None:  # its request has ended
                return
            if frame.kind == Kind.MASKS:
                asker.masks = np.frombuffer(frame.payload, np.int32).reshape(-1, self._num_words)
                asker.is_waiting = False
            else:
                asker.fail(_of_request(frame.payload.decode(errors="replace")))
            self._done.append(asker)

    # What becomes of processes

    def _bury(self, grammar: Grammar, status: int | None) -> None:
        """A process has ended, None: for no fault of its own. Requests that it ended over fail."""
        for _ in range(2):  # what it said before, and that this is all
            if grammar.channel is not None and not grammar.channel.closed:
                self._read(grammar)
        if grammar.process is None:  # it said that it would
            return
        was_compiled, asked, num_sent = grammar.is_compiled, grammar.asked.copy(), grammar.num_sent
        self._detach(grammar)
        if status is not None and not was_compiled:
            self._fail_all(grammar, _compilation_ended(status))
            return
        suspect = grammar.guides.get(asked[0]) if num_sent and status is not None else None
        if suspect is not None and (status == -signal.SIGPROF or suspect.was_suspected):
            suspect.fail(_following_ended(status))
            self._done.append(suspect)
        elif suspect is not None:  # or a process was killed from outside: see whether the next one gets over it
            suspect.was_suspected = True
        for guide in grammar.guides.values():
            guide.start_over()
        if grammar.guides:
            self._compiling.enter(grammar)
        else:
            self._forget(grammar)

    def _compile(self, grammar: Grammar) -> bool:
        if grammar.process is None:
            return self._launch(grammar)
        self._resume(grammar)
        return True

    def _answer(self, grammar: Grammar) -> bool:
        self._resume(grammar)
        self._send_asked(grammar)
        return True

    def _resume(self, grammar: Grammar) -> None:
        if grammar.is_paused:
            self._tell(Kind.RESUME, grammar)
            grammar.is_paused = False

    def _pause(self, grammar: Grammar) -> None:
        self._tell(Kind.PAUSE, grammar)
        grammar.is_paused = True

    def _tell(self, kind: Kind, grammar: Grammar) -> None:
        assert self._fork_server is not None
        assert grammar.process is not None
        self._fork_server.tell(kind, grammar.process)

    def _launch(self, grammar: Grammar) -> bool:
        """Give a grammar a process. False if there is no room for one now."""
        if self._fork_server is None or not self._fork_server.is_ready:
            return False
        while self.num_processes >= MAX_PROCESSES:
            if not self._idle:
                return False
            self._forget(next(iter(self._idle)))
        try:
            forked = self._fork_server.fork()
        except OSError:  # no descriptors are left
            self._forget_idle()
            return False
        if forked is None:
            return False
        grammar.process, sock = forked
        grammar.channel = Channel(sock)
        self._by_process[grammar.process] = grammar
        self._selector.register(grammar.channel, selectors.EVENT_READ, grammar)
        grammar.channel.send(Kind.COMPILE, 0, grammar.spec.encode())
        return True

    def _let_give_way(self, grammar: Grammar) -> None:
        if not grammar.gives_way:
            self._tell(Kind.YIELD, grammar)
            grammar.gives_way = True

    def _fail_all(self, grammar: Grammar, error: Fault) -> None:
        for guide in grammar.guides.values():
            guide.fail(error)
        self._done += grammar.guides.values()
        self._forget(grammar)

    def _forget(self, grammar: Grammar) -> None:
        """End a grammar's process, if it has one; whoever asks for it again starts anew."""
        if self._fork_server is not None and grammar.process is not None:
            self._tell(Kind.END, grammar)
        self._detach(grammar)
        self._compiling.leave(grammar)
        self._idle.pop(grammar, None)
        del self._by_spec[grammar.spec]
        grammar.guides = {}

    def _forget_idle(self) -> None:
        """The system has no room for more processes: those of grammars that nobody follows make some."""
        for grammar in [*self._idle]:
            self._forget(grammar)

    def _detach(self, grammar: Grammar) -> None:
        """Leave a grammar without the process that it had."""
        if grammar.channel is None or grammar.process is None:
            return
        self._unwatch(grammar.channel)
        grammar.channel.socket.close()
        del self._by_process[grammar.process]
        self._urgent.difference_update(grammar.asked)
        self._compiling.leave(grammar)
        self._answering.leave(grammar)
        self._idle.pop(grammar, None)
        grammar.asked.clear()
        self.num_bytes -= grammar.num_bytes
        grammar.num_sent = grammar.num_bytes = 0
        grammar.process = grammar.channel = None
        grammar.is_compiled = grammar.is_paused = grammar.gives_way = False

    def _unwatch(self, channel: Channel) -> None:
        if channel in self._selector.get_map():
            self._selector.unregister(channel)

    def _replace_fork_server(self) -> None:
        """It is gone, and with it all processes. What they followed starts over in another's; if it never started, none will."""
        assert self._fork_server is not None
        fork_server, self._fork_server = self._fork_server, None
        self._selector.unregister(fork_server)
        fork_server.shut_down()
        for grammar in [*self._by_process.values()]:
            self._bury(grammar, None)
        if not fork_server.is_ready:
            if fork_server.failure is None:
                error = Fault("the process that follows grammars ended while it started", is_users=False)
            else:
                error = Fault.of(fork_server.failure)
            for grammar in [*self._by_spec.values()]:
                self._fail_all(grammar, error)


def _of_request(message: str) -> Fault:
    """The form that a request asks for is to blame."""
    return Fault(message, is_users=True, param="structured_outputs")


def _compilation_ended(status: int) -> Fault:
    if status == -signal.SIGPROF:
        return _of_request(
            f"structured_outputs took more than {MAX_COMPILE_SECONDS:.0f} s of CPU time to compile, which is the limit; make it "
            "smaller, or nest fewer repetitions"
        )
    return _of_request(f"structured_outputs cannot be used: xgrammar failed on it ({_named(status)}); make it smaller")


def _following_ended(status: int | None) -> Fault:
    if status == -signal.SIGPROF:
        return _of_request(
            f"following the grammar took more than {MAX_TOKEN_SECONDS} s of CPU time for one token, which is the limit: it can "
            "read the answer in too many ways; nest fewer repetitions"
        )
    return _of_request(f"the grammar could not be followed: xgrammar failed on it ({_named(status)}); make it smaller")


def _named(status: int | None) -> str:
    return signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"
