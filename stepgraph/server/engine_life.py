"""The life of one engine's process: started, watched, told what administrators ask, and started again when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from stepgraph.errors import ConfigError, EngineDeadError
from stepgraph.server.engine_observer import EngineListener, EngineState, EngineStatus, RestartCause
from stepgraph.server.messages import (
    Answer,
    Declined,
    Failed,
    FromEngine,
    Pause,
    Question,
    Ready,
    Start,
    Stop,
    ToEngine,
    decode_from_engine,
    encode,
    encode_start,
)
from stepgraph.server.questions import Questions
from stepgraph.server.rest import Dormancy, Rest
from stepgraph.server.socket_folder import socket_folder
from stepgraph.server.sockets import receive, send_now
from stepgraph.server.spawn import ALONE, Place, ended, spawn_engine
from stepgraph.server.watchdog import Watchdog

logger = logging.getLogger(__name__)

_BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Waits before the engine is started again; the last one repeats."""
_STEADY_S = 60.0
"""An engine that lived so long starts the back-off anew."""
_STOP_S = 10.0
"""How long the engine's process may take to end by itself."""
_LAST_WORDS_S = 0.2
"""How long to wait for what an ended process sent last."""
_STACKS_S = 0.5
"""How long an engine that hangs gets to write down where."""


@dataclass(frozen=True)
class Launch:
    """How an engine's process is started."""

    settings: Mapping[str, Any]
    """Of the engine, as `EngineConfig.from_settings` takes them."""
    port: int | None = None
    """TCP port on loopback for the process to connect to; None is a local socket."""
    place: Place = ALONE
    first_process: subprocess.Popen[bytes] | None = None
    """Of `spawn_engine`, if it has been started already."""
    hang_timeout_s: float | None = None
    """See `ServerConfig.engine_hang_timeout`."""
    progress: bool = False
    """Let the process show progress bars on stderr."""
    takes_fronts: bool = False
    """Front processes of their own connect to it."""


