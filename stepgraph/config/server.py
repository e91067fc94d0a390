"""How the HTTP server listens, limits and protects itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stepgraph.config.engine import ENGINE_PARTS, EngineConfig, flattened
from stepgraph.config.fields import check, check_value, homes_of, refuse_unknown, setting, text_of_file
from stepgraph.config.parallel import ParallelConfig
from stepgraph.errors import ConfigError

API_KEY_VARIABLE = "STEPGRAPH_API_KEY"
_API_KEY_VARIABLES_OF_OTHER_ENGINES = ("VLLM_API_KEY", "FD_API_KEY")
LOG_LEVEL_VARIABLE = "STEPGRAPH_LOG_LEVEL"
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
MAX_ANSWERS = 64
"""Answers the engine gives to one request at most: `max_n` can only lower it."""


@dataclass(frozen=True)
class ServerConfig:
    """How the HTTP server listens, limits and protects itself."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every network: then set an API key")
    port: int = setting(8000, "port of the API; 0 takes any that is free", minimum=0, metavar="PORT")
    metrics_port: int | None = setting(
        None, "port for /metrics and /health alone; default: the API's", minimum=0, metavar="PORT"
    )
    engine_worker_queue_port: int | None = setting(
        None,
        "loopback port between the HTTP process and the engine's, and those after it for further engines; default: a socket file",
        minimum=1,
        metavar="PORT",
    )
    api_server_count: int | None = setting(
        None,
        "processes that answer HTTP, each good for some 20000 streamed tokens per second; default: by engines and cores, and 1 "
        "for a CPU",
        minimum=1,
    )
    prefill_devices: tuple[int, ...] | None = setting(
        None,
        "numbers of the devices whose engines compute long prompts for those of decode_devices; each engine takes as many as it "
        "has ranks. GPUs are numbered as this process sees them; on a CPU, engines get equal shares of its cores in this order",
        minimum=0,
    )
    decode_devices: tuple[int, ...] | None = setting(
        None,
        "numbers of the devices whose engines answer, with short prompts of their own and long ones of prefill_devices",
        minimum=0,
    )
    min_remote_prefill_tokens: int = setting(
        512,
        "with prefill_devices: tokens of a prompt, without those that are cached where it is answered, from which another engine "
        "computes it",
        minimum=1,
    )
    root_path: str | None = setting(None, "path that a proxy in front takes off the URLs, e.g. /llm", metavar="PATH")
    served_model_name: tuple[str, ...] | None = setting(
        None, "names that requests may give as model, the first in answers; default: MODEL as given", metavar="NAME"
    )
    lora_modules: tuple[str, ...] | None = setting(
        None,
        "LoRA adapters to serve, each under a model name of its own; needs enable_lora",
        metavar="NAME=FOLDER",
    )
    chat_template: str | None = setting(
        None, "chat template, a file or the text itself; default: the model's", metavar="FILE"
    )
    generation_config: str = setting(
        "auto",
        "how requests sample that do not say it: as the model's generation_config.json has it (auto), or as the API does (none)",
        choices=("auto", "none"),
    )
    override_generation_config: Mapping[str, Any] | None = setting(
        None,
        """sampling values for requests that do not say them, over generation_config's, e.g. '{"temperature": 0.6}'""",
    )
    default_chat_template_kwargs: Mapping[str, Any] | None = setting(
        None, """variables of the chat template that requests do not set, e.g. '{"enable_thinking": false}'"""
    )
    tool_call_parser: str = setting(
        "auto",
        "the form in which the model calls tools; auto goes by its chat template, none leaves calls in the text",
        choices=("auto", "none", "hermes", "llama", "mistral", "qwen3_coder", "gemma4", "harmony"),
    )
    reasoning_parser: str = setting(
        "auto",
        "what sets reasoning apart from the answer; auto: harmony's channels, if the model writes it, or the tags that "
        "the chat template has",
        choices=("auto", "none", "think", "gemma4", "harmony"),
    )
    api_key: tuple[str, ...] | None = setting(
        None,
        "keys that requests must bring one of; other users of this machine see flags, so better give a file or "
        f"{API_KEY_VARIABLE}",
        metavar="KEY",
        secret=True,
    )
    api_key_file: str | None = setting(None, "file of further keys, one per line", metavar="FILE")
    cors_allow_origins: tuple[str, ...] | None = setting(
        None, "origins whose web pages may call the API, e.g. https://example.org; * is all", metavar="ORIGIN"
    )
    max_queue: int = setting(512, "requests that may wait beyond those that run; more get status 429", minimum=0)
    max_n: int = setting(16, "answers that one request may ask for (n)", minimum=1)
    max_body_mib: float = setting(8.0, "size of a request's body in MiB; more gets status 413", minimum=0.001)
    max_bodies_mib: float = setting(
        128.0,
        "MiB of all bodies together that are being received or prepared; with more, those above 64 KiB get status 503",
        minimum=0.1,
    )
    max_body_items: int = setting(
        32768,
        "texts (names of fields are some), lists and objects in a body, and an eighth of its values; more gets status 400",
        minimum=64,
    )
    max_connections: int = setting(
        4096,
        "open connections, where the system grants descriptors for so many; with more, one that sends nothing makes way, or "
        "the new one gets status 503",
        minimum=4,
    )
    max_header_kib: float = setting(
        64.0, "size of a request's line and headers in KiB; more gets status 400", minimum=1
    )
    header_timeout: float = setting(
        10.0, "seconds in which a request's headers must come once it has begun", minimum=0.01, metavar="SECONDS"
    )
    body_timeout: float = setting(
        60.0, "seconds in which a request's body must come once its headers have", minimum=0.01, metavar="SECONDS"
    )
    keep_alive_timeout: float = setting(
        30.0, "seconds that a connection is kept on which nothing is asked", minimum=0.01, metavar="SECONDS"
    )
    stall_timeout: float = setting(
        300.0,
        "seconds after which a client that takes nothing of what it is sent is cut off; that one takes a kilobyte a second may "
        "show once in two minutes only",
        minimum=0.01,
        metavar="SECONDS",
    )
    request_timeout: float | None = setting(
        None, "seconds that a request may take, waiting included; default: no limit", minimum=0.001, metavar="SECONDS"
    )
    engine_hang_timeout: float | None = setting(
        None,
        "seconds without a sign of the engine's loop after which its process is killed and started again; default: 120, on a "
        "CPU more if the model's largest step may take longer",
        minimum=2,
        metavar="SECONDS",
    )
    shutdown_timeout: float = setting(
        30.0, "seconds that running requests get to finish after SIGTERM", minimum=0, metavar="SECONDS"
    )
    enable_admin_endpoints: bool = setting(
        False,
        "serve the endpoints that change what is served: /sleep, /wake_up, /pause, /resume, /reset_prefix_cache and those that "
        "load weights and LoRA adapters; they need the API key, if there is one",
    )
    ui: bool = setting(
        True,
        "a page for browsers at /, to chat and to look at the engine's steps; it asks for the API key, if there is one, before "
        "it shows anything",
    )
    access_log: bool = setting(False, "log method, path and status of every HTTP request")
    log_requests: bool = setting(False, "log prompt and settings of every request; prompts may be private")
    otlp_traces_endpoint: str | None = setting(
        None, "URL of an OpenTelemetry collector to send traces to (OTLP over HTTP)", metavar="URL"
    )

    def __post_init__(self) -> None:
        check(self)
        for name in ("host", "root_path", "chat_template", "api_key_file", "otlp_traces_endpoint"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; give it a value, or leave it unset")
        self.check_ports()
        if self.max_n > MAX_ANSWERS:
            raise ConfigError(
                f"max_n={self.max_n} is above {MAX_ANSWERS}, the most answers the engine gives to a request"
            )
        if self.root_path is not None and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path={self.root_path!r} must begin with a slash and not end with one, e.g. /llm")
        if self.otlp_traces_endpoint is not None and not self.otlp_traces_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_traces_endpoint={self.otlp_traces_endpoint!r} is not the URL of a collector; write e.g. "
                "http://127.0.0.1:4318/v1/traces"
            )
        for origin in self.cors_allow_origins or ():
            if origin != "*" and ("://" not in origin or origin.count("/") > 2):
                raise ConfigError(
                    f"cors_allow_origins: {origin!r} is not an origin; write scheme, host and perhaps port, without a "
                    "slash after them, e.g. https://example.org"
                )
        _check_keys(self.api_key or (), "api_key")
        self._check_names()
        self._check_devices()

    def adapters(self) -> dict[str, str]:
        """The folders of the LoRA adapters to serve, by their model names."""
        pairs = (module.partition("=") for module in self.lora_modules or ())
        return {name: folder for name, _, folder in pairs}

    def api_keys(self) -> tuple[str, ...]:
        """All keys that open the API: of `api_key`, `api_key_file` and the environment variable STEPGRAPH_API_KEY.

        Empty if none is set anywhere: then the API is open to everybody who reaches it.

        Raises:
            ConfigError: the file cannot be read or holds no key, the variable is empty, a key cannot be one, or the only key is
                in a variable of another engine.
        """
        keys = [*(self.api_key or ())]
        if self.api_key_file is not None:
            lines = [line.strip() for line in text_of_file(self.api_key_file, "api_key_file").splitlines()]
            in_file = [line for line in lines if line]
            if not in_file:  # going on would leave a server open that was meant to be closed
                raise ConfigError(f"api_key_file={self.api_key_file!r} holds no key; write one per line, or unset it")
            _check_keys(in_file, f"api_key_file={self.api_key_file!r}")
            keys += in_file
        variable = os.environ.get(API_KEY_VARIABLE)
        if variable is not None:
            _check_keys([variable], f"the environment variable {API_KEY_VARIABLE}")
            keys.append(variable)
        for theirs in _API_KEY_VARIABLES_OF_OTHER_ENGINES:
            if not keys and os.environ.get(theirs):
                raise ConfigError(
                    f"the environment variable {theirs} is not read here, and without a key the API is open to everybody who "
                    f"reaches it; set {API_KEY_VARIABLE}, or unset {theirs}"
                )
        return tuple(dict.fromkeys(keys))

    def chat_template_text(self) -> str | None:
        """The chat template that replaces the model's, read from its file if it is one; None to keep the model's.

        Raises:
            ConfigError: the file cannot be read.
        """
        if self.chat_template is None or "{{" in self.chat_template or "{%" in self.chat_template:
            return self.chat_template
        return text_of_file(self.chat_template, "chat_template")

    def check_ports(self, num_engines: int = 1) -> None:
        """Check that the ports of the server and of so many engines are ports, and differ.

        Raises:
            ConfigError: they do not.
        """
        taken: dict[int, str] = {}
        for name, count in (("port", 1), ("metrics_port", 1), ("engine_worker_queue_port", num_engines)):
            port = getattr(self, name)
            if port is None or port == 0:
                continue
            if port > 65535:
                raise ConfigError(f"{name}={port} is not a port; the largest is 65535")
            if (last := port + count - 1) > 65535:
                raise ConfigError(
                    f"{name}={port} of {count} engines needs ports up to {last}, and the largest is 65535; give a "
                    "smaller one"
                )
            for one in range(port, port + count):
                if one in taken:
                    which = f"{name}={port}" if count == 1 else f"{name}={port} takes {count} ports, and {one}"
                    raise ConfigError(f"{which} is {taken[one]} too; give them different ports")
                taken[one] = name

    def _check_devices(self) -> None:
        prefill, decode = self.prefill_devices, self.decode_devices
        if (prefill is None) != (decode is None):
            given, missing = ("prefill", "decode") if decode is None else ("decode", "prefill")
            raise ConfigError(
                f"{given}_devices needs {missing}_devices beside it: one engine begins what the other ends"
            )
        for place, device in enumerate(devices := (*(prefill or ()), *(decode or ()))):
            if device in devices[:place]:
                raise ConfigError(
                    f"device {device} is given twice among prefill_devices and decode_devices; each is one engine's"
                )

    def _check_names(self) -> None:
        names = list(self.served_model_name or ())
        for module in self.lora_modules or ():
            name, equals, folder = module.partition("=")
            if not (name and equals and folder):
                raise ConfigError(f"lora_modules: {module!r} must be NAME=FOLDER, e.g. poems=/models/poems-lora")
            names.append(name)
        for place, name in enumerate(names):
            if not name:
                raise ConfigError("served_model_name: a name is empty; write one, or leave it out")
            if name in names[:place]:
                raise ConfigError(
                    f"two models are called {name!r}; each of served_model_name and lora_modules needs its own"
                )


