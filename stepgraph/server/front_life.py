"""The life of one front's process: started, told what becomes of the engines, and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from stepgraph.errors import ConfigError, EngineDeadError, StepgraphError
from stepgraph.server.counts import FrontCounts
from stepgraph.server.errors import APIError
from stepgraph.server.front_messages import (
    AskCounts,
    Call,
    CallAnswer,
    CallFailed,
    Counts,
    Drain,
    FrontAnswer,
    FrontFailed,
    FrontUp,
    Loaded,
    StartFront,
    ToFront,
    decode_from_front,
    encode,
    encode_start,
)
from stepgraph.server.questions import Questions
from stepgraph.server.socket_folder import socket_folder
from stepgraph.server.sockets import receive, send_now
from stepgraph.server.spawn import ended, spawn_front

logger = logging.getLogger(__name__)

_BACK_OFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Waits before a front is started again; the last one repeats."""
_STEADY_S = 60.0
"""A front that lived so long starts the back-off anew."""
_LOOK_S = 1.0
"""A front's counts are asked for so often: what one has counted since is lost with it."""
_HANG_S = 60.0
"""A front that has not answered for so long is killed, to be started again."""
_START_S = 600.0
"""Likewise, of one that starts."""
_LAST_WORDS_S = 0.2
"""How long to wait for what an ended process sent last."""


class FrontOwner(Protocol):
    """Whose front it is. Called in the event loop."""

    def on_front(self, front: FrontLife) -> None:
        """A process is there, and is to be told how everything is."""

    def on_front_gone(self, name: str, counts: FrontCounts | None) -> None:
        """A process has ended. `counts`: what it told last."""

    async def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """Do what a front asks of the supervisor; see `Control`."""


