"""The engine as the front has it: starts its process, keeps it alive, and gives each request what comes back for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError, EngineDeadError, RequestError
from stepgraph.server.engine_observer import EngineState, Observer, RestartCause
from stepgraph.server.generation import Generation, Origin, RemoteRequest
from stepgraph.server.messages import (
    Abort,
    AbortAll,
    Accepted,
    Add,
    Answer,
    AskGraphs,
    Declined,
    Failed,
    ForgetAdapter,
    FromEngine,
    Pause,
    Progress,
    Question,
    Ready,
    Refused,
    Start,
    Stop,
    ToEngine,
    TokenUpdate,
    decode_from_engine,
    encode,
    encode_start,
    settings_of,
)
from stepgraph.server.questions import Questions
from stepgraph.server.rest import Dormancy, Rest
from stepgraph.server.socket_folder import remove_abandoned, socket_folder
from stepgraph.server.spawn import spawn_engine
from stepgraph.server.watchdog import Watchdog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Waits before the engine is started again; the last one repeats."""
_STEADY_S = 60.0
"""An engine that lived so long starts the back-off anew."""
_STOP_S = 10.0
"""How long the engine's process may take to end by itself."""
_LAST_WORDS_S = 0.2
"""How long to wait for what an ended process sent last."""
_NUM_RECENT = 64
"""Answers whose mean time says what the next ones will take."""
_ANSWER_S = 30.0
"""How long the engine may take to answer a question: longer than most steps."""
_STACKS_S = 0.5
"""How long an engine that hangs gets to write down where."""


