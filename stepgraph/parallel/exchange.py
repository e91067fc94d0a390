"""Small values that ranks exchange on the host, while they start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Exchange: TypeAlias = Callable[[bytes], list[bytes]]
"""Gives every rank's value to all: called by all ranks, in the same order; returns the values in the order of the ranks. Raises a
StepgraphError if a rank ended, or failed, before it gave its own."""


def alone(value: bytes) -> list[bytes]:
    """The exchange of one rank."""
    return [value]


def least(exchange: Exchange, value: int) -> int:
    """The least of the ranks' values."""
    return min(int(other) for other in exchange(str(value).encode()))
