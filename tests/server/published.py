"""Replies and events against the schema that OpenAI publishes, which `LiveServer` holds all against that it hears."""

import json
from collections.abc import Iterator
from copy import deepcopy
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema import Draft202012Validator, validators

DATA = Path(__file__).parents[1] / "data" / "openai_schema.json"
WHOLE = {
    "/v1/chat/completions": "CreateChatCompletionResponse",
    "/v1/completions": "CreateCompletionResponse",
    "/v1/responses": "Response",
    "/v1/models": "ListModelsResponse",
}
STREAMED = {"/v1/chat/completions": "CreateChatCompletionStreamResponse", "/v1/completions": "CompletionChunk"}
"""Components of replies, and of the events of streams; those of /v1/responses differ by their type."""
_CHOICE = "properties/choices/items/properties"
ALSO: list[tuple[str, str | None, str]] = [
    ("ModelResponseProperties/properties/user", None, "the document's own examples have it where nothing was given"),
    ("ModelResponseProperties/properties/safety_identifier", None, "likewise: clients count on all that can be given"),
    ("ModelResponseProperties/properties/prompt_cache_key", None, "likewise"),
    ("Response/allOf/2/properties/usage", None, "the examples have it until a response has ended"),
    (f"CompletionChunk/{_CHOICE}/finish_reason", None, "whole answers are described; the example of a chunk has it"),
    ("CompletionChunk/properties/usage", None, "in all chunks but the last with include_usage, as the document says"),
    *(
        (f"{name}/{_CHOICE}/logprobs/anyOf/0/properties/{field}/items", None, "echo: nothing is before the first token")
        for name in ("CreateCompletionResponse", "CompletionChunk")
        for field in ("token_logprobs", "top_logprobs")
    ),
    *(
        (
            f"{name}/{_CHOICE}/finish_reason",
            "abort",
            "an administrator ended the answer: OpenAI's has none, this is vLLM's word",
        )
        for name in (
            "CreateChatCompletionResponse",
            "CreateChatCompletionStreamResponse",
            "CreateCompletionResponse",
            "CompletionChunk",
        )
    ),
]
"""Places where the server may say a value that the schema does not allow, and why."""
_TELLING = ("type", "object", "role")
"""Fields whose value tells the members of a union apart."""


class NotAsPublished(BaseException):
    """The server said something that the schema does not allow. No Exception, which clients turn into one of their own."""


@cache
def _definitions() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))["$defs"]
    found["CompletionChunk"] = deepcopy(found["CreateCompletionResponse"])
    for place, value, _ in ALSO:
        *path, last = (int(part) if part.isdigit() else part for part in place.split("/"))
        holder = reduce(getitem, path, found)
        holder[last] = {"anyOf": [holder[last], {"const": value}]}
    return found


def _target(schema: Any) -> Any:
    while isinstance(schema, dict) and "$ref" in schema:
        schema = _definitions()[schema["$ref"].rpartition("/")[2]]
    return schema


def _constants(schema: Any) -> dict[str, Any]:
    schema = _target(schema)
    found: dict[str, Any] = {}
    for part in schema.get("allOf", ()):
        found |= _constants(part)
    properties = schema.get("properties", {})
    return found | {
        name: properties[name]["const"] for name in _TELLING if "const" in _target(properties.get(name, {}))
    }


def _reference(validator, target, instance, schema) -> Iterator[jsonschema.ValidationError]:
    yield from validator.descend(instance, _target(schema))


def _any_of(validator, options, instance, schema) -> Iterator[jsonschema.ValidationError]:
    """As JSON Schema says. A member for another value of `type` is not looked at; the errors of one that is left are told."""
    if isinstance(instance, dict):
        possible = [
            option
            for option in options
            if all(instance.get(name, value) == value for name, value in _constants(option).items())
        ]
        options = possible or options
    if len(options) == 1:
        yield from validator.descend(instance, options[0])
    elif not any(validator.evolve(schema=option).is_valid(instance) for option in options):
        yield jsonschema.ValidationError(f"{instance!r:.300} is none of what it can be")


_Validator = validators.extend(Draft202012Validator, {"$ref": _reference, "anyOf": _any_of})


@cache
def _validator(component: str) -> Any:
    return _Validator(_definitions()[component])


@cache
def _event_components() -> dict[str, str]:
    names = [option["$ref"].rpartition("/")[2] for option in _definitions()["ResponseStreamEvent"]["anyOf"]]
    return {_definitions()[name]["properties"]["type"]["const"]: name for name in names}


def check(component: str, value: Any) -> None:
    """Raises NotAsPublished if a value is not what the component says."""
    if error := jsonschema.exceptions.best_match(_validator(component).iter_errors(value)):
        raise NotAsPublished(f"{component} {error.json_path}: {error.message:.300}\n{json.dumps(value):.3000}")


class ReplyCheck:
    """Checks one reply while it arrives. Those of /v1/messages are Anthropic's, and held against its schema by their own tests.

    Args:
        path: that was asked.
        status, content_type: of the reply.
    """

    def __init__(self, path: str, status: int, content_type: str):
        self._path = path.partition("?")[0]
        self._is_stream = content_type.startswith("text/event-stream")
        self._is_json = content_type.startswith("application/json")
        self._status = status
        self._content = b""
        self._num_events = 0
        self._last = ""

    def feed(self, content: bytes) -> None:
        """More of it has come."""
        self._content += content
        while self._is_stream and b"\n\n" in self._content:
            event, _, self._content = self._content.partition(b"\n\n")
            self._check_event(event)

    def end(self) -> None:
        """All has come."""
        if self._is_stream and (self._path in STREAMED or self._path == "/v1/responses"):
            if self._content:
                raise NotAsPublished(f"a stream of {self._path} ends within an event: {self._content!r:.300}")
            if self._last not in ("[DONE]", "error", "response.completed", "response.incomplete", "response.failed"):
                raise NotAsPublished(f"a stream of {self._path} ends with {self._last!r:.300}")
        elif self._is_json and self._content:
            self._check_whole(json.loads(self._content))

    def _check_whole(self, value: Any) -> None:
        if self._status >= 400:
            if self._path.startswith("/v1/") and not self._path.startswith("/v1/messages"):
                check("ErrorResponse", value)
        elif component := WHOLE.get(self._path):
            check(component, value)
        elif self._path.startswith("/v1/models/"):
            check("Model", value)

    def _check_event(self, event: bytes) -> None:
        lines = event.decode().split("\n")
        name = next((line.removeprefix("event: ") for line in lines if line.startswith("event: ")), None)
        data = "\n".join(line.removeprefix("data: ") for line in lines if line.startswith("data: "))
        if self._last in ("[DONE]", "response.completed", "response.incomplete", "response.failed"):
            raise NotAsPublished(f"{data:.300} comes after the end of the stream, {self._last}")
        number, self._num_events = self._num_events, self._num_events + 1
        if self._path in STREAMED:
            if name is not None:
                raise NotAsPublished(f"an event of {self._path} has the name {name}")
            if data == "[DONE]":
                self._last = data
                return
            value = json.loads(data)
            check("ErrorResponse" if "error" in value else STREAMED[self._path], value)
            self._last = "error" if "error" in value else value["object"]
        elif self._path == "/v1/responses":
            value = json.loads(data)
            self._last = kind = value["type"]
            component = _event_components().get(kind)
            begins = {0: "response.created", 1: "response.in_progress"}.get(number, kind)
            if component is None or name != kind or value["sequence_number"] != number or kind != begins:
                raise NotAsPublished(f"event {number} of a response is {event.decode():.300}")
            check(component, value)
