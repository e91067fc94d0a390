"""What two engines tell each other about keys and values: JSON objects, checked field by field. Nothing is ever unpickled.

The *source* has computed blocks and holds them under a lease; the *sink* takes them over. The sink connects, and asks:

    sink                                     source
    Hello      who I am, what my blocks are  Hello
    Open       a lease, from a block on      Filled     blocks, each with its key, and the step that fills them
                                             Complete   the last of them, and that the engine has read the steps' results
    Renew      while it goes on              (nothing)
    Confirm    I have the bytes              Confirmed  they were right, and the lease is over; or Lost
    Drop       I want them no more           Dropped    nobody writes into the sink's blocks any more
                                             Arrived    where the source moves the bytes: they are in the sink's blocks
                                             Lost       the lease is over, and why
    Bye        the link ends                 Bye

Where the source moves the bytes, it goes on until it has said `Dropped` or `Confirmed`: whatever else ends a lease, the sink
answers by Drop, and its blocks are nobody else's before that.

No byte counts before `Confirmed`: it is sent after the bytes have arrived, by the one who knows whether the blocks still were
those of the lease then. Times are durations: clocks differ.
"""

from __future__ import annotations

import json
import typing
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from stepgraph.errors import StepgraphError

PROTOCOL = 1
"""Version; both ends have the same."""
MAX_MESSAGE_BYTES = 16 << 20
"""Keys of 200,000 blocks fit."""
KEY_BYTES = 32


class ProtocolError(StepgraphError):
    """The other end sent what is no message, or not now."""


@dataclass(frozen=True)
class Hello:
    """The first message of both ends."""

    protocol: int
    engine: str
    """Random, another one at each start of an engine."""
    model: str
    """Digest of the weights and of all that their keys and values depend on."""
    layout: str
    """Digest of what a block is, see `stepgraph.transfer.layout.BlockLayout.digest`."""
    backends: tuple[str, ...]
    """Ways to move bytes, the best first."""
    is_cut: bool
    """Whether its ranks share key/value heads as `Shard.heads` says; else each has them all."""
    ranks: tuple[str, ...]
    """Of each rank of the engine, what the others need to reach its memory, in the words of the back end; "" if nothing."""


@dataclass(frozen=True)
class Open:
    """Have the blocks of a lease, as they are filled."""

    lease: str
    first: int
    """Index of the first block wanted among those of the prompt."""
    into: tuple[int, ...] = ()
    """Where the source moves the bytes: the sink's blocks for them, in order. Else none, and the sink moves them."""


@dataclass(frozen=True)
class Renew:
    """The sink still wants these leases."""

    leases: tuple[str, ...]


@dataclass(frozen=True)
class Confirm:
    """The bytes of the first `num_blocks` blocks of the prompt are in the sink's memory: were they right?"""

    lease: str
    num_blocks: int


@dataclass(frozen=True)
class Drop:
    """The sink wants a lease no more, which it may have opened."""

    lease: str


@dataclass(frozen=True)
class Filled:
    """Blocks `start`, `start` + 1, … of a prompt, once step `step` of the source has written them."""

    lease: str
    start: int
    blocks: tuple[int, ...]
    keys: tuple[str, ...]
    """Of each block, see `stepgraph.engine.blocks.block_key`, as hexadecimal digits."""
    step: int
    """As `StepRunner.num_launched` counts; -1: they have been there before."""


@dataclass(frozen=True)
class Complete:
    """There are no more blocks, and all steps that filled them have been read and were right."""

    lease: str
    num_blocks: int


@dataclass(frozen=True)
class Arrived:
    """The source has moved the first `num_blocks` blocks of the prompt."""

    lease: str
    num_blocks: int


@dataclass(frozen=True)
class Confirmed:
    """The blocks that the sink has were those of the lease when it had them. The lease is over."""

    lease: str


@dataclass(frozen=True)
class Lost:
    """A lease is over, or there was none: what has come of it counts for nothing."""

    lease: str
    reason: str
    """One of `LossReason`."""


@dataclass(frozen=True)
class Dropped:
    """Nobody writes into the sink's blocks for a lease any more."""

    lease: str


@dataclass(frozen=True)
class Bye:
    """The link ends, and with it all leases that were opened by it."""

    reason: str


Message = Hello | Open | Renew | Confirm | Drop | Filled | Complete | Arrived | Confirmed | Lost | Dropped | Bye
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in typing.get_args(Message)}


def encode(message: Message) -> bytes:
    """A message as it travels."""
    return json.dumps({"kind": type(message).__name__} | asdict(message), separators=(",", ":")).encode()


def decode(content: bytes) -> Message:
    """The message in `content`.

    Raises:
        ProtocolError: it is none; says what is wrong with it.
    """
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message of the transfer port is not JSON ({error})") from error
    if not isinstance(given, dict) or not isinstance(name := given.pop("kind", None), str) or name not in _KINDS:
        raise ProtocolError("a message of the transfer port is of no known kind")
    kind, types = _KINDS[name], _types(name)
    if given.keys() != types.keys():
        raise ProtocolError(f"{name}: has {sorted(given)} and needs {sorted(types)}")
    values = {field: _checked(name, field, given[field], *types[field]) for field in types}
    message = kind(**values)
    if isinstance(message, Filled):
        if len(message.blocks) != len(message.keys):
            raise ProtocolError(f"Filled: {len(message.blocks)} blocks and {len(message.keys)} keys")
        if any(len(key) != 2 * KEY_BYTES for key in message.keys):
            raise ProtocolError(f"Filled: a key does not have {KEY_BYTES} bytes")
    return message


@cache
def _types(name: str) -> dict[str, tuple[type, bool]]:
    """Of each field, the type of an entry, and whether there are several."""
    hints = typing.get_type_hints(_KINDS[name])
    found = {}
    for field in fields(_KINDS[name]):
        hint = hints[field.name]
        several = typing.get_origin(hint) is tuple
        found[field.name] = (typing.get_args(hint)[0] if several else hint, several)
    return found


def _checked(name: str, field: str, value: Any, kind: type, several: bool) -> Any:
    entries = value if several and isinstance(value, list) else [value]
    # A bool is an int, and no number or text may be below what any field means by it.
    good = isinstance(value, list) == several and all(type(entry) is kind for entry in entries)
    if not good or (kind is int and any(not -1 <= entry < 1 << 63 for entry in entries)):
        raise ProtocolError(f"{name}: {field}={str(value)[:80]!r} is not what it should be")
    return tuple(entries) if several else value
