"""The HTTP front's process: from open ports to the last reply."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import uvicorn

from stepgraph.config import EngineConfig
from stepgraph.config.server import ServerConfig
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.server.app import create_app, create_metrics_app
from stepgraph.server.connections import Connection, Connections, Limits
from stepgraph.server.conversation import ChatForm
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.generation import EndedRequest
from stepgraph.server.log_limit import LogLimit, is_refused_access, shorten_path
from stepgraph.server.metrics import Metrics
from stepgraph.server.service import ServedModel, Service
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

    settings: dict[str, Any]
    """Of the engine, as `EngineConfig.from_settings` takes them."""
    engine_config: EngineConfig
    config: ServerConfig
    api_keys: tuple[str, ...]
    chat_template: str | None
    """Text that replaces the model's."""
    listening: socket.socket
    metrics_listening: socket.socket | None
    max_connections: int
    """Of the API's port."""
    engine_process: subprocess.Popen[bytes]
    """Started already, so that both processes load side by side."""
    started_at: float
    """`time.monotonic()` seconds."""


def run_front(front: Front) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    Raises:
        ConfigError: the settings or the model are unusable.
        EngineDeadError: the engine cannot start.
    """
    _give_back_large_blocks()
    try:
        import uvloop
    except ImportError:  # it is not there for every platform
        return asyncio.run(_serve(front))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(front))


def _give_back_large_blocks() -> None:
    """What large bodies took goes back to the system. By itself, glibc keeps blocks up to the size of the largest it has seen."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


async def _serve(front: Front) -> int:
    config, listening = front.config, front.listening
    name = (config.served_model_name or (front.engine_config.model.model,))[0]
    tracer = None if config.otlp_traces_endpoint is None else create_tracer(config.otlp_traces_endpoint)
    metrics = Metrics(name) if tracer is None else _TracedMetrics(name, tracer)
    client = EngineClient(
        front.settings,
        port=config.engine_worker_queue_port,
        hang_timeout_s=config.engine_hang_timeout,
        observer=metrics,
        first_process=front.engine_process,
        progress=sys.stderr.isatty(),
    )
    service = Service(config, client, lambda: _served_model(front))
    connections = Connections(Limits.of(config), front.max_connections)
    metrics.watch(service.bodies, connections, client.rest)
    servers = [(_server(create_app(service, metrics, api_keys=front.api_keys), config, connections), listening)]
    if front.metrics_listening is not None:
        of_operators = Connections(Limits.of(config), _MAX_OPERATORS)
        servers.append((_server(create_metrics_app(service, metrics), config, of_operators), front.metrics_listening))
    _limit_logs()
    stop = _Stop()
    await client.start()
    tasks = [asyncio.create_task(server.serve([sock])) for server, sock in servers]
    try:
        loading: asyncio.Future[Any] = asyncio.gather(service.load(), client.wait_ready())
        await asyncio.wait([loading, stop.task(), *tasks], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            gc.collect()
            gc.freeze()  # libraries and tokenizer stay: later collections, which hold up all streams, need not visit them
            ready = client.ready
            assert ready is not None
            host = f"[{config.host}]" if ":" in config.host else config.host
            seconds = time.monotonic() - front.started_at
            print(
                f"stepgraph serves {name} at http://{host}:{listening.getsockname()[1]} ({ready.backend} graphs on "
                f"{ready.device}, {ready.precision}; context {ready.max_model_len}); ready in {seconds:.1f} s",
                flush=True,
            )
            if eager_steps := front.engine_config.graph.eager_steps():
                print(f"steps without a graph: {eager_steps}", flush=True)
            if ready.max_drafts:
                print(f"speculative decoding: {front.engine_config.speculative}", flush=True)
            await asyncio.wait([stop.task(), *tasks], return_when=asyncio.FIRST_COMPLETED)
            await _drain(service, stop)
        else:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
    finally:
        stop.close()
        await client.stop()
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)
        service.shut_down()
        if tracer is not None:
            await asyncio.to_thread(tracer.shutdown)
    return 0


def _limit_logs() -> None:
    """Whoever has no key shall not fill the log."""
    access = logging.getLogger("uvicorn.access")
    access.addFilter(shorten_path)
    access.addFilter(LogLimit(is_refused_access))
    for name in ("uvicorn.error", "stepgraph.server.connections", "stepgraph.server.app"):
        logging.getLogger(name).addFilter(LogLimit())


class _TracedMetrics(Metrics):
    """Metrics, and a span for each answer."""

    def __init__(self, model_name: str, tracer: Tracer):
        super().__init__(model_name)
        self._tracer = tracer

    def on_end(self, request: EndedRequest) -> None:
        """See `Observer.on_end`."""
        super().on_end(request)
        if (origin := request.origin) is not None:
            self._tracer.on_end(
                request,
                operation=origin.operation,
                model=origin.model,
                request_id=origin.response_id,
                traceparent=origin.traceparent,
            )


async def _drain(service: Service, stop: _Stop) -> None:
    """Refuse new requests, and let those that run finish: until the limit, until told again to stop, or until they would not."""
    service.draining = True
    client = service.client
    if not client.num_unfinished:
        return
    limit_s = service.config.shutdown_timeout
    if client.rest.standstill is None:
        logger.warning(
            "shutting down: %d requests have %g s to finish; once more to end them now", client.num_unfinished, limit_s
        )
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while client.num_unfinished and client.rest.standstill is None and stop.count < 2:
                await asyncio.sleep(_POLL_S)
    if left := client.num_unfinished:
        reason = "" if client.rest.standstill is None else f": {client.rest.standstill}"
        logger.warning("%d requests are ended before they are done%s", left, reason)


class _Stop:
    """Counts the signals that ask to stop."""

    def __init__(self) -> None:
        self.count = 0
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
        self.count += 1
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
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        ),
        sampling_defaults=defaults | sampling_overrides(config.override_generation_config or {}),
        longest_token=1 if tokenizer is None else max(map(len, tokenizer.get_vocab())),
    )
