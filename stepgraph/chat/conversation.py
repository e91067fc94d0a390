"""A conversation: what was said, how answers are drawn, and the file that holds both."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgraph.engine.chat_messages import plain_message
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import RequestError

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "stop",
)
"""Fields of SamplingParams that can be set in a terminal."""
_ROLES = ("user", "assistant")
_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Conversation:
    """All that the next answer depends on, but for the model.

    Args:
        system: the system prompt; None leaves it to the model's template.
        turns: of the user and the assistant, `{"role", "content"}` each.
        params: how answers are drawn.
    """

    system: str | None
    turns: tuple[Mapping[str, Any], ...]
    params: SamplingParams

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """The turns as the chat template takes them."""
        return ([] if self.system is None else [{"role": "system", "content": self.system}]) + list(self.turns)


def save(path: Path, conversation: Conversation, model: str, *, replace: bool) -> None:
    """Write a conversation as JSON, whole or not at all.

    Args:
        path: of the file; its folder must be there.
        conversation: what to write.
        model: its name, for people.
        replace: whether a file that is there may be replaced.

    Raises:
        RequestError: it is there and may not be, or the file cannot be written.
    """
    if path.exists() and not (replace and path.is_file()):
        raise RequestError(
            f"{path} is there already; give another name, or replace it by /save -f {path}"
            if path.is_file()
            else f"{path} is no file; give the name of one"
        )
    content = {
        "model": model,
        "system": conversation.system,
        "messages": list(conversation.turns),
        "sampling": {name: getattr(conversation.params, name) for name in SAMPLING},
    }
    path = path.resolve()  # a link stays one
    beside: str | None = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".chat-", delete=False) as file:
            beside = file.name
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")
        os.replace(beside, path)
    except (OSError, UnicodeEncodeError) as error:
        if beside is not None:
            os.unlink(beside)
        raise RequestError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def load(path: Path) -> tuple[Conversation, str | None]:
    """Read what `save` wrote: the conversation, and the name of its model, if it says it.

    A list of messages alone, or of an object with `messages` alone, will do; a system message may be the first of them.

    Raises:
        RequestError: the file cannot be read, or something in it makes no sense.
    """
    try:
        if not path.is_file():
            raise RequestError(f"{path} is no file" if path.exists() else f"there is no file {path}")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise RequestError(f"{path} has more than {_MAX_FILE_BYTES >> 20} MiB, which is no conversation")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except RequestError:  # which is a ValueError
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from error
    try:
        return _parsed({"messages": content} if isinstance(content, list) else content)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def _parsed(content: Any) -> tuple[Conversation, str | None]:
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise RequestError(
            'there is no list of messages in it, as in {"messages": [{"role": "user", "content": "Hi"}]}'
        )
    turns = [plain_message(message, f"messages[{i}]") for i, message in enumerate(content["messages"])]
    system, model = content.get("system"), content.get("model")
    for name, value in (("system", system), ("model", model)):
        if not (value is None or isinstance(value, str)):
            raise RequestError(f"{name} must be text, not {value!r:.80}")
    leads = bool(turns) and turns[0]["role"] == "system" and system is None
    if leads:
        system = turns.pop(0)["content"]
    for i, turn in enumerate(turns, int(leads)):
        if turn["role"] not in _ROLES:
            raise RequestError(
                f"messages[{i}].role={turn['role']!r:.80}: a conversation here is of {' and '.join(_ROLES)}, and one system "
                "message at most before them"
            )
    sampling = content.get("sampling") or {}
    if not isinstance(sampling, dict):
        raise RequestError(f"sampling must be an object, not {sampling!r:.80}")
    if unknown := sorted(set(sampling) - set(SAMPLING)):
        raise RequestError(f"sampling.{unknown[0]} is not known; it may hold {', '.join(SAMPLING)}")
    defaults: dict[str, Any] = {"temperature": 0.0, "max_tokens": None}
    params = SamplingParams(**(defaults | sampling))
    return Conversation(system, tuple(said(turn["role"], turn["content"]) for turn in turns), params), model


def said(role: str, content: str) -> Mapping[str, Any]:
    """A turn."""
    return {"role": role, "content": content}


def last_question(turns: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the user's last turn; None if there is none."""
    return next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "user"), None)
