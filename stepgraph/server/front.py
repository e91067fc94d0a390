"""An HTTP front: from open ports to the last reply."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import uvicorn

from stepgraph.config import EngineConfig
from stepgraph.config.server import ServerConfig
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.server.app import create_app, create_metrics_app
from stepgraph.server.connections import Connection, Connections, Limits
from stepgraph.server.control import Control
from stepgraph.server.conversation import ChatForm
from stepgraph.server.counts import FrontCounts, RequestCounts
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.engine_life import Launch
from stepgraph.server.generation import EndedRequest
from stepgraph.server.log_limit import LogLimit, is_refused_access, shorten_path
from stepgraph.server.replicas import Replicas
from stepgraph.server.rest import Rest
from stepgraph.server.service import ServedModel, Service
from stepgraph.server.supervisor import OneFront, Supervisor
from stepgraph.server.tracing import Tracer, create_tracer

logger = logging.getLogger(__name__)

_MAX_OPERATORS = 64
"""Connections of the metrics' port."""
_GOODBYE_S = 2
"""What replies that are being sent get to finish, once there is nothing left to compute."""
_POLL_S = 0.05
_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""
_LARGE_BLOCK_BYTES = 512 * 1024


@dataclass(frozen=True)
class Front:
    """What is settled before anything is loaded."""

    engine_config: EngineConfig
    config: ServerConfig
    api_keys: tuple[str, ...]
    chat_template: str | None
    """Text that replaces the model's."""
    listening: socket.socket | None
    """None: another program takes requests, and hands them to the application."""
    metrics_listening: socket.socket | None
    max_connections: int
    """Of the API's port."""
    started_at: float
    """`time.monotonic()` seconds."""


def _give_back_large_blocks() -> None:
    """What large bodies took goes back to the system. By itself, glibc keeps blocks up to the size of the largest it has seen."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


class HttpFront:
    """HTTP in front of the engines. Belongs to one event loop.

    Args:
        front: what is settled.
        sends: for each engine, what sends it an encoded message.
        control: the way to whoever owns the engines.
        rest, adapters: how these are brought to rest, and folders of LoRA adapters by the names that requests can give; others
            change both.
        shared: the engines have other fronts, too.
    """

    def __init__(
        self,
        front: Front,
        sends: Sequence[Callable[[bytes], None]],
        control: Control,
        rest: Rest,
        adapters: Mapping[str, str],
        *,
        shared: bool = False,
    ):
        config = self._config = front.config
        self._tracer = None if config.otlp_traces_endpoint is None else create_tracer(config.otlp_traces_endpoint)
        self._counts = FrontCounts.of(len(sends))
        observers = [
            counts if self._tracer is None else _Traced(counts, self._tracer) for counts in self._counts.engines
        ]
        clients = [EngineClient(send, each, shared=shared) for send, each in zip(sends, observers, strict=True)]
        self.replicas = Replicas(
            clients,
            rest,
            max_adapters=front.engine_config.lora.max_loras,
            keeps_prefixes=front.engine_config.cache.enable_prefix_caching,
            min_remote_prefill_tokens=config.min_remote_prefill_tokens,
        )
        self.service = Service(config, self.replicas, lambda: _served_model(front), control, adapters, self._counts)
        self._connections = Connections(Limits.of(config), front.max_connections)
        self.app = create_app(self.service, api_keys=front.api_keys)
        self._servers = []
        if front.listening is not None:
            self._servers.append((_server(self.app, config, self._connections), front.listening))
        if front.metrics_listening is not None:
            of_operators = Connections(Limits.of(config), _MAX_OPERATORS)
            self._servers.append(
                (_server(create_metrics_app(self.service), config, of_operators), front.metrics_listening)
            )
        self.tasks: list[asyncio.Task[None]] = []
        """The servers, once they run."""

    def start(self) -> None:
        """Listen."""
        if self._config.log_requests:
            logging.getLogger("stepgraph.server.requests").setLevel(logging.INFO)
        _limit_logs()
        self.tasks = [asyncio.create_task(server.serve([sock])) for server, sock in self._servers]

    async def load(self) -> None:
        """Load what a front needs of the model."""
        await self.service.load()
        gc.collect()
        gc.freeze()  # libraries and tokenizer stay: later collections, which hold up all streams, need not visit them

    def counts(self) -> FrontCounts:
        """What was counted, as it is now."""
        counts = self._counts
        counts.num_connections, counts.body_bytes = self._connections.num_open, self.service.bodies.num_bytes
        counts.connections_ended = {str(reason): count for reason, count in self._connections.ended.items()}
        counts.num_unfinished = [client.num_unfinished for client in self.replicas.clients]
        return counts

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuse new requests, and let those that run finish: until the limit, until one is to `hurry`, or if they would not."""
        self.service.draining = True
        replicas, limit_s = self.replicas, self._config.shutdown_timeout
        if not replicas.num_unfinished:
            return
        if replicas.rest.standstill is None:
            logger.warning(
                "shutting down: %d requests have %g s to finish; once more to end them now",
                replicas.num_unfinished,
                limit_s,
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while replicas.num_unfinished and replicas.rest.standstill is None and not hurry.is_set():
                    await asyncio.sleep(_POLL_S)
        if left := replicas.num_unfinished:
            reason = "" if replicas.rest.standstill is None else f": {replicas.rest.standstill}"
            logger.warning("%d requests are ended before they are done%s", left, reason)

    async def close(self) -> None:
        """Send what is being sent, and listen no more."""
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.service.shut_down()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.shutdown)


