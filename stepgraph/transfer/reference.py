"""`kv_transfer_params`: how requests and answers say whose keys and values go where, in vLLM's words, so that routers made for it
need not know who serves.

A router sends a prompt to one engine with ``{"do_remote_decode": true}``, and gets ``{"do_remote_prefill": true,
"remote_engine_id": …}`` with the answer, which it sends to another engine with the same prompt. One that wants both to begin at
once makes up the name of a lease, and gives it to both as ``remote_request_id``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepgraph.errors import RequestError

PARAM = "kv_transfer_params"
_MAX_TEXT = 256


@dataclass(frozen=True)
class Offer:
    """The request's prompt is computed here for another engine to take over."""

    lease: str | None = None
    """Name of the lease; None: any."""


@dataclass(frozen=True)
class Reference:
    """The request's prompt is computed elsewhere, by whom."""

    engine: str
    """As its `Hello` names it, another one at each start."""
    host: str
    port: int
    """0: `host` is the path of a socket's file."""
    lease: str

    def params(self, num_blocks: int, num_ranks: int) -> dict[str, Any]:
        """As an answer has it.

        Args:
            num_blocks: that the lease has.
            num_ranks: of the engine that has it.
        """
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine,
            "remote_request_id": self.lease,
            "remote_block_ids": list(range(num_blocks)),  # which those are of its memory is told to the sink alone
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": num_ranks,
        }


def read_params(given: Any) -> Offer | Reference | None:
    """What a request's `kv_transfer_params` ask for; None if nothing.

    Raises:
        RequestError: they make no sense, with what is wrong.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RequestError(f"{PARAM} must be an object, not {type(given).__name__}", param=PARAM)
    flags = {name: given.get(name) or False for name in ("do_remote_decode", "do_remote_prefill")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise RequestError(f"{PARAM}: {name}={value!r:.80} must be true or false", param=PARAM)
    if all(flags.values()):
        raise RequestError(
            f"{PARAM}: do_remote_decode and do_remote_prefill cannot both be true: the prompt is computed here or elsewhere",
            param=PARAM,
        )
    if flags["do_remote_decode"]:
        lease = given.get("remote_request_id")
        return Offer(None if lease is None else _text(given, "remote_request_id"))
    if not flags["do_remote_prefill"]:
        return None
    port = given.get("remote_port")
    if isinstance(port, str) and port.isascii() and port.isdigit() and len(port) < 6:
        port = int(port)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise RequestError(
            f"{PARAM}: remote_port={port!r:.80} must be a port, or 0, as the answer of the engine that computed the prompt has "
            "it",
            param=PARAM,
        )
    return Reference(
        _text(given, "remote_engine_id"), _text(given, "remote_host"), port, _text(given, "remote_request_id")
    )


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise RequestError(
            f"{PARAM}: {name}={value!r:.80} must be a text of 1 to {_MAX_TEXT} characters, as the answer of the engine that "
            "computed the prompt has it",
            param=PARAM,
        )
    return value
