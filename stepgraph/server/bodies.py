"""Bodies of requests: how much of them is let in, and how they are read without holding anybody up.

A body is measured while it arrives, before anything is made of it: what JSON becomes in memory, and the time that takes, goes by
the number of its values more than by its bytes. Large ones are worked on one after the other, beside the event loop.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from stepgraph.config.server import ServerConfig
from stepgraph.errors import RequestError
from stepgraph.server.errors import APIError

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")

MAX_DEPTH = 128
"""Lists and objects in each other."""
_NUMBERS_PER_ITEM = 8
"""A number costs so much less than a text, a list or an object."""
_MAX_ITEMS_OF_TEXT = 16384
_LARGE_BYTES = 64 * 1024
_LARGE_ITEMS = 2048
"""A body with more of either takes milliseconds to be read."""
_TOKENS = re.compile(
    rb'"(?:[^"\\]++|\\.)*+(?:(")|(\\)?\Z)'  # a text, perhaps cut off
    rb"|([\[{])|([\]}])"
    rb'|[^"\[\]{}]++',
    re.DOTALL,
)
_CUT_AT_ESCAPE, _OPENS, _CLOSES = 2, 3, 4  # groups of it
_REST_OF_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_QUOTE = ord('"')
_FORMS = {
    "prompt": "text, a list of texts, a list of token ids, or a list of such lists",
    "input": "text, or a list of items",
    "content": "text, or a list of parts",
    "stop": "text, or a list of texts",
    "tool_choice": "none, auto, required, or an object that names a function",
    "guided_json": "a JSON schema, as an object or as text",
}
"""Of fields that may have several. A request's class may have others in `forms`."""


class ItemCount:
    """Counts the values of JSON that comes in pieces, without making them. What is counted need not be JSON.

    Args:
        max_items: texts (names of fields are some), lists and objects; of all values there may be 8 times as many.
        where, advice: what is counted and what can be done, in errors.
        param: the field that holds it; None: it is the whole body.
    """

    def __init__(self, max_items: int, where: str, advice: str = "", *, param: str | None = None):
        self.num_items = 0
        self._max_items = max_items
        self._where = where
        self._advice = advice
        self._param = param
        self._num_commas = 0
        self._depth = 0
        self._in_text = self._is_escaped = False

    def feed(self, content: bytes) -> None:
        """Count on.

        Raises:
            RequestError: there are too many values, or they are nested too deep.
        """
        for token in _TOKENS.finditer(content, self._rest_of_text(content)):
            kind = token.lastindex
            if kind == _OPENS:
                self.num_items += 1
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise RequestError(
                        f"{self._where} has more than {MAX_DEPTH} lists and objects in each other; flatten it",
                        param=self._param,
                        code="nested_too_deep",
                    )
            elif kind == _CLOSES:
                self._depth -= 1
            elif content[token.start()] == _QUOTE:
                self.num_items += 1
                self._in_text, self._is_escaped = kind in (None, _CUT_AT_ESCAPE), kind == _CUT_AT_ESCAPE
            else:
                self._num_commas += token[0].count(b",")
            if self.num_items > self._max_items or self._num_commas > _NUMBERS_PER_ITEM * self._max_items:
                raise RequestError(
                    f"{self._where} holds more than {self._max_items} texts, lists and objects (names of fields count too), or "
                    f"more than {_NUMBERS_PER_ITEM} times as many numbers; send less{self._advice}",
                    param=self._param,
                    code="too_many_items",
                )

    def _rest_of_text(self, content: bytes) -> int:
        """Where the text ends that the last piece broke off in."""
        if not self._in_text or not content:
            return 0
        rest = _REST_OF_TEXT.match(content, 1 if self._is_escaped else 0)
        assert rest is not None
        end = rest.end()
        self._is_escaped = end < len(content) and content[end] != _QUOTE  # a backslash is the last character
        self._in_text = self._is_escaped or end == len(content)
        return min(end + 1, len(content))


def check_values(text: str, param: str) -> None:
    """Measure JSON that a field holds as text, and that was one value where it was counted.

    Raises:
        RequestError: it has too many values, or they are nested too deep.
    """
    ItemCount(_MAX_ITEMS_OF_TEXT, param, param=param).feed(text.encode("utf-8", "surrogatepass"))


class Bodies:
    """What all bodies that are received or prepared hold together. Belongs to one event loop.

    Args:
        config: `max_body_mib`, `max_bodies_mib` and `max_body_items`.
        in_thread: does what takes long.
    """

    def __init__(self, config: ServerConfig, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]):
        self.num_bytes = 0
        self.config = config
        self.in_thread = in_thread
        self.turns = asyncio.Semaphore(1)
        """For large bodies."""
        self.pace = asyncio.Lock()
        """Held while a piece of a large body is measured."""


