"""The engine's process: one loop that takes requests from a socket, runs steps, and sends what they gave.

Started by `engine_client`, which alone talks to it. Sending never waits for the front, and nothing here tokenises or writes
JSON. The process ends when its standard input does: whoever started it is gone then.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import zmq

from stepgraph.config import EngineConfig
from stepgraph.config.server import engine_log_level
from stepgraph.engine.adapter_reader import AdapterReader
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.reports import StepReport
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError, EngineDeadError, Fault, ModelError, RequestError, StepgraphError
from stepgraph.models.adapters import AdapterFile
from stepgraph.server.engine_control import EngineControl
from stepgraph.server.messages import (
    Abort,
    AbortAll,
    Accepted,
    Add,
    Answer,
    AskGraphs,
    Beat,
    Declined,
    Failed,
    FirstToken,
    ForgetAdapter,
    Load,
    LoadAdapter,
    Pause,
    Progress,
    Question,
    Ready,
    Refused,
    Sleep,
    Start,
    StepInfo,
    Stop,
    ToEngine,
    TokenUpdate,
    decode_start,
    decode_to_engine,
    encode,
)

logger = logging.getLogger(__name__)

_LAST_WORD_MS = 5000  # how long the last message may take to leave
_BEAT_S = 0.5  # the front hears of the loop at least so often, but for what takes longer by itself
_READING_S = 0.01  # the loop looks so often whether an adapter has been read
_USER_ERROR, _FAILURE = 2, 1
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


class EngineProcess:
    """An engine and the socket it is driven by."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]):
        self._engine = engine
        self._socket = socket
        self._steps: list[StepInfo] = []
        self._num_sent: dict[str, int] = {}  # of each unfinished request: output tokens that were sent
        self._last_load: Load | None = None
        self._sent_at = 0.0
        self._adapters = AdapterReader(engine.read_adapter)
        self._awaiting: list[tuple[Add | LoadAdapter, Future[AdapterFile]]] = []  # until their adapter is read
        self._control = EngineControl(engine, self._send)
        engine.on_step = self._on_step
        engine.executor.watch_captures(lambda: self._send(Beat(captures=True)))

    def update_weights(self, folder: str) -> None:
        """Replace the model's own weights, before it serves. ModelError if they do not fit."""
        self._control.update_weights(folder)

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            EngineDeadError: a step failed.
        """
        self._tell([])  # what was captured at start
        while True:
            if (
                time.monotonic() - self._sent_at >= _BEAT_S
            ):  # by this thread: another one would beat on while this one hangs
                self._send(Beat())
            message = self._receive()
            while message is not None:
                if isinstance(message, Stop):
                    return
                self._obey(message)
                message = self._receive_now()
            if self._awaiting:
                self._go_on_awaiting()
            updates = self._engine.step() if self._engine.has_work else []
            self._tell(updates)

    def _receive(self) -> ToEngine | None:
        """The next message; waits for one while the engine has nothing to do, until the next beat."""
        wait_s = 0.0
        if not self._engine.has_work:
            wait_s = 0.0 if self._engine.prepare() else _BEAT_S
        elif (seconds := self._engine.seconds_until_work) is not None:
            wait_s = min(seconds, _BEAT_S)
        if self._awaiting:
            wait_s = min(wait_s, _READING_S)
        if wait_s and not self._socket.poll(max(1, int(wait_s * 1e3)), zmq.POLLIN):
            return None
        return self._receive_now()

    def _receive_now(self) -> ToEngine | None:
        try:
            return decode_to_engine(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def _obey(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            self._add(message, message.adapter)
        elif isinstance(message, Abort):
            for awaiting, _ in self._awaiting:
                if isinstance(awaiting, Add):
                    awaiting.requests = [request for request in awaiting.requests if request[0] not in message.ids]
            for request_id in message.ids:
                if self._engine.abort(request_id) is not None:
                    del self._num_sent[request_id]
        elif isinstance(message, AbortAll):
            ends = [self._engine.abort(request_id) for request_id in self._num_sent]
            self._tell([end for end in ends if end is not None])
            self._end_awaiting()
        elif isinstance(message, ForgetAdapter):
            with contextlib.suppress(RequestError):  # there is none to forget
                self._engine.forget_adapter(message.folder)
        elif isinstance(message, Question):
            self._answer(message)

    def _answer(self, question: Question) -> None:
        try:
            if isinstance(question, LoadAdapter):
                if question.anew or not self._engine.holds_adapter(question.folder):
                    self._awaiting.append((question, self._adapters.ask(question.folder, anew=question.anew)))
                    return
                content: Any = None
            elif isinstance(question, AskGraphs):
                content = graphs_of(self._engine)
            else:
                content = self._control.obey(question)
                if isinstance(question, Pause | Sleep):
                    while self._engine.has_work:  # steps under way, and what they gave
                        self._tell(self._engine.step())
        except EngineDeadError:
            raise
        except Exception as error:
            self._decline(question, error)
        else:
            self._send(Answer(question.number, content))

    def _add(self, message: Add, adapter: str | AdapterFile | None) -> None:
        added: list[str] = []
        try:
            if isinstance(adapter, str) and not self._engine.holds_adapter(adapter):
                self._awaiting.append((message, self._adapters.ask(adapter)))
                return
            for request_id, settings in message.requests:
                self._engine.add_request(
                    request_id,
                    message.prompt_token_ids,
                    SamplingParams(**settings),
                    priority=message.priority,
                    cache_salt=message.cache_salt,
                    adapter=adapter,
                    bad_words=message.bad_words,
                )
                added.append(request_id)
        except Exception as error:
            for request_id in added:
                self._engine.abort(request_id)
            if isinstance(error, EngineDeadError):
                raise
            self._refuse(message, error)
        else:
            self._num_sent.update(dict.fromkeys(added, 0))
            self._send(Accepted(message.group))

    def _go_on_awaiting(self) -> None:
        """Do what waited for an adapter that has been read."""
        done = [(message, future) for message, future in self._awaiting if future.done()]
        self._awaiting = [(message, future) for message, future in self._awaiting if not future.done()]
        for message, future in done:
            error = future.exception()
            if isinstance(message, LoadAdapter):
                if error is None:
                    self._control.keep(message, future.result())
                    self._send(Answer(message.number))
                else:
                    self._decline(message, error)
            elif error is not None:
                self._refuse(message, error)
            elif message.requests:  # some are left
                self._add(message, future.result())

    def _end_awaiting(self) -> None:
        """End the requests that wait for their adapter, as those in the engine are."""
        ends: list[TokenUpdate] = []
        for message, _ in self._awaiting:
            if isinstance(message, Add) and message.requests:
                self._send(Accepted(message.group))
                ends += [TokenUpdate(request_id, (), str(FinishReason.ABORT)) for request_id, _ in message.requests]
                message.requests = []
        if ends:
            self._send(Progress(ends, [], load_of(self._engine)))

    def _decline(self, question: Question, error: BaseException) -> None:
        fault = Fault.of(error)
        if not fault.is_users:
            logger.error("%s failed", type(question).__name__, exc_info=error)
        self._send(Declined(question.number, fault))

    def _refuse(self, message: Add, error: BaseException) -> None:
        fault = Fault.of(error)
        if not fault.is_users:
            logger.error("request %s could not be queued", message.group, exc_info=error)
        self._send(Refused(message.group, fault))

    def _on_step(self, report: StepReport) -> None:
        record = report.record
        self._steps.append(
            StepInfo(
                str(record.kind),
                record.shape.variant.name.lower(),
                record.shape.num_tokens,
                record.shape.num_rows,
                record.shape.num_drafts,
                record.num_tokens,
                None if record.eager_reason is None else str(record.eager_reason),
                report.seconds,
                report.host_seconds,
            )
        )

    def _tell(self, updates: Sequence[RequestUpdate]) -> None:
        load = load_of(self._engine)
        if not (updates or self._steps) and load == self._last_load:
            return
        self._send(Progress([self._update(update) for update in updates], self._steps, load))
        self._steps, self._last_load = [], load

    def _update(self, update: RequestUpdate) -> TokenUpdate:
        request, num_sent = update.request, self._num_sent[update.request.id]
        num_known = num_sent + len(update.new_token_ids)
        logprobs = None if request.params.logprobs is None else request.output_logprobs[num_sent:num_known]
        message = TokenUpdate(request.id, update.new_token_ids, logprobs=logprobs)
        message.num_draft_tokens = request.num_draft_tokens
        message.num_accepted = request.num_accepted(num_known) - request.num_accepted(num_sent)
        if num_sent == 0:
            message.first = _first_token(request)
        if update.finish_reason is None:
            self._num_sent[request.id] = num_known
        else:
            del self._num_sent[request.id]
            message.finish_reason, message.error = str(update.finish_reason), request.error
            message.stop_token = request.stop_token
        return message

    def _send(self, message: Any) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)  # the queue has no limit: it never waits
        self._sent_at = time.monotonic()


def load_of(engine: Engine) -> Load:
    """How full an engine is."""
    scheduler, executor = engine.scheduler, engine.executor
    graphs = executor.graph_counts()
    counts, speculation = scheduler.statistics, engine.speculation
    return Load(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        kv_usage=1 - scheduler.num_free_blocks / (executor.specs.num_kv_blocks - 1),
        preemptions=counts.preemptions,
        prompt_tokens=counts.prompt_tokens,
        cached_prompt_tokens=counts.cached_prompt_tokens,
        num_graphs=graphs.num_graphs,
        graph_bytes=graphs.bytes,
        capture_seconds=graphs.capture_seconds,
        failed_captures=graphs.failed_captures,
        num_grammars=engine.grammars.num_processes,
        grammar_bytes=engine.grammars.num_bytes,
        drafts=speculation.num_drafts,
        draft_tokens=speculation.num_draft_tokens,
        saved_steps=speculation.num_saved_steps,
        accepted_per_position=tuple(speculation.num_accepted_per_position[: engine.config.speculative.max_drafts]),
    )


def graphs_of(engine: Engine) -> dict[str, Any]:
    """The captured graphs as `/graphs` shows it."""
    executor = engine.executor
    statistics, counts = executor.statistics, executor.graph_counts()
    return {
        "backend": executor.specs.graph_backend,
        "steps": statistics.num_steps,
        "eager_steps": statistics.num_eager_steps,
        "eager_reasons": _eager_reasons(engine),
        "real_tokens": statistics.real_tokens,
        "padding_tokens": statistics.padding_tokens,
        "bytes": counts.bytes,
        "failed_captures": counts.failed_captures,
        "token_sizes": list(executor.specs.token_sizes),
        "graphs": [
            {
                "num_tokens": record.shape.num_tokens,
                "num_rows": record.shape.num_rows,
                "num_drafts": record.shape.num_drafts,
                "variant": record.shape.variant.name.lower(),
                "capture_ms": round(record.capture_ms, 3),
                "bytes": record.bytes,
                "uses": record.uses,
                "real_tokens": record.real_tokens,
                "padding_tokens": record.padding_tokens,
            }
            for record in executor.graph_records()
        ],
    }


def _eager_reasons(engine: Engine) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for (_, reason), count in engine.executor.statistics.steps.items():
        if reason is not None:
            reasons[str(reason)] = reasons.get(str(reason), 0) + count
    return reasons


def _first_token(request: Request) -> FirstToken:
    return FirstToken(
        request.admitted_at,
        request.num_cached_tokens,
        None if request.params.prompt_logprobs is None else request.prompt_logprobs,
    )


def main() -> int:
    """Entry point of the process; returns its exit code."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("stepgraph").setLevel(engine_log_level())
    first_line = sys.stdin.buffer.readline()
    if not first_line:  # whoever started it is gone already
        return 0
    start = decode_start(first_line)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # the front asks where an engine hangs before it kills it
    if (
        sys.platform == "linux"
    ):  # the thread below is of no use to a process that is stopped, or that hangs with Python's lock
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_the_front, name="stepgraph-lifeline", daemon=True).start()
    context = zmq.Context()
    socket = _connect(context, start)
    try:
        return _serve(start, socket)
    finally:
        socket.close(linger=_LAST_WORD_MS)
        context.term()


