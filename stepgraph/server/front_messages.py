"""What the supervisor and the front processes tell each other, in MessagePack; see `messages`."""

from __future__ import annotations

from typing import Any

import msgspec

from stepgraph.errors import EngineDeadError, RequestError, StepgraphError
from stepgraph.server.counts import FrontCounts
from stepgraph.server.engine_observer import EngineStatus
from stepgraph.server.errors import APIError


class StartFront(msgspec.Struct, tag=True):
    """To a front's process, on its standard input: the one message before the socket is there."""

    name: str
    """Of its sockets, other than that of every front before."""
    address: str
    """Of the supervisor."""
    settings: dict[str, Any]
    """Of the engine, as `EngineConfig.from_settings` takes them."""
    server_settings: dict[str, Any]
    """The fields of ServerConfig."""
    api_keys: list[str]
    chat_template: str | None
    listening: list[int]
    """Descriptors that it listens on: for the API, and for metrics where these have a port of their own. Empty for one in whose
    place there was another: it opens its own, once it has loaded what the model needs."""
    max_connections: int
    num_engines: int


# From the supervisor to a front.


class EngineNews(msgspec.Struct, tag=True):
    """See `EngineListener.on_status`."""

    replica: int
    status: EngineStatus


class EngineEnded(msgspec.Struct, tag=True):
    """See `EngineListener.on_end`."""

    replica: int
    reason: str


class PrefixesForgotten(msgspec.Struct, tag=True):
    """An engine's prefix cache was emptied."""

    replica: int


class Share(msgspec.Struct, tag=True):
    """What administrators have set; answered by `FrontAnswer`."""

    number: int
    sleep_level: int
    paused: bool
    coming: str | None
    adapters: dict[str, str]


class AskCounts(msgspec.Struct, tag=True):
    """Answered by `Counts`."""

    number: int


class Drain(msgspec.Struct, tag=True):
    """Refuse new requests, let those that run finish, and end; `hurry`: at once."""

    hurry: bool


class CallAnswer(msgspec.Struct, tag=True):
    """What came of a `Call`."""

    number: int
    content: Any


class CallFailed(msgspec.Struct, tag=True):
    """What a `Call` asks for cannot be done."""

    number: int
    kind: str
    message: str
    status: int = 0
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = {}

    @classmethod
    def of(cls, number: int, error: Exception) -> CallFailed:
        """What an exception says."""
        if isinstance(error, APIError):
            return cls(number, "APIError", error.message, error.status, error.param, error.code, error.headers)
        kind = next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "StepgraphError")
        fields = (error.param, error.code) if isinstance(error, StepgraphError) else (None, None)
        return cls(number, kind, str(error) or repr(error), 0, *fields)

    def error(self) -> Exception:
        """An exception that says so."""
        if self.kind == "APIError":
            return APIError(self.status, self.message, param=self.param, code=self.code, headers=self.headers)
        return _KINDS.get(self.kind, StepgraphError)(self.message, param=self.param, code=self.code)


_KINDS: dict[str, type[StepgraphError]] = {"EngineDeadError": EngineDeadError, "RequestError": RequestError}

ToFront = EngineNews | EngineEnded | PrefixesForgotten | Share | AskCounts | Drain | CallAnswer | CallFailed


# From a front to the supervisor.


class FrontUp(msgspec.Struct, tag=True):
    """It hears what it is told from here on."""


class Loaded(msgspec.Struct, tag=True):
    """It has what it needs of the model."""


class FrontFailed(msgspec.Struct, tag=True):
    """The last word of a front that cannot start."""

    message: str
    is_users: bool


class FrontAnswer(msgspec.Struct, tag=True):
    """It knows what it was told."""

    number: int


class Counts(msgspec.Struct, tag=True):
    """What it has counted."""

    number: int
    counts: FrontCounts


class Call(msgspec.Struct, tag=True):
    """For a method of `Control`; answered by `CallAnswer` or `CallFailed`."""

    number: int
    method: str
    arguments: dict[str, Any]


FromFront = FrontUp | Loaded | FrontFailed | FrontAnswer | Counts | Call

encode = msgspec.msgpack.Encoder().encode
decode_start = msgspec.json.Decoder(StartFront).decode
encode_start = msgspec.json.Encoder().encode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode
decode_from_front = msgspec.msgpack.Decoder(FromFront).decode
