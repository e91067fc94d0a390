"""The descriptors that the system grants the front: connections leave some to everything else."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

_ENOUGH = 65536
"""More would help nobody."""
_RESERVED = 96
"""For what the front holds open (some 40), and to start the engine's process again, which takes a dozen for a moment."""
_LEAST = 8


def raise_descriptor_limit() -> None:
    """Raise what the system grants this process, and those it starts, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def room_for_connections(wanted: int) -> int:
    """How many of so many connections there can be, such that the engine can still be started when all are open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted + _RESERVED <= soft:
        return wanted
    room = max(_LEAST, soft - _RESERVED)
    logger.warning(
        "max_connections=%d needs %d descriptors and the system grants %d (ulimit -n): there can be %d connections",
        wanted,
        wanted + _RESERVED,
        soft,
        room,
    )
    return room
