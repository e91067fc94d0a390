"""What an engine tells others of the blocks in its prefix cache, and where they hear of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from stepgraph.config.fields import check, setting
from stepgraph.errors import ConfigError

_LARGEST_PORT = 65535
_LARGEST_HWM = 2**31 - 1
_EVERY_ADDRESS = ("*", "0.0.0.0", "[::]", "::")


class Endpoint(NamedTuple):
    """A place of ZeroMQ's, as `tcp://*:5557` or `ipc:///run/kv` name one."""

    prefix: str
    """All of it, but for the port."""
    port: int | None
    """None: it is a file."""

    def of_rank(self, rank: int) -> str:
        """That of a data-parallel rank: ports are counted on, files get the rank behind their name."""
        if self.port is not None:
            return f"{self.prefix}{self.port + rank}"
        return f"{self.prefix}_dp{rank}" if rank else self.prefix

    @property
    def is_bound(self) -> bool:
        """Whether an engine listens there, if others may listen instead and be connected to, as vLLM tells them apart."""
        host = self.prefix.removeprefix("tcp://").removesuffix(":")
        return self.port is None or host in _EVERY_ADDRESS


@dataclass(frozen=True)
class KVEventsConfig:
    """Events that tell routers which blocks are in the prefix cache, in the form of vLLM."""

    enable_kv_cache_events: bool = setting(
        False,
        "publish over ZeroMQ which blocks enter and leave the prefix cache, with their tokens, for routers that send requests "
        "where their prefix is: whoever reaches the port reads prompts and answers",
    )
    kv_events_endpoint: str = setting(
        "tcp://*:5557",
        "where they are published: tcp://*:PORT listens for subscribers, tcp://HOST:PORT connects to one that listens, "
        "ipc://FILE listens on this machine; data-parallel ranks count the port on",
        metavar="ENDPOINT",
    )
    kv_events_replay_endpoint: str | None = setting(
        None,
        "where subscribers ask for what they have missed; without it they cannot",
        metavar="ENDPOINT",
    )
    kv_events_topic: str = setting(
        "", "first frame of every message, by which subscribers choose; llm-d wants kv@POD@MODEL"
    )
    kv_events_buffer_steps: int = setting(
        10_000,
        "batches that are kept for replay as they were; instead of older ones, it says what was in the cache after them",
        minimum=1,
    )
    kv_events_hwm: int = setting(
        100_000, "messages that wait for a subscriber that is slow, before it misses some; 0: no limit", minimum=0
    )
    kv_events_max_queue_size: int = setting(
        100_000,
        "events that wait to be published, before all are dropped and the cache is told empty: the engine never waits",
        minimum=1,
    )
    kv_events_salts: str = setting(
        "digest",
        "how requests' cache salts appear in events: as digests that tell them apart, or as they are (plain), for routers that "
        "know requests' salts",
        choices=("digest", "plain"),
    )
    kv_events_rank: int = setting(
        0,
        "data-parallel rank that events carry and ports are counted by, of the first engine; further engines of a server have "
        "those after it",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.kv_events_hwm > _LARGEST_HWM:
            raise ConfigError(
                f"kv_events_hwm={self.kv_events_hwm} is more than ZeroMQ counts; the largest value is {_LARGEST_HWM}, and 0 "
                "means no limit",
                param="kv_events_hwm",
            )
        if not is_unicode(self.kv_events_topic):
            raise ConfigError(
                f"kv_events_topic={self.kv_events_topic!r} is not Unicode text; write it in UTF-8",
                param="kv_events_topic",
            )
        replay = self.replay_endpoint
        if replay is not None and replay.port is None and replay == self.endpoint:
            raise ConfigError(
                f"kv_events_endpoint and kv_events_replay_endpoint are both {self.kv_events_endpoint!r}; give two files",
                param="kv_events_replay_endpoint",
            )
        self.check_ports(1)

    @property
    def endpoint(self) -> Endpoint:
        """Where events are published."""
        return _read("kv_events_endpoint", self.kv_events_endpoint)

    @property
    def replay_endpoint(self) -> Endpoint | None:
        """Where they are replayed."""
        return (
            None
            if self.kv_events_replay_endpoint is None
            else _read("kv_events_replay_endpoint", self.kv_events_replay_endpoint)
        )

    def check_ports(self, num_ranks: int) -> None:
        """Raise ConfigError if so many data-parallel ranks, from `kv_events_rank` on, have not a port each for events and one
        for replay."""
        port = self.endpoint.port
        replay_port = None if self.replay_endpoint is None else self.replay_endpoint.port
        of = "" if num_ranks == 1 else f" of {num_ranks} engines or ranks"
        for name, first in (("kv_events_endpoint", port), ("kv_events_replay_endpoint", replay_port)):
            if first is not None and (last := first + self.kv_events_rank + num_ranks - 1) > _LARGEST_PORT:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}{of} needs ports up to {last}, and the largest is {_LARGEST_PORT}; give a "
                    "smaller one",
                    param=name,
                )
        if port is None or replay_port is None or not self.endpoint.is_bound:
            return
        if abs(port - replay_port) < num_ranks:
            raise ConfigError(
                f"kv_events_endpoint={self.kv_events_endpoint!r} and kv_events_replay_endpoint="
                f"{self.kv_events_replay_endpoint!r}{of} take the same ports, for each rank has the next ones; leave {num_ranks} "
                "between them at least",
                param="kv_events_replay_endpoint",
            )


def is_unicode(text: str) -> bool:
    """Whether it can be sent: a file's name, or an argument, that is not UTF-8 has halves of characters here."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(name: str, text: str) -> Endpoint:
    if is_unicode(text):
        tcp = re.fullmatch(r"(tcp://(?:\*|\[[0-9a-fA-F:.]+\]|[^\s:/*\[\]\0]+):)([0-9]{1,5})", text)
        if tcp is not None and 0 < int(tcp[2]) <= _LARGEST_PORT:
            return Endpoint(tcp[1], int(tcp[2]))
        if re.fullmatch(r"ipc://[^\s\0]+", text) is not None:
            return Endpoint(text, None)
    raise ConfigError(
        f"{name}={text!r} is not an endpoint; write tcp://*:PORT, tcp://HOST:PORT with a port up to {_LARGEST_PORT}, or ipc://FILE",
        param=name,
    )