def run_in_loop(main: Coroutine[Any, Any, int]) -> int:
    """Run a front's or a supervisor's process; returns its exit code."""
    _give_back_large_blocks()
    try:
        import uvloop
    except ImportError:  # it is not there for every platform
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


class Served(Protocol):
    """One front or several, as whoever serves has them."""

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        """None of which ends before all is over."""

    def start(self) -> None:
        """Begin to listen."""

    async def load(self) -> None:
        """Load what a front needs of the model."""

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuse new requests, and let those that run finish."""

    async def close(self) -> None:
        """Listen no more."""


async def serve_alone(front: Front, launches: Sequence[Launch]) -> int:
    """Serve with the only front in this process; see `serve`."""
    supervisor = Supervisor(launches, model_name(front), front.config.adapters())
    sends = [engine.send_encoded for engine in supervisor.engines]
    http = HttpFront(front, sends, supervisor, supervisor.rest, supervisor.adapters)
    supervisor.attach(OneFront(http.replicas, http.counts))
    return await serve(front, supervisor, http, 1)


async def serve(front: Front, supervisor: Supervisor, served: Served, num_fronts: int) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    Raises:
        ConfigError: the settings or the model are unusable.
        EngineDeadError: an engine, or a front, cannot start.
    """
    stop = Stop()
    await supervisor.start()
    served.start()
    try:
        loading: asyncio.Future[Any] = asyncio.gather(served.load(), supervisor.wait_ready())
        await asyncio.wait([loading, stop.task(), *served.tasks], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            announce(front, supervisor, num_fronts)
            await asyncio.wait([stop.task(), *served.tasks], return_when=asyncio.FIRST_COMPLETED)
            await served.drain(stop.hurry)
        else:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
    finally:
        stop.close()
        await supervisor.stop()
        await served.close()
    return 0


def model_name(front: Front) -> str:
    """As answers give it, and metrics."""
    return (front.config.served_model_name or (front.engine_config.model.model,))[0]


def announce(front: Front, supervisor: Supervisor, num_fronts: int) -> None:
    """Print what is served, and where."""
    config, engine_config = front.config, front.engine_config
    ready = supervisor.engines[0].status.ready
    assert ready is not None
    assert front.listening is not None
    host = f"[{config.host}]" if ":" in config.host else config.host
    seconds = time.monotonic() - front.started_at
    num_engines = len(supervisor.engines)
    several = f"; {ready.num_ranks} ranks by {ready.collectives}" if ready.num_ranks > 1 else ""
    if (devices := config.prefill_devices) is not None:
        num_sources = len(devices) // ready.num_ranks
        several += f"; engines: {num_sources} for prompts, {num_engines - num_sources} for answers"
    elif num_engines > 1:
        several += f"; {num_engines} engines"
    several += f"; {num_fronts} front processes" if num_fronts > 1 else ""
    print(
        f"stepgraph serves {model_name(front)} at http://{host}:{front.listening.getsockname()[1]} ({ready.backend} graphs on "
        f"{ready.device}, {ready.precision}; context {ready.max_model_len}{several}); ready in {seconds:.1f} s",
        flush=True,
    )
    if eager_steps := engine_config.graph.eager_steps():
        print(f"steps without a graph: {eager_steps}", flush=True)
    if ready.max_drafts:
        print(f"speculative decoding: {engine_config.speculative}", flush=True)


def _limit_logs() -> None:
    """Whoever has no key shall not fill the log."""
    access = logging.getLogger("uvicorn.access")
    access.addFilter(shorten_path)
    access.addFilter(LogLimit(is_refused_access))
    for name in ("uvicorn.error", "stepgraph.server.connections", "stepgraph.server.app"):
        logging.getLogger(name).addFilter(LogLimit())


class _Traced:
    """A `RequestObserver` that counts, and makes a span of each answer."""

    def __init__(self, counts: RequestCounts, tracer: Tracer):
        self._counts = counts
        self._tracer = tracer
        self.on_progress = counts.on_progress
        self.on_first_token = counts.on_first_token
        self.on_token_gap = counts.on_token_gap

    def on_end(self, request: EndedRequest) -> None:
        """See `RequestObserver`."""
        self._counts.on_end(request)
        if (origin := request.origin) is not None:
            self._tracer.on_end(
                request,
                operation=origin.operation,
                model=origin.model,
                request_id=origin.response_id,
                traceparent=origin.traceparent,
            )


class Stop:
    """Hears the signals that ask to stop."""

    def __init__(self) -> None:
        self.hurry = asyncio.Event()
        """It was asked again."""
        self._asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._ask)
        self._task = asyncio.create_task(self._asked.wait())

    def task(self) -> asyncio.Task[Literal[True]]:
        """Done when the first signal has come."""
        return self._task

    def close(self) -> None:
        self._task.cancel()

    def _ask(self) -> None:
        if self._asked.is_set():
            self.hurry.set()
        self._asked.set()


