"""The engine's process: one loop that takes requests from a socket, runs steps, and sends what they gave.

Started by `engine_life`, which alone talks to it unless fronts have processes of their own. Sending never waits for them, and
nothing here tokenises or writes JSON. The process ends when its standard input does: whoever started it is gone then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
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
from stepgraph.engine.request import FinishReason, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError, EngineDeadError, Fault, ModelError, RequestError, StepgraphError
from stepgraph.lifeline import end_with_parent
from stepgraph.models.adapters import AdapterFile
from stepgraph.server.engine_control import EngineControl
from stepgraph.server.engine_report import first_token, graphs_of, load_of, ranks_of, ready_of, step_info
from stepgraph.server.messages import (
    Abort,
    AbortAll,
    Accepted,
    Add,
    Answer,
    AskGraphs,
    AskRanks,
    Beat,
    Declined,
    Failed,
    ForgetAdapter,
    FrontGone,
    Load,
    LoadAdapter,
    Pause,
    Progress,
    Question,
    Refused,
    Sleep,
    Start,
    StepInfo,
    Stop,
    ToEngine,
    TokenUpdate,
    Watch,
    decode_start,
    encode,
)
from stepgraph.server.peers import SUPERVISOR, Peers
from stepgraph.server.step_reporter import StepReporter
from stepgraph.server.transfer_report import TransferReport

logger = logging.getLogger(__name__)

_LAST_WORD_MS = 5000  # how long the last message may take to leave
_BEAT_S = 0.5  # the supervisor hears of the loop at least so often, but for what takes longer by itself
_MAX_MESSAGES = 128  # of a turn: a burst of requests holds up those that run for a few milliseconds at a time
_READING_S = 0.01  # the loop looks so often whether an adapter has been read
_USER_ERROR, _FAILURE = 2, 1


class EngineProcess:
    """An engine and the sockets it is driven by."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], fronts: zmq.Socket[bytes] | None = None):
        self._engine = engine
        self._peers = Peers(socket, fronts)
        self._steps: list[StepInfo] = []
        self._num_sent: dict[str, int] = {}  # of each unfinished request: output tokens that were sent
        self._owners: dict[str, bytes] = {}  # of each unfinished request: the peer that asked for it
        self._adapters = AdapterReader(engine.read_adapter)
        self._awaiting: list[tuple[bytes, Add | LoadAdapter, Future[AdapterFile]]] = []  # until their adapter is read
        self._control = EngineControl(engine, self._send)
        self._transfers = TransferReport(engine.exchange)
        self._reporter = StepReporter(engine, self._send)
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
                time.monotonic() - self._peers.sent_at >= _BEAT_S
            ):  # by this thread: another one would beat on while this one hangs
                self._send(Beat())
            received, num_received = self._receive(), 0
            while received is not None:
                peer, message = received
                if isinstance(message, Stop):
                    return
                self._obey(peer, message)
                num_received += 1
                received = self._peers.receive() if num_received < _MAX_MESSAGES else None
            if self._awaiting:
                self._go_on_awaiting()
            updates = self._engine.step() if self._engine.has_work else []
            self._tell(updates)

    def _receive(self) -> tuple[bytes, ToEngine] | None:
        """The next message and whose it is; waits for one while the engine has nothing to do, until the next beat."""
        wait_s = 0.0
        if not self._engine.has_work:
            wait_s = 0.0 if self._engine.prepare() else _BEAT_S
        elif (seconds := self._engine.seconds_until_work) is not None:
            wait_s = min(seconds, _BEAT_S)
        if self._awaiting:
            wait_s = min(wait_s, _READING_S)
        if wait_s and not self._peers.poll(wait_s):
            return None
        return self._peers.receive()

    def _obey(self, peer: bytes, message: ToEngine) -> None:
        if isinstance(message, Add):
            self._add(peer, message, message.adapter)
        elif isinstance(message, Abort):
            for _, awaiting, _ in self._awaiting:
                if isinstance(awaiting, Add):
                    awaiting.requests = [request for request in awaiting.requests if request[0] not in message.ids]
            self._abort(message.ids)
        elif isinstance(message, FrontGone):
            self._peers.forget(gone := message.front.encode())
            self._awaiting = [awaiting for awaiting in self._awaiting if awaiting[0] != gone]
            self._abort([request_id for request_id, owner in self._owners.items() if owner == gone])
        elif isinstance(message, AbortAll):
            ends = [self._engine.abort(request_id) for request_id in self._num_sent]
            self._tell([end for end in ends if end is not None])
            self._end_awaiting()
        elif isinstance(message, ForgetAdapter):
            with contextlib.suppress(RequestError):  # there is none to forget
                self._engine.forget_adapter(message.folder)
        elif isinstance(message, Watch):
            self._reporter.go_on(message)
        elif isinstance(message, Question):
            self._answer(message)

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._engine.abort(request_id) is not None:
                del self._num_sent[request_id], self._owners[request_id]

    def _answer(self, question: Question) -> None:
        try:
            if isinstance(question, LoadAdapter):
                if question.anew or not self._engine.holds_adapter(question.folder):
                    self._awaiting.append(
                        (SUPERVISOR, question, self._adapters.ask(question.folder, anew=question.anew))
                    )
                    return
                content: Any = None
            elif isinstance(question, AskGraphs):
                content = graphs_of(self._engine)
            elif isinstance(question, AskRanks):
                content = ranks_of(self._engine)
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

    def _add(self, peer: bytes, message: Add, adapter: str | AdapterFile | None) -> None:
        added: list[str] = []
        try:
            if isinstance(adapter, str) and not self._engine.holds_adapter(adapter):
                self._awaiting.append((peer, message, self._adapters.ask(adapter)))
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
                    transfer=message.offer or message.reference,
                )
                added.append(request_id)
        except Exception as error:
            for request_id in added:
                self._engine.abort(request_id)
            if isinstance(error, EngineDeadError):
                raise
            self._refuse(peer, message, error)
        else:
            self._num_sent.update(dict.fromkeys(added, 0))
            self._owners.update(dict.fromkeys(added, peer))
            self._peers.send(peer, Accepted(message.group))

    def _go_on_awaiting(self) -> None:
        """Do what waited for an adapter that has been read."""
        done = [awaiting for awaiting in self._awaiting if awaiting[-1].done()]
        self._awaiting = [awaiting for awaiting in self._awaiting if not awaiting[-1].done()]
        for peer, message, future in done:
            error = future.exception()
            if isinstance(message, LoadAdapter):
                if error is None:
                    self._control.keep(message, future.result())
                    self._send(Answer(message.number))
                else:
                    self._decline(message, error)
            elif error is not None:
                self._refuse(peer, message, error)
            elif message.requests:  # some are left
                self._add(peer, message, future.result())

    def _end_awaiting(self) -> None:
        """End the requests that wait for their adapter, as those in the engine are."""
        for peer, message, _ in self._awaiting:
            if isinstance(message, Add) and message.requests:
                self._peers.send(peer, Accepted(message.group))
                ends = [TokenUpdate(request_id, (), str(FinishReason.ABORT)) for request_id, _ in message.requests]
                self._peers.send(peer, Progress(ends, [], self._load()))
                message.requests = []

    def _decline(self, question: Question, error: BaseException) -> None:
        fault = Fault.of(error)
        if not fault.is_users:
            logger.error("%s failed", type(question).__name__, exc_info=error)
        self._send(Declined(question.number, fault))

    def _refuse(self, peer: bytes, message: Add, error: BaseException) -> None:
        fault = Fault.of(error)
        if not fault.is_users:
            logger.error("request %s could not be queued", message.group, exc_info=error)
        self._peers.send(peer, Refused(message.group, fault))

    def _on_step(self, report: StepReport) -> None:
        self._steps.append(step_info(report))

    def _tell(self, updates: Sequence[RequestUpdate]) -> None:
        by_peer: dict[bytes, list[TokenUpdate]] = {}
        for update in updates:
            by_peer.setdefault(self._owners[update.request.id], []).append(self._update(update))
        steps, self._steps = self._steps, []
        self._peers.tell(by_peer, steps, self._load(), at_once=not self._engine.has_work)
        if self._reporter.is_on:
            self._reporter.tell(at_once=not self._engine.has_work)

    def _load(self) -> Load:
        awaited = {message.adapter for _, message, _ in self._awaiting if isinstance(message, Add) and message.requests}
        folders = tuple(sorted(os.path.abspath(folder) for folder in awaited if folder is not None))
        return load_of(self._engine, self._transfers.load(), folders)

    def _update(self, update: RequestUpdate) -> TokenUpdate:
        request, num_sent = update.request, self._num_sent[update.request.id]
        num_known = num_sent + len(update.new_token_ids)
        logprobs = None if request.params.logprobs is None else request.output_logprobs[num_sent:num_known]
        message = TokenUpdate(request.id, update.new_token_ids, logprobs=logprobs)
        if request.num_draft_tokens:
            message.num_draft_tokens = request.num_draft_tokens
            message.num_accepted = request.num_accepted(num_known) - request.num_accepted(num_sent)
        if num_sent == 0:
            message.first = first_token(request)
        if update.finish_reason is None:
            self._num_sent[request.id] = num_known
        else:
            del self._num_sent[request.id], self._owners[request.id]
            message.finish_reason, message.error = str(update.finish_reason), request.error
            message.stop_token, message.kv_transfer_params = request.stop_token, request.kv_transfer_params
        return message

    def _send(self, message: Any) -> None:
        self._peers.send(SUPERVISOR, message)