class EngineLife:
    """Runs one engine in a process of its own. Belongs to one event loop.

    If the process dies, that is told, and it is started again, later after each failure.

    Args:
        replica: its number.
        launch: how it is started.
        rest: how the engines were brought to rest; whoever asks for that sets it.
        listener: hears of all that becomes of it.
    """

    def __init__(self, replica: int, launch: Launch, rest: Rest, listener: EngineListener):
        self.replica = replica
        self.status = EngineStatus()
        self.weights: str | None = None
        """Folder of those that replaced the model's own; the next process starts with them."""
        self._launch = launch
        self._rest = rest
        self._listener = listener
        self._first_process = launch.first_process
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._questions: Questions[Question] = Questions(self._send)
        self._watchdog: Watchdog | None = None
        self._hung = False
        self._settled = asyncio.Event()  # it is known whether requests are served
        self._dormancy = Dormancy()
        self._life: asyncio.Task[None] | None = None
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; `wait_ready` waits for it to load."""
        self._life = asyncio.create_task(self._live())

    async def wait_ready(self) -> None:
        """Wait until the engine takes requests, or is not going to.

        Raises:
            ConfigError: its settings or its model are unusable.
            EngineDeadError: it cannot start for another reason.
        """
        await self._settled.wait()
        if self.status.state is EngineState.FAILED:
            assert self.status.failure is not None
            kind = ConfigError if self.status.failure.is_users else EngineDeadError
            raise kind(self.status.failure.message)

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests and questions."""
        return self.status.state is EngineState.READY

    async def ask(self, question: Callable[[int], Question], timeout_s: float | None = None) -> Any:
        """The engine's answer; see `Questions.ask`. EngineDeadError if the engine is not there."""
        if not self.is_ready:
            raise EngineDeadError(self.status.trouble or "the engine is not there")
        return await self._questions.ask(question, timeout_s)

    def tell(self, message: ToEngine) -> None:
        """Send what has no answer. An engine that is not there has nothing to forget or to end."""
        self._send(message)

    def send_encoded(self, content: bytes) -> None:
        """Never waits: the queue has no limit, the number of requests has."""
        if self._socket is not None:
            send_now(self._socket, content)  # if the process is just ending, what runs fails when that is seen

    async def start_dormant(self) -> None:
        """Start the process that ended asleep.

        Raises:
            EngineDeadError: it cannot start; it can be tried again.
        """
        await self._dormancy.end(self._settled)
        if not self.is_ready:
            reason = "" if self.status.failure is None else f": {self.status.failure.message}"
            raise EngineDeadError(f"the engine's process cannot be started{reason}")

    def replace(self) -> None:
        """Kill the process, to be started again: it could not do what the others did."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """End the process; what runs fails with EngineDeadError."""
        self._stopping = True
        if self._life is not None:
            self._life.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._life
        self._context.term()

    async def _live(self) -> None:
        """Keep a process running until cancelled, or the first one turns out unable to start."""
        failures = 0
        try:
            while True:
                started = time.monotonic()
                try:
                    await self._run_once()
                except Exception as error:
                    logger.exception("the supervisor lost %s", self._name)
                    self.status.failure = Failed(str(error) or repr(error), is_users=isinstance(error, ConfigError))
                if self.status.state is EngineState.LOADING:
                    self._change(EngineState.FAILED)
                    return
                if self._rest.sleep_level:
                    logger.warning("the engine's process ended while it slept; it is started when it is to wake up")
                    await self._stay_dormant()
                    continue
                failures = 1 if time.monotonic() - started > _STEADY_S else failures + 1
                wait_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S)) - 1]
                reason = "" if self.status.failure is None else f": {self.status.failure.message}"
                logger.error("%s stopped%s; starting it again in %g s", self._name, reason, wait_s)
                await asyncio.sleep(wait_s)
        finally:
            if self.status.state not in (EngineState.FAILED, EngineState.STOPPED):
                self._change(EngineState.STOPPED)

    @property
    def _name(self) -> str:
        return f"engine {self.replica}" if self._launch.place.is_one_of_many else "the engine"

    async def _stay_dormant(self) -> None:
        self.status.is_dormant = True
        self._listener.on_status(self.replica, self.status)
        try:
            await self._dormancy.stay()
        finally:
            self.status.is_dormant = False
        self._listener.on_status(self.replica, self.status)

    async def _run_once(self) -> None:
        """One life of the process, until it ends."""
        with socket_folder() as folder:
            await self._run_in(folder)

    async def _run_in(self, folder: Path) -> None:
        self.status.failure, self._hung = None, False
        socket = self._socket = self._context.socket(zmq.PAIR)
        process = None
        try:
            start = self._bind(socket, folder)
            process, self._first_process = self._first_process or spawn_engine(self._launch.place), None
            self._process = process
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died; that is seen below
                process.stdin.write(encode_start(start) + b"\n")
                process.stdin.flush()
            self.status.address = start.fronts
            await self._listen(socket, process)
        finally:
            served = self.is_ready
            if served:
                self._change(EngineState.STOPPED if self._stopping else EngineState.RESTARTING)
                if not self._stopping:
                    self._listener.on_restart(self.replica, RestartCause.HUNG if self._hung else RestartCause.DIED)
            if self._hung:  # the system may take its time to end it
                self._fail_all()
            code = None if process is None else await self._end(process, at_once=self._hung or not served)
            self._process = None
            if self.status.failure is None:
                how = "was ended" if code is None or code >= 0 else f"was killed by signal {-code}"
                self.status.failure = Failed(f"its process {how}", is_users=False)
            self._socket = None
            socket.close(linger=0)
            self._fail_all()

    def _bind(self, socket: zmq.asyncio.Socket, folder: Path) -> Start:
        """Open the socket; returns what the process must know to connect."""
        socket.set_hwm(0)
        key, port = None, self._launch.port
        if port is None:
            address = f"ipc://{folder / 'engine'}"
        else:
            address = f"tcp://127.0.0.1:{port}"
            public, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_server = True
            key = public.decode()
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"engine_worker_queue_port={port} cannot be opened: {error}; choose a free port, or leave it unset"
            ) from error
        fronts = f"ipc://{folder / 'fronts'}" if self._launch.takes_fronts else None
        return Start(address, dict(self._launch.settings), self._launch.progress, key, self.weights, fronts)

    async def _listen(self, socket: zmq.asyncio.Socket, process: subprocess.Popen[bytes]) -> None:
        """Take in messages until the process ends, or hangs."""
        self._watchdog = Watchdog(process.pid, self._launch.hang_timeout_s)
        ending = asyncio.create_task(ended(process))
        receiving = asyncio.create_task(receive(socket, self._take))
        hanging = asyncio.create_task(self._watch(process, self._watchdog))
        try:
            await asyncio.wait((receiving, ending, hanging), return_when=asyncio.FIRST_COMPLETED)
            if not hanging.done():
                await asyncio.wait((receiving,), timeout=_LAST_WORDS_S)
            if receiving.done():
                receiving.result()
        finally:
            ending.cancel()
            receiving.cancel()
            hanging.cancel()

    async def _watch(self, process: subprocess.Popen[bytes], watchdog: Watchdog) -> None:
        """Wait until the process hangs, and have it say where."""
        while not watchdog.look():
            await asyncio.sleep(watchdog.tick_s)
        what = "its start stands still" if not self.is_ready else "it hung"
        self._hung = True
        self.status.failure = Failed(
            f"{what}: there was no sign of life from it for {watchdog.silent_s:.0f} s (engine_hang_timeout)",
            is_users=False,
        )
        if hasattr(signal, "SIGUSR1"):  # its process writes its threads' stacks to stderr, unless it is stopped
            process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(_STACKS_S)

    def _take(self, content: bytes) -> None:
        message: FromEngine = decode_from_engine(content)
        if self._watchdog is not None:
            self._watchdog.hear(message)
        if isinstance(message, Answer):
            self._questions.answer(message.number, message.content)
        elif isinstance(message, Declined):
            self._questions.decline(message.number, message.error.error())
        elif isinstance(message, Ready):
            self.status.ready = message
            if self._rest.paused:  # before any request
                self._questions.tell(Pause)
            self._change(EngineState.READY)
        elif isinstance(message, Failed):
            self.status.failure = message
        else:
            self._listener.on_message(self.replica, message)

    async def _end(self, process: subprocess.Popen[bytes], *, at_once: bool) -> int:
        """See to it that the process ends, `at_once` if it has nothing to finish; returns its exit code."""
        assert process.stdin is not None
        if process.poll() is None:
            if at_once:
                process.kill()
            else:
                self._send(Stop())
            killing = asyncio.get_running_loop().call_later(_STOP_S, process.kill)
            try:
                await asyncio.shield(ended(process))
            finally:
                killing.cancel()
                process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def _fail_all(self) -> None:
        assert self.status.failure is not None
        reason = f"the engine stopped: {self.status.failure.message}"
        self._questions.fail(EngineDeadError(reason))
        self._listener.on_status(self.replica, self.status)
        self._listener.on_end(self.replica, reason)

    def _change(self, state: EngineState) -> None:
        self.status.state = state
        if state in (EngineState.READY, EngineState.FAILED, EngineState.STOPPED):
            self._settled.set()
        else:
            self._settled.clear()
        self._listener.on_status(self.replica, self.status)

    def _send(self, message: ToEngine) -> None:
        self.send_encoded(encode(message))
