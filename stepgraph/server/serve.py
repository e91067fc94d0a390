"""`stepgraph serve`: settles what can be settled at once, starts the engine's process, and becomes the HTTP front.

Imports nothing heavy: the engine's process loads beside the front, and bad settings are refused before either.
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

from stepgraph.config import EngineConfig
from stepgraph.config.server import ServerConfig, engine_log_level
from stepgraph.errors import ConfigError
from stepgraph.server.descriptors import raise_descriptor_limit, room_for_connections
from stepgraph.server.spawn import spawn_engine

logger = logging.getLogger(__name__)


def run(settings: dict[str, Any], config: ServerConfig) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        settings: of the engine, as `EngineConfig.from_settings` takes them.
        config: of the server.

    Raises:
        ConfigError: the settings or the model are unusable.
        EngineDeadError: the engine cannot start.
    """
    started_at = time.monotonic()
    raise_descriptor_limit()
    engine_config = EngineConfig.from_settings(**settings)
    api_keys, chat_template = config.api_keys(), config.chat_template_text()
    for name, folder in config.adapters().items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ConfigError(
                f"lora_modules: {folder}, where the adapter {name!r} is to be, holds no adapter_config.json; name a folder that "
                "PEFT's save_pretrained wrote"
            )
    engine_log_level()  # refused here, where it is one sentence, and not in the process that reads it
    if config.log_requests:
        logging.getLogger("stepgraph.server.requests").setLevel(logging.INFO)
    if config.host not in ("127.0.0.1", "localhost", "::1") and not api_keys:
        what = "use and administer the API" if config.enable_admin_endpoints else "use the API"
        logger.warning("everybody who reaches %s can %s: set an API key", config.host, what)
    listening = _listen(config.host, config.port, "port")
    metrics_listening = (
        None if config.metrics_port is None else _listen(config.host, config.metrics_port, "metrics_port")
    )
    process = spawn_engine()
    try:
        from stepgraph.server.front import Front, run_front

        return run_front(
            Front(
                settings,
                engine_config,
                config,
                api_keys,
                chat_template,
                listening,
                metrics_listening,
                room_for_connections(config.max_connections),
                process,
                started_at,
            )
        )
    finally:
        process.kill()


def _listen(host: str, port: int, setting: str) -> socket.socket:
    """Open a port, so that whoever is there already is found before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{setting}={port} at host {host} cannot be opened: {error.strerror}; choose a free port, or end what listens there"
        ) from error
    return sock