SERVE_PARTS: dict[str, Any] = {"server": ServerConfig, **ENGINE_PARTS}
"""Every dataclass of settings by the name of its section in files."""


def engine_log_level() -> str:
    """What the engine's process logs, as logging names it: of the environment variable STEPGRAPH_LOG_LEVEL, else WARNING.

    Raises:
        ConfigError: the variable names no level.
    """
    given = os.environ.get(LOG_LEVEL_VARIABLE, "WARNING")
    if given.upper() not in _LOG_LEVELS:
        raise ConfigError(
            f"the environment variable {LOG_LEVEL_VARIABLE}: {given!r} is not known; choose one of: {', '.join(_LOG_LEVELS)}"
        )
    return given.upper()


def split_replicas(settings: Mapping[str, Any], server: ServerConfig) -> list[dict[str, Any]]:
    """Flat settings as each engine of a server gets them: without `enable_expert_parallel`, `data_parallel_size` is not about
    one of them, and with `prefill_devices` each has a role.

    Raises:
        ConfigError: there cannot be so many, or two settings contradict each other.
    """
    settings = flattened(settings)
    if server.prefill_devices is not None:
        for name in ("data_parallel_size", "splitwise_role"):
            if name in settings:
                raise ConfigError(
                    f"{name}={settings[name]!r} and prefill_devices do not go together: prefill_devices and decode_devices say "
                    "how many engines there are, and what each does; leave one out"
                )
        num_ranks = settings.get("tensor_parallel_size", 1)
        check_value(ParallelConfig, "tensor_parallel_size", num_ranks)
        engines = []
        for role, devices in (("prefill", server.prefill_devices), ("decode", server.decode_devices or ())):
            if len(devices) % num_ranks:
                raise ConfigError(
                    f"{role}_devices has {len(devices)} devices, and each engine needs tensor_parallel_size={num_ranks}; give so "
                    "many for each"
                )
            engines += [{**settings, "splitwise_role": role} for _ in range(len(devices) // num_ranks)]
    elif settings.get("enable_expert_parallel"):
        engines = [settings]
    else:
        num_engines = settings.pop("data_parallel_size", 1)
        check_value(ParallelConfig, "data_parallel_size", num_engines)
        engines = [dict(settings) for _ in range(num_engines)]
    port = settings.get("kv_transfer_port")
    if isinstance(port, int) and port > 0:
        for number, engine in enumerate(engines):
            engine["kv_transfer_port"] = port + number
    rank = settings.get("kv_events_rank", 0)
    if isinstance(rank, int):
        for number, engine in enumerate(engines[1:], start=1):
            engine["kv_events_rank"] = rank + number
    return engines


def serve_config(settings: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """Sort flat settings, e.g. ``{"model": "smollm2", "port": 8080}``, into those of the engine and of the server.

    Raises:
        ConfigError: unknown setting, bad value, or settings that contradict each other.
    """
    settings = flattened(settings)
    refuse_unknown(settings, homes_of(SERVE_PARTS))
    server = ServerConfig(
        **{name: settings.pop(name) for name in ServerConfig.__dataclass_fields__ if name in settings}
    )
    engines = split_replicas(settings, server)
    engine = EngineConfig.from_settings(**engines[0])
    EngineConfig.from_settings(**engines[-1])  # whose port may be too large
    engine.transfer.secret()
    if engine.kv_events.enable_kv_cache_events:
        engine.kv_events.check_ports(max(len(engines), engine.parallel.data_parallel_size))
    server.check_ports(len(engines))
    if server.lora_modules and not engine.lora.enable_lora:
        raise ConfigError(f"lora_modules={' '.join(server.lora_modules)} needs enable_lora; add it, or leave them out")
    if server.served_model_name is None and engine.model.model in server.adapters():
        raise ConfigError(
            f"lora_modules: {engine.model.model!r} is the model's own name; give the adapter another, or the model one with "
            "served_model_name"
        )
    return engine, server


def _check_keys(keys: Iterable[str], source: str) -> None:
    """Refuse what could not arrive in an HTTP header as it is. Errors count the keys, and never show one."""
    for number, key in enumerate(keys, start=1):
        if not key:
            raise ConfigError(f"{source}: key {number} is empty; write one, or leave it unset")
        if not all("!" <= character <= "~" for character in key):
            raise ConfigError(
                f"{source}: key {number} has a space or a character that is not printable ASCII; use letters, digits "
                "and signs, e.g. what `openssl rand -hex 24` prints"
            )
