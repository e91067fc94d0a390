"""`stepgraph serve`: settles what can be settled at once, starts the engines' processes, and becomes the HTTP front,
or the supervisor of several.

Imports nothing heavy: the engines' processes load beside this one, and bad settings are refused before either.
"""

from __future__ import annotations

import logging
import math
import socket
import sys
import time
from pathlib import Path
from secrets import token_hex
from typing import Any

from stepgraph.config import EngineConfig
from stepgraph.config.server import ServerConfig, engine_log_level, split_replicas
from stepgraph.errors import ConfigError
from stepgraph.server.descriptors import raise_descriptor_limit, room_for_connections
from stepgraph.server.places import default_fronts, places
from stepgraph.server.ports import listen
from stepgraph.server.spawn import spawn_engine

logger = logging.getLogger(__name__)

_SECRET_BYTES = 24
"""Of what engines behind one server know, and others do not."""


def run(settings: dict[str, Any], config: ServerConfig) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        settings: of the engines, as `split_replicas` takes them.
        config: of the server.

    Raises:
        ConfigError: the settings or the model are unusable.
        EngineDeadError: the engine cannot start.
    """
    started_at = time.monotonic()
    raise_descriptor_limit()
    engines = split_replicas(settings, config)
    num_engines = len(engines)
    engine_config = EngineConfig.from_settings(**engines[0])
    api_keys, chat_template = config.api_keys(), config.chat_template_text()
    for name, folder in config.adapters().items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ConfigError(
                f"lora_modules: {folder}, where the adapter {name!r} is to be, holds no adapter_config.json; name a folder that "
                "PEFT's save_pretrained wrote"
            )
    engine_log_level()  # refused here, where it is one sentence, and not in the process that reads it
    if config.host not in ("127.0.0.1", "localhost", "::1") and not api_keys:
        what = "use and administer the API" if config.enable_admin_endpoints else "use the API"
        logger.warning("everybody who reaches %s can %s: set an API key", config.host, what)
    devices = config.prefill_devices and (*config.prefill_devices, *(config.decode_devices or ()))
    engine_places = places(engine_config, num_engines, devices)
    if devices is not None and not engine_config.transfer.secret():
        secret = token_hex(_SECRET_BYTES)
        engine_places = [place._replace(secret=secret) for place in engine_places]
    num_fronts = config.api_server_count or default_fronts(engine_config, num_engines)
    listening = listen(config.host, config.port, "port", num_fronts)
    metrics_listening: list[socket.socket] | None = None
    if config.metrics_port is not None:
        metrics_listening = listen(config.host, config.metrics_port, "metrics_port", num_fronts)
    processes = [spawn_engine(place) for place in engine_places]  # so that they load side by side, and beside this one
    try:
        from stepgraph.server.engine_life import Launch
        from stepgraph.server.front import Front, run_in_loop, serve_alone
        from stepgraph.server.front_processes import serve_with_processes

        launches = [
            Launch(
                engine,
                None if config.engine_worker_queue_port is None else config.engine_worker_queue_port + number,
                place,
                process,
                config.engine_hang_timeout,
                progress=number == 0 and sys.stderr.isatty(),
                takes_fronts=num_fronts > 1,
            )
            for number, (engine, place, process) in enumerate(zip(engines, engine_places, processes, strict=True))
        ]
        front = Front(
            engine_config,
            config,
            api_keys,
            chat_template,
            listening[-1],
            None if metrics_listening is None else metrics_listening[-1],
            room_for_connections(math.ceil(config.max_connections / num_fronts)),
            started_at,
        )
        if num_fronts == 1:
            return run_in_loop(serve_alone(front, launches))
        return run_in_loop(serve_with_processes(front, engines[0], launches, listening, metrics_listening))
    finally:
        for process in processes:
            process.kill()
