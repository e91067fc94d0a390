"""A conversation that is put together from the parts in which some APIs have it."""

from __future__ import annotations

from typing import Any

_TEXTS = frozenset({"content", "reasoning_content"})
"""Of a message: held as lists of what is to be joined in the end. Joined one by one, they would be copied as often as there are
parts."""


class Turns:
    """A conversation as chat templates take it, being put together.

    What the assistant did between two turns of others becomes one message. Texts of a message are its paragraphs.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def begin(self, role: str, text: str) -> None:
        """A new message."""
        self._messages.append({"role": role, "content": [text]})

    def say(self, role: str, text: str) -> None:
        """More of the last message, or a new one if that is of another role."""
        self._turn_of(role)["content"].append(text)

    def think(self, text: str) -> None:
        """The assistant's reasoning."""
        self._turn_of("assistant").setdefault("reasoning_content", []).append(text)

    def call(self, id: str, name: str, arguments: str | dict[str, Any]) -> None:
        """The assistant's call of a function; `arguments` as JSON text, or as the object that it stands for."""
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn_of("assistant").setdefault("tool_calls", []).append(call)

    def result(self, call_id: str, text: str) -> None:
        """What came of a call."""
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": [text]})

    def messages(self) -> list[dict[str, Any]]:
        """The conversation."""
        return [
            {name: _joined(value) if name in _TEXTS else value for name, value in message.items()}
            for message in self._messages
        ]

    def _turn_of(self, role: str) -> dict[str, Any]:
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]


def _joined(texts: list[str]) -> str:
    return "\n\n".join(text for text in texts if text)
