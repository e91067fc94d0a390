"""What all checks of clients share: what is asked, what counts as an answer, and the list of the checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]
MAX_TOKENS = 96


class Place(BaseModel):
    """A city in a country."""

    city: Literal["Paris", "London"]
    country: Literal["France", "England"]


@dataclass(frozen=True)
class Server:
    """What a client is told."""

    root: str
    key: str
    model: str

    @property
    def v1(self) -> str:
        """Where OpenAI's API begins."""
        return f"{self.root}/v1"


class ByTheModelError(Exception):
    """The client and the server did their part; what nothing forced the model to write was not there."""


Check = Callable[[Server], str]
CHECKS: dict[tuple[str, str], Check] = {}


def check(client: str, what: str) -> Callable[[Check], Check]:
    """Adds a check: it returns what came back, in a few words."""

    def add(run: Check) -> Check:
        assert (client, what) not in CHECKS
        CHECKS[client, what] = run
        return run

    return add


def said(text: str | None) -> str:
    """An answer in a few words, which it must have."""
    assert text, "the answer is empty"
    return f"“{text.strip()[:40]}”"


def found(place: Any) -> str:
    """A place, which it must be."""
    assert isinstance(place, Place), place
    return f"{place.city}, {place.country}"


def refusal(ask: Callable[[], None], kind: type[Exception]) -> Any:
    """The exception of this very type that a client makes of a refusal."""
    try:
        ask()
    except Exception as error:
        if type(error) is kind:
            return error
        raise
    raise AssertionError("it was not refused")