class FrontLife:
    """Runs one front in a process of its own. Belongs to one event loop.

    Args:
        number: which of the fronts it is.
        start: what each process is told first; its name, the supervisor's address and the sockets are filled in.
        listening: sockets of the first process, whose they are then: if it dies, the system gives connections to others.
        owner: hears what becomes of it, and answers it.
    """

    def __init__(self, number: int, start: StartFront, listening: Sequence[socket.socket], owner: FrontOwner):
        self.counts: FrontCounts | None = None
        """What it told last."""
        self._number = number
        self._start = start
        self._listening = list(listening)
        self._owner = owner
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._questions: Questions[ToFront] = Questions(self.tell, f"front {number}")
        self._loaded = asyncio.Event()
        self._failure: FrontFailed | None = None
        self._heard_at = 0.0
        self._calls: set[asyncio.Task[None]] = set()
        self._life: asyncio.Task[None] | None = None
        self._is_there = self._draining = False

    def start(self) -> None:
        """Start the process."""
        self._life = asyncio.create_task(self._live())

    async def wait_loaded(self) -> None:
        """Wait until it has what it needs of the model.

        Raises:
            ConfigError: the model has not what a front needs.
            EngineDeadError: it cannot start for another reason.
        """
        assert self._life is not None
        loaded = asyncio.create_task(self._loaded.wait())
        try:
            await asyncio.wait((loaded, self._life), return_when=asyncio.FIRST_COMPLETED)
        finally:
            loaded.cancel()
        if not self._loaded.is_set():
            failure = self._failure or FrontFailed("its process ended", is_users=False)
            raise (
                ConfigError(failure.message)
                if failure.is_users
                else EngineDeadError(f"front {self._number} cannot start: {failure.message}")
            )

    def tell(self, message: ToFront) -> None:
        """Send a message; to a front that is not there, nothing."""
        if self._socket is not None and self._is_there:
            send_now(self._socket, encode(message))

    async def ask(self, question: Callable[[int], ToFront], timeout_s: float) -> None:
        """Return once it has answered, or will not."""
        if self._is_there:
            with contextlib.suppress(EngineDeadError):
                await self._questions.ask(question, timeout_s)

    async def drain(self, hurry: asyncio.Event) -> None:
        """Let it finish what runs, and end; at once when it is to `hurry`."""
        self._draining = True
        assert self._life is not None
        if not self._is_there:
            self._life.cancel()
        self.tell(Drain(hurry=False))
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait((hurrying, self._life), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        self.tell(Drain(hurry=True))
        await asyncio.wait((self._life,))

    async def stop(self) -> None:
        """End the process."""
        if self._life is not None:
            self._life.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._life
        self._context.term()

    async def _live(self) -> None:
        """Keep a process running until cancelled or drained, or the first one turns out unable to start."""
        failures = lives = 0
        while True:
            started = time.monotonic()
            name = f"front-{self._number}-{lives}"
            try:
                with socket_folder() as folder:
                    code = await self._run(name, folder)
            except Exception as error:
                logger.exception("the supervisor lost front %d", self._number)
                self._failure, how = FrontFailed(str(error) or repr(error), is_users=False), "could not be run"
            else:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            counts, self.counts = self.counts, None
            self._owner.on_front_gone(name, counts)
            if self._draining or not self._loaded.is_set():
                return
            lives, failures = lives + 1, 1 if time.monotonic() - started > _STEADY_S else failures + 1
            wait_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S)) - 1]
            logger.error("front %d %s; starting it again in %g s", self._number, how, wait_s)
            await asyncio.sleep(wait_s)

    async def _run(self, name: str, folder: Path) -> int:
        """One life of the process, until it ends; returns its exit code."""
        link = self._socket = self._context.socket(zmq.PAIR)
        process, code = None, 0
        try:
            link.set_hwm(0)
            address = f"ipc://{folder / 'front'}"
            link.bind(address)
            listening = [sock.fileno() for sock in self._listening]
            start = msgspec.structs.replace(self._start, name=name, address=address, listening=listening)
            process = spawn_front(listening)
            for sock in self._listening:
                sock.close()
            self._listening.clear()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died; that is seen below
                process.stdin.write(encode_start(start) + b"\n")
                process.stdin.flush()
            self._heard_at = time.monotonic()
            ending = asyncio.create_task(ended(process))
            receiving = asyncio.create_task(receive(link, self._take))
            watching = asyncio.create_task(self._watch())
            try:
                await asyncio.wait((receiving, ending, watching), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait((receiving,), timeout=_LAST_WORDS_S)
                if receiving.done():
                    receiving.result()
            finally:
                for task in (ending, receiving, watching):  # not its calls: what it asked for is done
                    task.cancel()
        finally:
            if process is not None:
                process.kill()
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                code = process.wait()
            self._socket, self._is_there = None, False
            link.close(linger=0)
            self._questions.fail(EngineDeadError(f"front {self._number} ended"))
        return code

    async def _watch(self) -> None:
        """Ask for its counts now and then; returns when it hangs."""
        while time.monotonic() - self._heard_at < (_HANG_S if self._is_there else _START_S):
            await asyncio.sleep(_LOOK_S)
            await self.ask(AskCounts, _HANG_S)
        logger.error("front %d does not answer and is killed", self._number)

    def _take(self, content: bytes) -> None:
        self._heard_at = time.monotonic()
        message = decode_from_front(content)
        if isinstance(message, Counts):
            self.counts = message.counts
            self._questions.answer(message.number, None)
        elif isinstance(message, FrontAnswer):
            self._questions.answer(message.number, None)
        elif isinstance(message, FrontUp):
            self._is_there = True
            self._owner.on_front(self)
        elif isinstance(message, Loaded):
            self._loaded.set()
        elif isinstance(message, FrontFailed):
            self._failure = message
        else:
            call = asyncio.create_task(self._do(message, self._socket))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _do(self, call: Call, asked: zmq.asyncio.Socket | None) -> None:
        try:
            answer: ToFront = CallAnswer(call.number, await self._owner.call(call.method, call.arguments))
        except Exception as error:
            if not isinstance(error, StepgraphError | APIError):
                logger.exception("%s failed", call.method)
            answer = CallFailed.of(call.number, error)
        if self._socket is asked:  # of another process, this may be the number of another call
            self.tell(answer)
