"""`stepgraph serve`: settles what can be settled at once, starts the engines' processes, and becomes the HTTP front,
or the supervisor of several.

Imports nothing heavy: the engines' processes load beside this one, and bad settings are refused before either.
"""

from __future__ import annotations

import logging
import math
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

from stepgraph.config import EngineConfig
from stepgraph.config.server import ServerConfig, engine_log_level, split_replicas
from stepgraph.errors import ConfigError
from stepgraph.server.descriptors import raise_descriptor_limit, room_for_connections
from stepgraph.server.places import default_fronts, places
from stepgraph.server.ports import listen
from stepgraph.server.spawn import Place, spawn_engine

if TYPE_CHECKING:
    from stepgraph.server.engine_life import Launch

logger = logging.getLogger(__name__)

_SECRET_BYTES = 24
"""Of what engines behind one server know, and others do not."""


class Prepared(NamedTuple):
    """What is settled before anything is loaded."""

    engines: list[dict[str, Any]]
    """Settings of each."""
    config: EngineConfig
    """Of the first."""
    places: list[Place]
    """Where each runs."""
    api_keys: tuple[str, ...]
    chat_template: str | None
    """Text that replaces the model's."""


def prepare(settings: Mapping[str, Any], config: ServerConfig) -> Prepared:
    """Settle what can be settled at once.

    Args:
        settings: of the engines, as `split_replicas` takes them.
        config: of the server.

    Raises:
        ConfigError: the settings are unusable.
    """
    engines = split_replicas(settings, config)
    engine_config = EngineConfig.from_settings(**engines[0])
    api_keys, chat_template = config.api_keys(), config.chat_template_text()
    for name, folder in config.adapters().items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ConfigError(
                f"lora_modules: {folder}, where the adapter {name!r} is to be, holds no adapter_config.json; name a folder that "
                "PEFT's save_pretrained wrote"
            )
    engine_log_level()  # refused here, where it is one sentence, and not in the process that reads it
    devices = config.prefill_devices and (*config.prefill_devices, *(config.decode_devices or ()))
    engine_places = places(engine_config, len(engines), devices)
    if devices is not None and not engine_config.transfer.secret():
        secret = token_hex(_SECRET_BYTES)
        engine_places = [place._replace(secret=secret) for place in engine_places]
    return Prepared(engines, engine_config, engine_places, api_keys, chat_template)


def launches_of(
    prepared: Prepared,
    config: ServerConfig,
    processes: Sequence[subprocess.Popen[bytes]],
    *,
    progress: bool,
    takes_fronts: bool,
) -> list[Launch]:
    """How each engine is started, of which the first `processes` run already. Imports what serving takes.

    Args:
        progress: let the first engine show progress bars.
        takes_fronts: see `Launch`.
    """
    from stepgraph.server.engine_life import Launch

    return [
        Launch(
            engine,
            None if config.engine_worker_queue_port is None else config.engine_worker_queue_port + number,
            place,
            process,
            config.engine_hang_timeout,
            progress=progress and number == 0,
            takes_fronts=takes_fronts,
        )
        for number, (engine, place, process) in enumerate(
            zip(prepared.engines, prepared.places, processes, strict=True)
        )
    ]


def run(settings: dict[str, Any], config: ServerConfig) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        settings, config: see `prepare`.

    Raises:
        ConfigError: the settings or the model are unusable.
        EngineDeadError: the engine cannot start.
    """
    started_at = time.monotonic()
    raise_descriptor_limit()
    prepared = prepare(settings, config)
    if config.host not in ("127.0.0.1", "localhost", "::1") and not prepared.api_keys:
        what = "use and administer the API" if config.enable_admin_endpoints else "use the API"
        logger.warning("everybody who reaches %s can %s: set an API key", config.host, what)
    num_fronts = config.api_server_count or default_fronts(prepared.config, len(prepared.engines))
    listening = listen(config.host, config.port, "port", num_fronts)
    metrics_listening: list[socket.socket] | None = None
    if config.metrics_port is not None:
        metrics_listening = listen(config.host, config.metrics_port, "metrics_port", num_fronts)
    processes = [
        spawn_engine(place) for place in prepared.places
    ]  # so that they load side by side, and beside this one
    try:
        from stepgraph.server.front import Front, run_in_loop, serve_alone
        from stepgraph.server.front_processes import serve_with_processes

        launches = launches_of(prepared, config, processes, progress=sys.stderr.isatty(), takes_fronts=num_fronts > 1)
        front = Front(
            prepared.config,
            config,
            prepared.api_keys,
            prepared.chat_template,
            listening[-1],
            None if metrics_listening is None else metrics_listening[-1],
            room_for_connections(math.ceil(config.max_connections / num_fronts)),
            started_at,
        )
        if num_fronts == 1:
            return run_in_loop(serve_alone(front, launches))
        return run_in_loop(serve_with_processes(front, prepared.engines[0], launches, listening, metrics_listening))
    finally:
        for process in processes:
            process.kill()