class EngineClient:
    """Runs the engine in a process of its own. Belongs to one event loop.

    If the process dies, its requests fail with EngineDeadError and it is started again, later after each failure.

    Args:
        settings: of the engine, as `EngineConfig.from_settings` takes them.
        port: TCP port on loopback for the two processes to talk over; None is a local socket.
        hang_timeout_s: see `ServerConfig.engine_hang_timeout`.
        observer: hears of steps and requests.
        first_process: of `spawn_engine`, if it has been started already.
        progress: let the process show progress bars on stderr.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        port: int | None = None,
        hang_timeout_s: float | None = None,
        observer: Observer,
        first_process: subprocess.Popen[bytes] | None = None,
        progress: bool = False,
    ):
        self.state = EngineState.LOADING
        self.failure: Failed | None = None
        """Why the engine died last."""
        self.ready: Ready | None = None
        """What the running engine said of itself."""
        self._settings = dict(settings)
        self._port = port
        self._hang_timeout_s = hang_timeout_s
        self._observer = observer
        self._first_process = first_process
        self._progress = progress
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._generations: dict[str, Generation] = {}
        self._running: dict[str, tuple[Generation, RemoteRequest]] = {}  # by id of the engine's requests
        self._questions = Questions(self._send)
        self._recent_seconds: deque[float] = deque(maxlen=_NUM_RECENT)
        self._heard_at = time.monotonic()
        self._watchdog: Watchdog | None = None
        self._hung = False
        self._settled = asyncio.Event()  # it is known whether requests are served
        self.rest = Rest()
        """How the engine was brought to rest; whoever asks for that sets it."""
        self.weights: str | None = None
        """Folder of those that replaced the model's own; the next process starts with them."""
        self._dormancy = Dormancy()
        self._life: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Start the process; `wait_ready` waits for it to load."""
        await asyncio.to_thread(remove_abandoned)
        self._life = asyncio.create_task(self._live())

    async def wait_ready(self) -> None:
        """Wait until the engine takes requests, or is not going to.

        Raises:
            ConfigError: its settings or its model are unusable.
            EngineDeadError: it cannot start for another reason.
        """
        await self._settled.wait()
        if self.state is EngineState.FAILED:
            assert self.failure is not None
            kind = ConfigError if self.failure.is_users else EngineDeadError
            raise kind(self.failure.message)

    @property
    def num_unfinished(self) -> int:
        """Requests in the engine, one for each answer."""
        return len(self._running)

    @property
    def mean_request_s(self) -> float:
        """Mean time from arrival to end of the last answers that came to theirs; 1 while there are none."""
        return sum(self._recent_seconds) / len(self._recent_seconds) if self._recent_seconds else 1.0

    @property
    def trouble(self) -> str | None:
        """Why requests are not served now; None if they are."""
        if self.state is EngineState.LOADING:
            return "the model is being loaded"
        if self.is_dormant:
            return "the engine's process ended while it slept; POST /wake_up starts it"
        if self.state is EngineState.RESTARTING:
            reason = "" if self.failure is None else f" ({self.failure.message})"
            return f"the engine stopped{reason} and is being started again"
        if self.state is not EngineState.READY:
            return "the engine has stopped" + ("" if self.failure is None else f": {self.failure.message}")
        return None

    def submit(
        self,
        id: str,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerFast | None,
        *,
        priority: int = 0,
        adapter: str | None = None,
        bad_words: list[list[int]] | None = None,
        arrived_at: float,
        origin: Origin,
    ) -> Generation:
        """Send a prompt to the engine.

        Args:
            id: differs from that of every other generation.
            prompt, params, priority, adapter: see `AsyncEngine.generate`.
            bad_words: see `Engine.add_request`.
            tokenizer: the model's, for the answers' text.
            arrived_at: `time.monotonic()` seconds, from which waiting counts.
            origin: for traces.

        Raises:
            RequestError: it cannot be put into a message.
            EngineDeadError: the engine is not there.
        """
        ready = self._require_ready()
        assert id not in self._generations, id
        generation = Generation(self, id, prompt, params, tokenizer, arrived_at, origin, ready.end_token_ids)
        requests = [(one_id, settings_of(one.params)) for one_id, one in generation.requests.items()]
        message = Add(id, requests, prompt.token_ids, priority, prompt.cache_salt, adapter, bad_words)
        try:
            content = encode(message)
        except UnicodeEncodeError as error:
            raise RequestError("the request holds half of a surrogate pair, which is no text; leave it out") from error
        except OverflowError as error:
            raise RequestError("the request holds a whole number of more than 64 bits; give a smaller one") from error
        self._generations[id] = generation
        self._running.update((one_id, (generation, one)) for one_id, one in generation.requests.items())
        self._send_encoded(content)
        return generation

    def abort(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """End requests; nothing more is heard of them. `reason` is what they count as."""
        known = [request_id for request_id in request_ids if self._drop(request_id, reason)]
        if known:
            self._send(Abort(known))

    def leave(self, generation: Generation) -> None:
        """The reader of a generation has what it wants: end what still runs of it."""
        self._generations.pop(generation.id, None)
        self.abort(generation.requests)

    async def graphs(self) -> dict[str, Any]:
        """The captured graphs and their uses.

        Raises:
            EngineDeadError: the engine is not there, or does not answer.
        """
        graphs: dict[str, Any] = await self.ask(AskGraphs, _ANSWER_S)
        return graphs

    async def ask(self, question: Callable[[int], Question], timeout_s: float | None = None) -> Any:
        """The engine's answer; see `Questions.ask`. EngineDeadError if the engine is not there."""
        self._require_ready()
        return await self._questions.ask(question, timeout_s)

    def tell(self, message: ForgetAdapter | AbortAll) -> None:
        """Send what has no answer. An engine that is not there has nothing to forget or to end."""
        self._send(message)

    @property
    def is_dormant(self) -> bool:
        """Whether the process ended while it slept: then it is started when it is to wake up, as its memory was given away."""
        return self._dormancy.is_here

    async def start_dormant(self) -> None:
        """Start the process that ended asleep.

        Raises:
            EngineDeadError: it cannot start; it can be tried again.
        """
        await self._dormancy.end(self._settled)
        if self.state is not EngineState.READY:
            reason = "" if self.failure is None else f": {self.failure.message}"
            raise EngineDeadError(f"the engine's process cannot be started{reason}")

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
                    logger.exception("the front lost the engine")
                    self.failure = Failed(str(error) or repr(error), is_users=isinstance(error, ConfigError))
                if self.state is EngineState.LOADING:
                    self._change(EngineState.FAILED)
                    return
                if self.rest.sleep_level:
                    logger.warning("the engine's process ended while it slept; it is started when it is to wake up")
                    await self._dormancy.stay()
                    continue
                failures = 1 if time.monotonic() - started > _STEADY_S else failures + 1
                wait_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S)) - 1]
                reason = "" if self.failure is None else f": {self.failure.message}"
                logger.error("the engine stopped%s; starting it again in %g s", reason, wait_s)
                await asyncio.sleep(wait_s)
        finally:
            if self.state not in (EngineState.FAILED, EngineState.STOPPED):
                self._change(EngineState.STOPPED)

    async def _run_once(self) -> None:
        """One life of the process, until it ends."""
        with socket_folder() as folder:
            await self._run_in(folder)

    async def _run_in(self, folder: Path) -> None:
        self.failure, self._hung = None, False
        socket = self._socket = self._context.socket(zmq.PAIR)
        process = None
        try:
            start = self._bind(socket, folder)
            process, self._first_process = self._first_process or spawn_engine(), None
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died; that is seen below
                process.stdin.write(encode_start(start) + b"\n")
                process.stdin.flush()
            await self._listen(socket, process)
        finally:
            served = self.state is EngineState.READY
            if served:
                self._change(EngineState.STOPPED if self._stopping else EngineState.RESTARTING)
                if not self._stopping:
                    self._observer.on_restart(RestartCause.HUNG if self._hung else RestartCause.DIED)
            if self._hung:  # the system may take its time to end it
                assert self.failure is not None
                self._fail_all(f"the engine stopped: {self.failure.message}")
            code = None if process is None else await self._end(process, at_once=self._hung or not served)
            if self.failure is None:
                how = "was ended" if code is None or code >= 0 else f"was killed by signal {-code}"
                self.failure = Failed(f"its process {how}", is_users=False)
            self._socket = None
            socket.close(linger=0)
            self._fail_all(f"the engine stopped: {self.failure.message}")

    def _bind(self, socket: zmq.asyncio.Socket, folder: Path) -> Start:
        """Open the socket; returns what the process must know to connect."""
        socket.set_hwm(0)
        key = None
        if self._port is None:
            address = f"ipc://{folder / 'engine'}"
        else:
            address = f"tcp://127.0.0.1:{self._port}"
            public, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_server = True
            key = public.decode()
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"engine_worker_queue_port={self._port} cannot be opened: {error}; choose a free port, or leave it unset"
            ) from error
        return Start(address, self._settings, self._progress, key, self.weights)

    async def _listen(self, socket: zmq.asyncio.Socket, process: subprocess.Popen[bytes]) -> None:
        """Take in messages until the process ends, or hangs."""
        self._watchdog = Watchdog(process.pid, self._hang_timeout_s)
        ended = asyncio.create_task(asyncio.to_thread(process.wait))
        receiving = asyncio.create_task(self._receive(socket))
        hanging = asyncio.create_task(self._watch(process, self._watchdog))
        try:
            await asyncio.wait((receiving, ended, hanging), return_when=asyncio.FIRST_COMPLETED)
            if not hanging.done():
                await asyncio.wait((receiving,), timeout=_LAST_WORDS_S)
            if receiving.done():
                receiving.result()
        finally:
            ended.cancel()
            receiving.cancel()
            hanging.cancel()

    async def _watch(self, process: subprocess.Popen[bytes], watchdog: Watchdog) -> None:
        """Wait until the process hangs, and have it say where."""
        while not watchdog.look():
            await asyncio.sleep(watchdog.tick_s)
        what = "its start stands still" if self.state is not EngineState.READY else "it hung"
        self._hung = True
        self.failure = Failed(
            f"{what}: there was no sign of life from it for {watchdog.silent_s:.0f} s (engine_hang_timeout)",
            is_users=False,
        )
        if hasattr(signal, "SIGUSR1"):  # its process writes its threads' stacks to stderr, unless it is stopped
            process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(_STACKS_S)

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        """Take in messages, always all that are there: if the requests' readers are behind, each then finds several tokens at
        once, and is behind no longer."""
        while True:
            self._take(await socket.recv())
            with contextlib.suppress(zmq.Again):
                while True:
                    self._take(zmq.Socket.recv(socket, zmq.NOBLOCK))

    def _take(self, content: bytes) -> None:
        self._heard_at = time.monotonic()
        message: FromEngine = decode_from_engine(content)
        if self._watchdog is not None:
            self._watchdog.hear(message)
        if isinstance(message, Progress):
            self._observer.on_progress(message)
            for update in message.updates:
                self._take_update(update)
        elif isinstance(message, Accepted):
            accepted = self._generations.get(message.group)
            if accepted is not None:
                accepted.accept()
        elif isinstance(message, Refused):
            refused = self._generations.get(message.group)
            if refused is not None:
                for request_id in refused.requests:
                    self._drop(request_id, FinishReason.ERROR)
                refused.fail(message.error.error())
        elif isinstance(message, Answer | Declined):
            self._questions.take(message)
        elif isinstance(message, Ready):
            self.ready = message
            if self.rest.paused:  # before any request
                self._questions.tell(Pause)
            self._change(EngineState.READY)
        elif isinstance(message, Failed):
            self.failure = message

    def _take_update(self, update: TokenUpdate) -> None:
        running = self._running.get(update.id)
        if running is None:  # it was aborted meanwhile
            return
        generation, request = running
        if update.token_ids:
            if request.last_token_at is None:
                request.first_token_at = self._heard_at
                self._observer.on_first_token(self._heard_at - request.arrived_at)
            else:
                self._observer.on_token_gap(self._heard_at - request.last_token_at)
            request.last_token_at = self._heard_at
        request.take(update)
        generation.take(update)
        if update.finish_reason is not None:
            self._drop(update.id, FinishReason(update.finish_reason))

    def _drop(self, request_id: str, reason: FinishReason) -> bool:
        """A request has ended; False if it is not known (any more)."""
        running = self._running.pop(request_id, None)
        if running is not None:
            ended = running[1].ended(reason)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._recent_seconds.append(ended.ended_at - ended.arrived_at)
            self._observer.on_end(ended)
        return running is not None

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
                await asyncio.shield(asyncio.to_thread(process.wait))
            finally:
                killing.cancel()
                process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def _fail_all(self, message: str) -> None:
        error = EngineDeadError(message)
        generations, self._generations = self._generations, {}
        for request_id in tuple(self._running):
            self._drop(request_id, FinishReason.ERROR)
        for generation in generations.values():
            generation.fail(error)
        self._questions.fail(error)

    def _require_ready(self) -> Ready:
        if self.state is not EngineState.READY or self.ready is None:
            raise EngineDeadError(self.trouble or "the engine is not there")
        return self.ready

    def _change(self, state: EngineState) -> None:
        self.state = state
        if state in (EngineState.READY, EngineState.FAILED, EngineState.STOPPED):
            self._settled.set()
        else:
            self._settled.clear()
        self._observer.on_state(state)

    def _send(self, message: ToEngine) -> None:
        self._send_encoded(encode(message))

    def _send_encoded(self, content: bytes) -> None:
        """Never waits: the queue has no limit, the number of requests has."""
        if self._socket is None:
            return
        # zmq.Socket.send would be quicker, but may take in the signal that there is something to receive: nobody would hear of it
        sent = asyncio.ensure_future(self._socket.send(content, zmq.NOBLOCK))
        error = sent.exception()  # it is done already
        if error is not None and not isinstance(error, zmq.Again):
            raise error  # Again: the process is just ending; what runs fails when that is seen