class _Server(uvicorn.Server):
    """A server whose signals are handled elsewhere."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: Any, config: ServerConfig, connections: Connections) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=partial(Connection, shared=connections),  # type: ignore[arg-type]  # which is called, and nothing else
            ws="none",
            lifespan="off",
            access_log=config.access_log,
            log_level="info" if config.access_log else "warning",
            log_config=None,
            timeout_graceful_shutdown=_GOODBYE_S,
            server_header=False,
        )
    )


def _served_model(front: Front) -> ServedModel:
    """What the front needs of the model. Takes seconds, most of them for the import."""
    from stepgraph.engine.model_defaults import sampling_defaults_of, sampling_overrides
    from stepgraph.models.source import resolve_configured

    config = front.config
    source = resolve_configured(front.engine_config.model)
    tokenizer = source.tokenizer_if_any()
    template = ChatTemplate(tokenizer, front.chat_template, config.default_chat_template_kwargs)
    defaults = {} if config.generation_config == "none" else sampling_defaults_of(source)
    template.prepare()
    return ServedModel(
        name=source.name,
        tokenizer=tokenizer,
        chat_form=ChatForm.of(
            template,
            tokenizer,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        ),
        sampling_defaults=defaults | sampling_overrides(config.override_generation_config or {}),
        longest_token=1 if tokenizer is None else max(map(len, tokenizer.get_vocab())),
    )