def main() -> int:
    """Entry point of the process; returns its exit code."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("stepgraph").setLevel(engine_log_level())
    first_line = sys.stdin.buffer.readline()
    if not first_line:  # whoever started it is gone already
        return 0
    start = decode_start(first_line)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # the supervisor asks where an engine hangs before it kills it
    end_with_parent()
    context = zmq.Context()
    socket = _connect(context, start)
    fronts = None if start.fronts is None else _listen(context, start.fronts)
    try:
        return _serve(start, socket, fronts)
    finally:
        socket.close(linger=_LAST_WORD_MS)
        if fronts is not None:
            fronts.close(linger=0)
        context.term()


def _serve(start: Start, socket: zmq.Socket[bytes], fronts: zmq.Socket[bytes] | None) -> int:
    try:
        engine = build_engine(EngineConfig.from_settings(**start.settings), progress=start.progress)
        process = EngineProcess(engine, socket, fronts)
        if start.weights is not None:
            process.update_weights(start.weights)
    except (ConfigError, ModelError) as error:
        socket.send(encode(Failed(str(error), is_users=True)))
        return _USER_ERROR
    except Exception as error:
        _log("the engine cannot start", error)
        socket.send(encode(Failed(str(error) or repr(error), is_users=False)))
        return _FAILURE
    gc.collect()
    gc.freeze()  # model, graphs and buffers live as long as the process: later collections need not visit them
    socket.send(encode(ready_of(engine)))
    try:
        process.run()
    except StepgraphError as error:
        _log("the engine stopped", error)
        socket.send(encode(Failed(str(error), is_users=False)))
        return _FAILURE
    engine.shutdown()
    return 0


def _log(what: str, error: Exception) -> None:
    """Where it came from, unless it says itself what happened."""
    says_it = isinstance(error, StepgraphError) and error.__cause__ is None
    logger.error("%s: %s", what, error, exc_info=None if says_it else error)


def _connect(context: zmq.Context[Any], start: Start) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    if start.curve_server_key is not None:
        public, secret = zmq.curve_keypair()
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_serverkey = start.curve_server_key.encode()
    socket.connect(start.address)
    return socket


def _listen(context: zmq.Context[Any], address: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.bind(address)
    return socket


if __name__ == "__main__":
    sys.exit(main())