class Body:
    """One request's body, from its first byte until nothing more is to be made of it."""

    def __init__(self, bodies: Bodies):
        self._bodies = bodies
        self._max_bytes = int(bodies.config.max_body_mib * 2**20)
        self._items = ItemCount(bodies.config.max_body_items, "the body", ", or raise max_body_items")
        self._num_bytes = 0
        self._has_turn = False

    def announce(self, content_length: str) -> None:
        """Hear how long it will be, as the header of this name says it.

        Raises:
            APIError: that is too long.
        """
        if content_length.isascii() and content_length.isdigit() and int(content_length[:20]) > self._max_bytes:
            raise self._too_large()

    async def receive(self, content: bytes) -> None:
        """As `take`; of large bodies, the loop measures one piece at a time before it looks after all else."""
        if self._num_bytes + len(content) <= _LARGE_BYTES:
            self.take(content)
            return
        async with self._bodies.pace:
            self.take(content)
            await asyncio.sleep(0)

    def take(self, content: bytes) -> None:
        """Receive more of it.

        Raises:
            APIError: 413 if it is too long, 503 if that is only so with the bodies of others.
            RequestError: it holds too many values.
        """
        self._num_bytes += len(content)
        self._bodies.num_bytes += len(content)
        if self._num_bytes > self._max_bytes:
            raise self._too_large()
        limit_mib = self._bodies.config.max_bodies_mib
        if self._num_bytes > _LARGE_BYTES and self._bodies.num_bytes > limit_mib * 2**20:
            raise APIError(
                503,
                f"requests of max_bodies_mib={limit_mib:g} MiB together are being received and prepared; try again in a second",
                headers={"Retry-After": "1"},
            )
        self._items.feed(content)

    def release(self) -> None:
        """Nothing more will be made of it: the engine has the prompt, or the request is over."""
        self._bodies.num_bytes -= self._num_bytes
        self._num_bytes = 0
        if self._has_turn:
            self._has_turn = False
            self._bodies.turns.release()

    async def read(self, http: Request, kind: type[B]) -> B:
        """Wait for it, and take it apart. If it is large, others wait from here until `release`.

        Raises:
            APIError: it is not what `kind` says.
            ClientDisconnect: the client left.
        """
        content = await http.body()
        content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content and not (content_type == "application/json" or content_type.endswith("+json")):
            raise APIError(
                415, "the body was not sent as JSON; send it with the header 'Content-Type: application/json'"
            )
        if self._num_bytes <= _LARGE_BYTES and self._items.num_items <= _LARGE_ITEMS:
            return _parse(content, kind)
        await self._bodies.turns.acquire()
        self._has_turn = True
        parsed: B = await self._bodies.in_thread(lambda: _parse(content, kind))
        return parsed

    def _too_large(self) -> APIError:
        limit_mib = self._bodies.config.max_body_mib
        return APIError(413, f"the body is larger than max_body_mib={limit_mib:g} MiB; send less, or raise the limit")


def _parse(content: bytes, kind: type[B]) -> B:
    """Raises APIError for what is not JSON, or whose fields have the wrong types."""
    given = None
    try:
        given = json.loads(content.decode()) if content else None
        return kind.model_validate(given)
    except json.JSONDecodeError as error:
        raise APIError(
            400, f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json"
        ) from error
    except ValidationError as error:
        raise _invalid(error, given, _FORMS | getattr(kind, "forms", {})) from error
    except UnicodeDecodeError as error:
        raise APIError(
            400, f"the body is not JSON: byte {error.start} is no UTF-8 text; send it as UTF-8", code="invalid_json"
        ) from error
    except ValueError as error:
        raise APIError(
            400, "the body holds a whole number of thousands of digits; numbers have 64 bits at most"
        ) from error


def _invalid(error: ValidationError, given: Any, forms: Mapping[str, str]) -> APIError:
    first = error.errors(include_url=False)[0]
    message, code = first["msg"], None
    place, field = _place(first["loc"], given, forms)
    if field in forms:  # one error for each form it might have
        message = f"it must be {forms[field]}"
    elif first["type"] == "missing":
        message, code = "it is missing; give it", "missing_required_parameter"
        place = f"{place}.{first['loc'][-1]}".lstrip(".")
    elif first["type"] == "model_type":
        message = "it must be a JSON object"
    return APIError(422, f"{place or 'the body'}: {message}", param=place or None, code=code)


def _place(where: Sequence[int | str], given: Any, forms: Collection[str]) -> tuple[str, str]:
    """The place of an error in what was given, as `messages[0].role`, and the name of its last field. `where` ends with names of
    the forms that a value may have, if it may have several; what is inside of such a value counts for the whole."""
    place, field = "", ""
    for part in where:
        if isinstance(given, dict) and isinstance(part, str) and part in given and field not in forms:
            place, field = f"{place}.{part:.80}".lstrip("."), part
        elif isinstance(given, list) and isinstance(part, int) and part < len(given) and field not in forms:
            place = f"{place}[{part}]"
        else:
            break
        given = given[part]
    return place, field
