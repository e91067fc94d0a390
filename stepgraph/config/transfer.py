"""What an engine does of a request, where others do the rest, and how keys and values go from one to another."""

from __future__ import annotations

import os
from dataclasses import dataclass

from stepgraph.config.fields import check, flag_of, setting, text_of_file
from stepgraph.errors import ConfigError

SECRET_VARIABLE = "STEPGRAPH_KV_TRANSFER_SECRET"
_LEAST_SECRET = 16
"""Characters: shorter ones can be guessed."""


@dataclass(frozen=True)
class TransferConfig:
    """Keys and values that go from one engine to another."""

    splitwise_role: str = setting(
        "mixed",
        "what the engine does of a request: all of it (mixed), its prompt up to the first token, whose keys and values others "
        "take over (prefill), or what follows (decode)",
        choices=("mixed", "prefill", "decode"),
    )
    kv_transfer_backend: str | None = setting(
        None,
        "how bytes get to another engine: through memory of this machine (shared_memory), from GPU to GPU (cuda), from host "
        "memory over a network (nixl, which needs the package of this name), or as is best on this machine (auto); default: auto "
        "for the roles prefill and decode, while a mixed engine has to do with others only if this or kv_transfer_port is given",
        choices=("auto", "shared_memory", "cuda", "nixl"),
    )
    kv_transfer_port: int | None = setting(
        None,
        "TCP port on which other engines ask for keys and values, which needs a secret; 0 takes any that is free, and further "
        "engines of a server those after it; default: a socket that only this machine and user reach",
        minimum=0,
        metavar="PORT",
    )
    kv_transfer_host: str = setting(
        "127.0.0.1",
        "address that this port listens on, and that others are told",
    )
    kv_transfer_secret_file: str | None = setting(
        None,
        f"file with the secret that all engines share which may take each other's keys and values; or set {SECRET_VARIABLE}",
        metavar="FILE",
    )
    kv_transfer_peers: tuple[str, ...] | None = setting(
        None,
        "hosts that keys and values may be taken from, whatever a request says; default: this machine alone",
        metavar="HOST",
    )
    kv_lease: float = setting(
        30.0,
        "seconds that computed keys and values are held for an engine that does not ask for them",
        minimum=0.1,
        metavar="SECONDS",
    )
    kv_transfer_timeout: float = setting(
        30.0,
        "seconds without any progress after which a transfer is given up",
        minimum=0.1,
        metavar="SECONDS",
    )
    kv_load_failure: str = setting(
        "recompute",
        "what becomes of a request whose keys and values do not come: its prompt is computed again, or it fails",
        choices=("recompute", "fail"),
    )

    kv_host_cache_gib: float = setting(
        0.0,
        "GiB of host memory for keys and values that the device has no room for any more; they are copied back when a prompt "
        "begins like theirs. For engines of one device",
        minimum=0,
        metavar="GIB",
    )

    def __post_init__(self) -> None:
        check(self)
        for name in ("kv_transfer_host", "kv_transfer_secret_file"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; give it a value, or leave it unset")
        if (self.kv_transfer_port or 0) > 65535:
            raise ConfigError(f"kv_transfer_port={self.kv_transfer_port} is not a port; the largest is 65535")
        if self.kv_transfer_host in ("0.0.0.0", "::"):
            raise ConfigError(
                f"kv_transfer_host={self.kv_transfer_host!r} is every network, and others must be told one address that reaches "
                "this machine; give that"
            )

    @property
    def is_connected(self) -> bool:
        """Whether keys and values go to other engines, or come from them."""
        return (
            self.splitwise_role != "mixed" or self.kv_transfer_backend is not None or self.kv_transfer_port is not None
        )

    @property
    def moves_blocks(self) -> bool:
        """Whether KV blocks leave the device's memory, or come from elsewhere: a block then holds all layers."""
        return self.is_connected or self.kv_host_cache_gib > 0

    @property
    def gives(self) -> bool:
        """Whether others may take keys and values over from here."""
        return self.is_connected and self.splitwise_role != "decode"

    @property
    def takes(self) -> bool:
        """Whether keys and values of others are taken over."""
        return self.is_connected and self.splitwise_role != "prefill"

    @property
    def signals_layers(self) -> bool:
        """Whether graphs say, layer by layer, that keys and values are in the cache."""
        return self.gives

    def secret(self) -> bytes:
        """What engines that have to do with each other know, and others do not; empty if nobody set one.

        Raises:
            ConfigError: the file cannot be read, the secret is too short for one, or there is none and one is needed.
        """
        source, text = f"the environment variable {SECRET_VARIABLE}", os.environ.get(SECRET_VARIABLE)
        if self.kv_transfer_secret_file is not None:
            source = f"kv_transfer_secret_file={self.kv_transfer_secret_file!r}"
            text = text_of_file(self.kv_transfer_secret_file, "kv_transfer_secret_file").strip()
        if text is None:
            if self.kv_transfer_port is not None:
                raise ConfigError(
                    f"kv_transfer_port={self.kv_transfer_port} can be reached by others, who could take any request's keys and "
                    f"values; give all engines the same {flag_of('kv_transfer_secret_file')} or {SECRET_VARIABLE}, e.g. what "
                    "`openssl rand -hex 24` prints; or leave the port out if all are on this machine"
                )
            return b""
        if len(text) < _LEAST_SECRET:
            raise ConfigError(
                f"{source}: a secret needs {_LEAST_SECRET} characters at least; write e.g. what `openssl rand -hex 24` prints"
            )
        return text.encode()