def _serve(start: Start, socket: zmq.Socket[bytes]) -> int:
    try:
        engine = build_engine(EngineConfig.from_settings(**start.settings), progress=start.progress)
        process = EngineProcess(engine, socket)
        if start.weights is not None:
            process.update_weights(start.weights)
    except (ConfigError, ModelError) as error:
        socket.send(encode(Failed(str(error), is_users=True)))
        return _USER_ERROR
    except Exception as error:
        logger.exception("the engine cannot start")
        socket.send(encode(Failed(str(error) or repr(error), is_users=False)))
        return _FAILURE
    gc.collect()
    gc.freeze()  # model, graphs and buffers live as long as the process: later collections need not visit them
    socket.send(encode(_ready(engine)))
    try:
        process.run()
    except StepgraphError as error:
        logger.exception("the engine stopped")
        socket.send(encode(Failed(str(error), is_users=False)))
        return _FAILURE
    engine.shutdown()
    return 0


def _connect(context: zmq.Context[Any], start: Start) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    if start.curve_server_key is not None:
        public, secret = zmq.curve_keypair()
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_serverkey = start.curve_server_key.encode()
    socket.connect(start.address)
    return socket


def _ready(engine: Engine) -> Ready:
    specs = engine.executor.specs
    return Ready(
        max_model_len=specs.max_model_len,
        max_num_seqs=engine.config.scheduler.max_num_seqs,
        backend=specs.graph_backend,
        device=specs.platform,
        precision=specs.precision,
        num_kv_blocks=specs.num_kv_blocks,
        block_size=specs.block_size,
        max_drafts=engine.config.speculative.max_drafts,
        end_token_ids=engine.end_token_ids,
        longest_step_s=specs.longest_step_s,
    )


def _end_with_the_front() -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):  # past Python's buffer, whose lock would be in the way at exit
            pass
    os._exit(0)  # a step may be running, and nobody is left to hear of it


if __name__ == "__main__":
    sys.exit(main())
